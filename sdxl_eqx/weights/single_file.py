"""A whole model in one safetensors file, in Stability AI's layout, which ComfyUI and A1111 load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_eqx.models.clip import CLIPTextConfig
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.models.vae import VAEConfig
from sdxl_eqx.weights import ldm
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.tensors import Tensor, Tensors, open_file, write_file

METADATA = "sdxl_eqx.config"
"""Key of the file's metadata under which every part's config stands, as JSON."""

V_PRED, ZTSNR = "v_pred", "ztsnr"
"""Empty tensors by which ComfyUI knows a v-prediction model, and one whose schedule ends in pure noise."""

LEFT_OUT = ("logit_scale", "position_ids")
"""Last words of keys that no model here has a place for."""

STRANGERS = ("model_ema.", "alphas_cumprod", "betas", "sqrt_", "log_one_minus", "posterior_", "denoiser.", "logvar")
"""Starts of keys of training code, which are no weights of the model."""


def read_single_file(file: Path, *, configs: Mapping[str, dict[str, Any]] | None = None) -> Model:
    """A single file, or the UNet alone in that layout, under diffusers' names.

    `configs` are the parts' JSON configs; without them the file's own metadata is taken, else what the shapes tell.

    Raises:
        ValueError: for what is no SDXL, saying what it is.
    """
    tensors, metadata = open_file(file)
    own = json.loads(metadata[METADATA]) if METADATA in metadata else {}
    found = {**_known(tensors, file), **own, **(configs or {})}
    markers = {key for key in (V_PRED, ZTSNR) if key in tensors}
    if markers:
        scheduler = {**found["scheduler"]}
        scheduler["prediction_type"] = "v_prediction" if V_PRED in markers else scheduler["prediction_type"]
        scheduler["rescale_betas_zero_snr"] = ZTSNR in markers
        found["scheduler"] = scheduler
    unet, vae = UNetConfig.from_json(found["unet"]), VAEConfig.from_json(found["vae"])
    grouped: dict[str, Tensors] = {"unet": {}, "vae": {}, "text_encoder": {}, "text_encoder_2": {}}
    prefixes = {"unet": ldm.UNET, "vae": ldm.VAE, "text_encoder": ldm.TEXT, "text_encoder_2": ldm.TEXT_2}
    left_out = []
    alone = not any(key.startswith(ldm.UNET) for key in tensors)
    for key, tensor in tensors.items():
        part = next((name for name, prefix in prefixes.items() if key.startswith(prefix)), None)
        last = key.rpartition(".")[2]
        if last in LEFT_OUT or key in markers or key.startswith(STRANGERS):
            left_out.append(key)
        elif part is not None:
            grouped[part][key.removeprefix(prefixes[part])] = tensor
        elif key.startswith(ldm.TEXT_2_ALONE):
            grouped["text_encoder_2"][key.removeprefix(ldm.TEXT_2_ALONE)] = tensor
        elif alone:
            grouped["unet"][key] = tensor
        else:
            raise ValueError(f"{file}: unknown key {key}; it is not of an SDXL single file.")
    name = ldm.rename(ldm.unet_rules(unet), to_file=False)
    parts = {
        "unet": {name(key): tensor for key, tensor in grouped["unet"].items()},
        "vae": ldm.vae_from_file(grouped["vae"], vae),
        "text_encoder": grouped["text_encoder"],
        "text_encoder_2": ldm.text_2_from_file(grouped["text_encoder_2"]),
    }
    parts = {part: tensors for part, tensors in parts.items() if tensors}
    return Model(parts, {k: v for k, v in found.items() if k in parts or k == "scheduler"}, tuple(sorted(left_out)))


def _known(tensors: Tensors, file: Path) -> dict[str, dict[str, Any]]:
    """The configs of the published models that the shapes tell."""
    stem = next((p for p in (ldm.UNET, "") if f"{p}input_blocks.0.0.weight" in tensors), None)
    if stem is None:
        raise ValueError(f"{file}: has no {ldm.UNET}input_blocks.0.0.weight; it is no Stable Diffusion single file.")
    if any(key.startswith("cond_stage_model.transformer.") for key in tensors):
        raise ValueError(f"{file}: a Stable Diffusion 1 model; SDXL is needed.")
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        raise ValueError(f"{file}: a Stable Diffusion 2 model; SDXL is needed.")
    label = tensors.get(f"{stem}label_emb.0.0.weight")
    if label is None:
        raise ValueError(f"{file}: its UNet has no label_emb, which SDXL's micro-conditioning needs.")
    config = UNetConfig.sdxl_refiner() if label.shape[1] == 2560 else UNetConfig.sdxl_base()
    return {
        "unet": config.to_json(),
        "vae": VAEConfig.sdxl_base().to_json(),
        "text_encoder": CLIPTextConfig.sdxl_base().to_json(),
        "text_encoder_2": CLIPTextConfig.sdxl_base_2().to_json(),
        "scheduler": _scheduler(),
    }


def _scheduler() -> dict[str, Any]:
    """SDXL base's `scheduler_config.json`."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    }


def single_file_tensors(model: Model) -> Tensors:
    """A model in the single file's layout, with its markers."""
    unet = UNetConfig.from_json(model.configs["unet"])
    name = ldm.rename(ldm.unet_rules(unet), to_file=True)
    tensors: Tensors = {ldm.UNET + name(key): tensor for key, tensor in model.parts["unet"].items()}
    if "vae" in model.parts:
        tensors.update(ldm.vae_to_file(model.parts["vae"], VAEConfig.from_json(model.configs["vae"])))
    for key, tensor in model.parts.get("text_encoder", {}).items():
        tensors[ldm.TEXT + key] = tensor
    prefix = ldm.TEXT_2 if "text_encoder" in model.parts else ldm.TEXT_2_ALONE
    tensors.update(ldm.text_2_to_file(model.parts.get("text_encoder_2", {}), prefix))
    scheduler = model.configs.get("scheduler", {})
    empty = Tensor.of(np.empty(0, np.float16))
    if scheduler.get("prediction_type") == "v_prediction":
        tensors[V_PRED] = empty
    if scheduler.get("rescale_betas_zero_snr"):
        tensors[ZTSNR] = empty
    return tensors


def write_single_file(model: Model, file: Path) -> None:
    """Write a model as one file, with every part's config in its metadata."""
    configs = json.dumps(model.configs, sort_keys=True, separators=(",", ":"))
    write_file(single_file_tensors(model), file, metadata={"format": "pt", METADATA: configs})
