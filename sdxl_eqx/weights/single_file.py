"""A whole model in one safetensors file, in Stability AI's layout, which ComfyUI and A1111 load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_eqx.models.clip import CLIPTextConfig
from sdxl_eqx.models.hf_config import WRONG
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.models.vae import VAEConfig
from sdxl_eqx.weights import ldm
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.read import LEFT_OUT, STRANGERS
from sdxl_eqx.weights.tensors import Tensor, Tensors, open_file, write_file

METADATA = "sdxl_eqx.config"
"""Key of the file's metadata under which every part's config stands, as JSON."""

V_PRED, ZTSNR = "v_pred", "ztsnr"
"""Empty tensors by which ComfyUI knows a v-prediction model, and one whose schedule ends in pure noise."""

INDEX_METADATA = "sdxl_eqx.model_index"
"""The same of `model_index.json`."""


def read_single_file(
    file: Path,
    *,
    configs: Mapping[str, dict[str, Any]] | None = None,
    fallback: Mapping[str, dict[str, Any]] | None = None,
) -> Model:
    """A single file, or the UNet alone in that layout, under diffusers' names.

    A part's JSON config is the one of `configs`, of the file's own metadata, of `fallback`, or the published one that
    the shapes tell.

    Raises:
        ValueError: for what is no SDXL, saying what it is.
    """
    tensors, metadata = open_file(file)
    _other_family(tensors, file)
    stored = stored_configs(metadata, file)
    found = {**known(tensors), **(fallback or {}), **stored, **(configs or {})}
    markers = {key for key in (V_PRED, ZTSNR) if key in tensors}
    alone = not any(key.startswith(ldm.UNET) for key in tensors)
    stated = markers or "scheduler" in {**stored, **(configs or {})}
    if markers and "scheduler" not in (configs or {}):
        said = {V_PRED: {"prediction_type": "v_prediction"}, ZTSNR: {"rescale_betas_zero_snr": True}}
        found["scheduler"] = {**found["scheduler"], **{k: v for key in markers for k, v in said[key].items()}}
    grouped: dict[str, Tensors] = {"unet": {}, "vae": {}, "text_encoder": {}, "text_encoder_2": {}}
    prefixes = {"unet": ldm.UNET, "vae": ldm.VAE, "text_encoder": ldm.TEXT, "text_encoder_2": ldm.TEXT_2}
    left_out = []
    for key, tensor in tensors.items():
        part = next((name for name, prefix in prefixes.items() if key.startswith(prefix)), None)
        last = key.rpartition(".")[2]
        if key in markers:
            continue  # said by the scheduler's config
        if last in LEFT_OUT or key.removeprefix(ldm.VAE).startswith(STRANGERS):
            left_out.append(key)
        elif part is not None:
            grouped[part][key.removeprefix(prefixes[part])] = tensor
        elif key.startswith(ldm.TEXT_2_ALONE):
            grouped["text_encoder_2"][key.removeprefix(ldm.TEXT_2_ALONE)] = tensor
        elif alone:
            grouped["unet"][key] = tensor
        else:
            raise ValueError(f"{file}: unknown key {key}; it is not of an SDXL single file.")
    try:
        unet, vae = UNetConfig.from_json(found["unet"]), VAEConfig.from_json(found["vae"])
        parts = {
            "unet": ldm.renamed(grouped["unet"], ldm.unet_rules(unet), to_file=False),
            "vae": ldm.vae_from_file(grouped["vae"], vae),
            "text_encoder": ldm.text_from_file(grouped["text_encoder"]),
            "text_encoder_2": ldm.text_2_from_file(grouped["text_encoder_2"]),
        }
    except WRONG as error:
        raise ValueError(f"{file}: a config of its metadata is damaged ({error!r}); give --config-from DIR.") from None
    parts = {part: tensors for part, tensors in parts.items() if tensors}
    # A UNet alone that says nothing of the schedule is of whatever model it is put into.
    kept = parts.keys() | ({"scheduler"} if stated or parts.keys() != {"unet"} else set())
    configs = {part: config for part, config in found.items() if part in kept}
    return Model(parts, configs, tuple(sorted(left_out)), index=stored_index(metadata, file))


def stored_configs(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """The parts' configs that a file which `write_single_file` wrote has in its metadata; {} for another.

    Raises:
        ValueError: where they are no JSON.
    """
    stored = _json(metadata, METADATA, file) or {}
    if not all(isinstance(config, dict) for config in stored.values()):
        raise ValueError(f"{file}: its metadata {METADATA} must hold a JSON object a part; save it again.")
    return stored


def stored_index(metadata: Mapping[str, str], file: Path) -> dict[str, Any] | None:
    """`model_index.json` of a file which `write_single_file` wrote; None for another."""
    return _json(metadata, INDEX_METADATA, file)


def _json(metadata: Mapping[str, str], key: str, file: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata {key} is not JSON ({error}); save it again.") from None
    if not isinstance(stored, dict | None):
        raise ValueError(f"{file}: its metadata {key} must hold a JSON object; save it again.")
    return stored


LABELS = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")
"""The layer that takes pooled text and micro-conditioning, whose width tells base from refiner."""


def known(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """The configs of the published model, base or refiner, that the shapes tell."""
    names = [prefix + label for prefix in (ldm.UNET, "") for label in LABELS]
    width = next((tensors[name].shape[1:] for name in names if name in tensors), (0,))
    config = UNetConfig.sdxl_refiner() if width == (2560,) else UNetConfig.sdxl_base()
    return {
        "unet": config.to_json(),
        "vae": VAEConfig.sdxl_base().to_json(),
        "text_encoder": CLIPTextConfig.sdxl_base().to_json(),
        "text_encoder_2": CLIPTextConfig.sdxl_base_2().to_json(),
        "scheduler": _scheduler(),
    }


def _other_family(tensors: Tensors, file: Path) -> None:
    """Say what a single file is that is no SDXL.

    Raises:
        ValueError: where it is not.
    """
    stem = next((p for p in (ldm.UNET, "") if f"{p}input_blocks.0.0.weight" in tensors), None)
    if stem is None:
        raise ValueError(f"{file}: has no {ldm.UNET}input_blocks.0.0.weight; it is no Stable Diffusion single file.")
    for prefix, which in (("cond_stage_model.transformer.", 1), ("cond_stage_model.model.", 2)):
        if any(key.startswith(prefix) for key in tensors):
            raise ValueError(f"{file}: a Stable Diffusion {which} model; SDXL is needed.")
    if f"{stem}{LABELS[0]}" not in tensors:
        raise ValueError(f"{file}: its UNet has no label_emb, which SDXL's micro-conditioning needs.")


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
    tensors: Tensors = {}
    if "unet" in model.parts:
        rules = ldm.unet_rules(UNetConfig.from_json(model.configs["unet"]))
        named = ldm.renamed(model.parts["unet"], rules, to_file=True)
        tensors = {ldm.UNET + key: tensor for key, tensor in named.items()}
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
    """Write a model as one file, with every part's config in its metadata; a ControlNet in diffusers' names.

    Raises:
        ValueError: for numbers that are not finite.
        OSError: where it cannot be written; either way nothing is left.
    """
    metadata = {"format": "pt", METADATA: json.dumps(model.configs, sort_keys=True, separators=(",", ":"))}
    if model.index is not None:
        metadata[INDEX_METADATA] = json.dumps(model.index, sort_keys=True, separators=(",", ":"))
    tensors = model.parts["controlnet"] if "controlnet" in model.parts else single_file_tensors(model)
    if list(model.parts) == ["vae"]:  # as VAEs are published
        tensors = {key.removeprefix(ldm.VAE): tensor for key, tensor in tensors.items()}
    write_file(tensors, file, metadata=metadata)
