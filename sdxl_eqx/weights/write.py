"""Models to a diffusers folder, the inverse of `read`."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
from safetensors.numpy import save_file

from sdxl_eqx.models.sdxl import SDXL
from sdxl_eqx.weights.names import places

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.42.0",
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def file_tensors(model: Any, *, dtype: Any) -> dict[str, np.ndarray]:
    """The tensors of a diffusers file, in its layout and in `dtype`."""
    tensors: dict[str, np.ndarray] = {}
    for place, leaf in zip(places(model), jax.tree.leaves(model), strict=True):
        tensors.update(place.to_file(np.asarray(leaf).astype(dtype)))
    return {key: np.ascontiguousarray(value) for key, value in tensors.items()}


def write_model(model: Any, config: dict[str, Any], file: Path, *, dtype: Any) -> None:
    """One part of a diffusers folder: `file` (safetensors) and `config.json` beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(file_tensors(model, dtype=dtype), file, metadata={"format": "pt"})
    write_json(config, file.parent / "config.json")


def write_json(value: dict[str, Any], file: Path) -> None:
    """A JSON file as diffusers writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_folder(
    model: SDXL,
    scheduler: dict[str, Any],
    save_tokenizers: Callable[[Path], None],
    folder: Path,
    *,
    dtype: Any,
    force_zeros: bool = True,
) -> None:
    """A diffusers folder that `StableDiffusionXLPipeline.from_pretrained` loads.

    Written beside its place and renamed when whole, so that a folder that is there is complete; one that was there is
    replaced. `scheduler` is `scheduler_config.json`; `save_tokenizers` writes `tokenizer/` and `tokenizer_2/`.
    """
    building = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(building, ignore_errors=True)
    encoders = model.encoders
    for part, module, stem in (
        ("unet", model.unet, "diffusion_pytorch_model"),
        ("vae", encoders.vae, "diffusion_pytorch_model"),
        ("text_encoder", encoders.text_encoder, "model"),
        ("text_encoder_2", encoders.text_encoder_2, "model"),
    ):
        write_model(module, module.config.to_json(), building / part / f"{stem}.safetensors", dtype=dtype)
    write_json(scheduler, building / "scheduler" / "scheduler_config.json")
    write_json({**INDEX, "force_zeros_for_empty_prompt": force_zeros}, building / "model_index.json")
    save_tokenizers(building)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    building.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
