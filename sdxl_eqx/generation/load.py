"""Everything that a config asks for, read and laid out on the devices."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from sdxl_eqx.config import GenerateConfig, LoraConfig
from sdxl_eqx.data.assets import located
from sdxl_eqx.generation.distilled import FewSteps, few_steps
from sdxl_eqx.loading import ModelParts, fill_part
from sdxl_eqx.models.clip import CLIPTextConfig
from sdxl_eqx.models.controlnet import ControlNet, ControlNetConfig
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.models.vae import VAEConfig
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.sampling.pipeline import Models, Refiner
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.weights.hub import find
from sdxl_eqx.weights.lora import merge, read_lora
from sdxl_eqx.weights.open import Source, open_model
from sdxl_eqx.weights.run import CHECKPOINTS, find_checkpoint
from sdxl_eqx.weights.tensors import open_file

log = logging.getLogger("sdxl_eqx")


def read_parts(config: GenerateConfig) -> tuple[ModelParts, FewSteps | None]:
    """The model with another VAE, a few-step model and LoRAs put in, mapped and not read; and how few steps it wants.

    Raises:
        ValueError: for what cannot be read or does not fit, naming the flag.
    """
    token, loaded = config.model.hf_access_token, config.loaded
    model_config = config.model
    run = Path(model_config.pretrained_model_name_or_path)
    if (run / CHECKPOINTS).is_dir():
        if not (run / "export").is_dir():
            raise ValueError(
                f"--pretrained-model-name-or-path {run}: this run has no export/ yet; finish it, or name the model "
                f"that it was begun from and --unet-checkpoint {run}."
            )
        find_checkpoint(run).item(ema=True)  # a run that trained no UNet is refused here
        changes: dict[str, Any] = {"pretrained_model_name_or_path": str(run / "export")}
        if not model_config.unet_checkpoint:
            changes["unet_checkpoint"] = str(run)
        model_config = dataclasses.replace(model_config, **changes)
    few, loras = None, lora_files(config.lora_config, token=token)
    if loaded.lightning_repo:
        file = _file_of(loaded.lightning_repo, loaded.lightning_ckpt, flag="--lightning-repo", token=token)
        few = few_steps(str(file))
        if any(".lora" in key or "lora_" in key for key in open_file(file)[0]):
            loras = [(file, 1.0), *loras]
        elif model_config.unet_checkpoint:
            raise ValueError("--lightning-ckpt is a UNet, and so is --unet-checkpoint; leave one of them out.")
        else:
            model_config = dataclasses.replace(model_config, unet_checkpoint=str(file))
    parts = ModelParts.read(model_config, config.diffusion_scheduler_config, token=token)
    if config.model.vae_checkpoint:
        parts = _with_vae(parts, config, token=token)
    if few is not None:
        asked = config.diffusion_scheduler_config.changed()
        parts = dataclasses.replace(parts, scheduler={**parts.scheduler, **few.scheduler, **asked})
    return with_loras(parts, loras), few


def lora_files(config: LoraConfig, *, token: str = "") -> list[tuple[Path, float]]:
    """The files of LoRAs and how strong each is.

    Raises:
        ValueError: for what is not there, naming it.
    """
    names = config.lora_model_name_or_path or ()
    weights, scales = _each(config.weight_name, names, ""), _each(config.scale, names, 1.0)
    flag = "--lora-config.lora-model-name-or-path"
    return [
        (_file_of(name, weight, flag=flag, token=token), scale)
        for name, weight, scale in zip(names, weights, scales, strict=True)
    ]


def lora_names(config: LoraConfig) -> list[tuple[str, float]]:
    """What the LoRAs are called, and how strong each is."""
    names = config.lora_model_name_or_path or ()
    files = _each(config.weight_name, names, "")
    adapters = config.adapter_name or ()
    called = adapters if len(adapters) == len(names) else [Path(f or n).stem for f, n in zip(files, names, strict=True)]
    return list(zip(called, _each(config.scale, names, 1.0), strict=True))


def with_loras(parts: ModelParts, loras: Sequence[tuple[Path, float]]) -> ModelParts:
    """A model with LoRAs merged, in float32, when it is read.

    Raises:
        ValueError: for a file that is no LoRA of this model, saying which of its keys are of what.
    """
    if not loras:
        return parts
    model = parts.model.cast(np.dtype(np.float32))
    merged = merge(model, [(read_lora(file, model), scale) for file, scale in loras])
    return dataclasses.replace(parts, model=merged)


def lay_out(parts: ModelParts, config: GenerateConfig, layout: Layout) -> Models:
    """The models on the devices: the UNet in activations_dtype, VAE and text encoders in float32.

    Raises:
        ValueError: where weights are missing or of another shape.
    """
    dtype = jnp.dtype(config.model.activations_dtype)
    unet = parts.stored_unet(config.model, layout, dtype=dtype)
    encoders = parts.encoders(config.model, layout, key=jr.key(0))
    index = parts.model.index or {}
    picture = config.picture
    models = Models(
        unet,
        encoders,
        lambda prompts: parts.tokenize(prompts, picture.caption_chunks),
        Scheduler.from_json(parts.scheduler),
        zeros_for_absent=bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    if not picture.refiner_model_name_or_path:
        return models
    return dataclasses.replace(models, refiner=_refiner(config, parts, models, layout))


def _refiner(config: GenerateConfig, parts: ModelParts, models: Models, layout: Layout) -> Refiner:
    flag, name = "--refiner-model-name-or-path", config.picture.refiner_model_name_or_path
    found = open_model(
        Source(located(name), flag, token=config.model.hf_access_token, from_pt=config.model.from_pt),
        parts=("unet", "text_encoder_2"),
    )
    if "unet" not in found.parts:
        raise ValueError(f"{flag} {name!r}: has no UNet; give SDXL's refiner.")
    unet = UNetConfig.from_json(found.configs["unet"])
    if "text_encoder_2" in found.configs:
        text = CLIPTextConfig.from_json(found.configs["text_encoder_2"], projection=True)
    else:
        text = parts.text_2
    sizes = (unet.projection_class_embeddings_input_dim - (text.projection_dim or 0)) / unet.addition_time_embed_dim
    if unet.cross_attention_dim != text.hidden_size or sizes != 5:
        raise ValueError(
            f"{flag} {name!r}: its UNet takes a context of {unet.cross_attention_dim} and {sizes:g} time ids, a "
            f"refiner takes that of the second text encoder alone ({text.hidden_size}) and 5; give SDXL's refiner."
        )
    if unet.in_channels != parts.vae.latent_channels:
        raise ValueError(f"{flag} {name!r}: draws {unet.in_channels} channels, the model {parts.vae.latent_channels}.")
    dtype = jnp.dtype(config.model.activations_dtype)
    encoder = models.encoders.text_encoder_2
    if "text_encoder_2" in found.parts:
        encoder = fill_part("text_encoder_2", found, layout, dtype=np.float32, source=name)
    # The published refiner's model_index.json says false, and a single file has none.
    zeros = found.index is not None and bool(found.index.get("force_zeros_for_empty_prompt", True))
    refiner = fill_part("unet", found, layout, dtype=dtype, source=name)
    return Refiner(refiner, encoder, config.picture.refiner_fraction, zeros_for_absent=zeros)


def read_controlnets(config: GenerateConfig, parts: ModelParts, layout: Layout) -> list[ControlNet]:
    """The ControlNets, in activations_dtype.

    Raises:
        ValueError: for what is none, or is of another model than `parts`.
    """
    flag, nets = "--controlnet-model-name-or-path", []
    for name in config.loaded.controlnet_model_name_or_path or ():
        source = Source(
            located(name), flag, token=config.model.hf_access_token, from_pt=config.loaded.controlnet_from_pt
        )
        found = open_model(source, parts=("controlnet",))
        if "controlnet" not in found.parts:
            raise ValueError(f"{flag} {name!r}: is no ControlNet in diffusers' layout; give one of SDXL.")
        check_controlnet(ControlNetConfig.from_json(found.configs["controlnet"]), parts.unet, f"{flag} {name!r}")
        dtype = jnp.dtype(config.model.activations_dtype)
        nets.append(fill_part("controlnet", found, layout, dtype=dtype, source=name))
    return nets


def check_controlnet(net: ControlNetConfig, unet: UNetConfig, name: str) -> None:
    """Check that a ControlNet is of a UNet.

    Raises:
        ValueError: with what differs.
    """
    beside = ControlNetConfig(unet)
    for what, has, wants in (
        ("in_channels", net.unet.in_channels, 4 if unet.in_channels == 9 else unet.in_channels),
        ("channels of its residuals", net.skip_channels, beside.skip_channels),
        ("cross_attention_dim", net.unet.cross_attention_dim, unet.cross_attention_dim),
        ("width of pooled text", net.unet.pooled_dim, unet.pooled_dim),
        ("conditioning_channels", net.conditioning_channels, 3),
    ):
        if has != wants:
            raise ValueError(f"{name}: {what} {has}, the model's UNet has {wants}; give a ControlNet of this model.")


def _with_vae(parts: ModelParts, config: GenerateConfig, *, token: str) -> ModelParts:
    flag, name = "--vae-checkpoint", config.model.vae_checkpoint
    fallback = {"vae": parts.model.configs["vae"]}
    other = open_model(
        Source(located(name), flag, token=token, from_pt=config.model.from_pt), parts=("vae",), fallback=fallback
    )
    if "vae" not in other.parts:
        raise ValueError(
            f"{flag} {name!r}: has no VAE but {', '.join(other.parts or other.configs)}; give one that has."
        )
    vae = VAEConfig.from_json(other.configs["vae"])
    if vae.latent_channels != parts.vae.latent_channels:
        raise ValueError(
            f"{flag} {name!r}: has {vae.latent_channels} latent channels, the model {parts.vae.latent_channels}; give "
            "a VAE of SDXL."
        )
    changed = dataclasses.replace(parts, model=parts.model.with_part("vae", other), vae=vae)
    changed.check(inpainting=True)
    return changed


def _file_of(name: str, file: str, *, flag: str, token: str) -> Path:
    """A .safetensors file by its own name, or inside a folder or repository."""
    path = Path(located(name))
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        if not file and len(inside) != 1:
            names = ", ".join(one.name for one in inside) or "none"
            raise ValueError(f"{flag} {name!r}: a folder; name one file in it, of which it has {names}.")
        found = path / file if file else inside[0]
        if not found.is_file():
            raise ValueError(f"{flag} {name!r}: has no file {file!r}; it has {', '.join(one.name for one in inside)}.")
        return found
    found = find(f"{name}/{file}" if file and not path.is_file() else name, flag=flag, token=token)
    if found.is_dir():
        raise ValueError(f"{flag} {name!r}: name the .safetensors file in this repository.")
    return found


def _each(values: Sequence[Any] | None, names: Sequence[str], default: Any) -> list[Any]:
    """One value for each name."""
    given = list(values or [default])
    return given * len(names) if len(given) == 1 else given
