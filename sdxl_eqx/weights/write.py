"""Models to a diffusers folder, the inverse of `read`."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdxl_eqx.models.sdxl import SDXL
from sdxl_eqx.weights.names import Place, places
from sdxl_eqx.weights.tensors import Tensor, Tensors, write_file

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


def file_tensors(model: Any, *, dtype: Any) -> Tensors:
    """The tensors of a diffusers file, in its layout and in `dtype`; each is made when it is read."""
    tensors: Tensors = {}
    for place, leaf in zip(places(model), jax.tree.leaves(model), strict=True):
        for i, key in enumerate(place.keys):
            tensors[key] = Tensor(place.shape, np.dtype(dtype), partial(_read, place, leaf, i, dtype))
    return tensors


def _read(place: Place, leaf: Any, i: int, dtype: Any) -> np.ndarray:
    return place.one_to_file(np.asarray(leaf[i] if place.stacked else leaf)).astype(dtype)


def write_model(model: Any, config: dict[str, Any], file: Path, *, dtype: Any) -> None:
    """One part of a diffusers folder: `file` (safetensors) and `config.json` beside it."""
    write_file(file_tensors(model, dtype=dtype), file, metadata={"format": "pt"})
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
    try:
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
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    building.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
