"""Modules as tensors of a file, the inverse of `read_model`."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdxl_eqx.models.sdxl import SDXL
from sdxl_eqx.weights.folder import write_json
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.names import Place, places
from sdxl_eqx.weights.tensors import Tensor, Tensors, write_file


def file_tensors(module: Any, *, dtype: Any) -> Tensors:
    """The tensors of a diffusers file, in its layout and in `dtype`; each is made when it is read."""
    tensors: Tensors = {}
    for place, leaf in zip(places(module), jax.tree.leaves(module), strict=True):
        for i, key in enumerate(place.keys):
            tensors[key] = Tensor(place.shape, np.dtype(dtype), partial(_read, place, leaf, i, dtype))
    return tensors


def _read(place: Place, leaf: Any, i: int, dtype: Any) -> np.ndarray:
    return place.one_to_file(np.asarray(leaf[i] if place.stacked else leaf)).astype(dtype)


def model_of(sdxl: SDXL, scheduler: dict[str, Any], *, dtype: Any) -> Model:
    """All parts of SDXL under diffusers' names; `scheduler` is `scheduler_config.json`."""
    encoders = sdxl.encoders
    modules = {
        "unet": sdxl.unet,
        "vae": encoders.vae,
        "text_encoder": encoders.text_encoder,
        "text_encoder_2": encoders.text_encoder_2,
    }
    parts = {part: file_tensors(module, dtype=dtype) for part, module in modules.items()}
    configs = {part: module.config.to_json() for part, module in modules.items()}
    return Model(parts, {**configs, "scheduler": scheduler})


def write_model(module: Any, config: dict[str, Any], file: Path, *, dtype: Any) -> None:
    """One part of a diffusers folder: `file` (safetensors) and `config.json` beside it."""
    write_file(file_tensors(module, dtype=dtype), file, metadata={"format": "pt"})
    write_json(config, file.parent / "config.json")
