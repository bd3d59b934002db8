"""The LoRA that is being trained, as files have it: layers by the names of diffusers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdxl_eqx.nn.lora import FIELDS, LoraShape
from sdxl_eqx.weights.lora import Layer, LoRA
from sdxl_eqx.weights.names import Place, places
from sdxl_eqx.weights.tensors import Tensor

PEFT = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""

ROLES = {field: field.removeprefix("lora_") for field in FIELDS}
"""The name of each array of a change in `Layer`."""


def parts_of(unet: Any, encoders: Any) -> dict[str, Any]:
    """The parts that a LoRA may change by the names of diffusers, those that there are."""
    parts = {"unet": unet}
    if encoders is not None:
        parts |= {"text_encoder": encoders.text_encoder, "text_encoder_2": encoders.text_encoder_2}
    return parts


def to_lora(parts: Mapping[str, Any], shape: LoraShape, metadata: Mapping[str, str]) -> LoRA:
    """The changes of some parts (`unet`, `text_encoder`, `text_encoder_2`), each a model with its other arrays None."""
    found: dict[str, dict[str, Tensor]] = {}
    for part, model in parts.items():
        arrays = jax.tree.leaves(model)
        for place, array in zip(places(model), arrays, strict=True):
            host = np.asarray(array)
            for key, tensor in place.to_file(host).items():
                module, _, field = key.rpartition(".")
                if field in FIELDS:
                    found.setdefault(f"{part}.{module}", {})[ROLES[field]] = Tensor.of(tensor)
    alpha = shape.strength * shape.rank
    layers = {name: Layer(x["down"], x["up"], alpha, x.get("magnitude")) for name, x in found.items()}
    return LoRA(layers, dict(metadata))


def from_lora(lora: LoRA, parts: Mapping[str, Any], shape: LoraShape, file: Path) -> dict[str, Any]:
    """`parts` as in `to_lora` with the arrays of a file in them; what it has nothing of stays.

    Raises:
        ValueError: where its rank or alpha is another, or it changes layers that do not train.
    """
    used: set[str] = set()
    filled = {part: _fill(part, model, lora, shape, file, used) for part, model in parts.items()}
    left = sorted(lora.layers.keys() - used)
    if left:
        raise ValueError(
            f"--lora-init {file}: changes {left[0]} ({len(left)} such), which does not train; name it with "
            "--lora-targets, or give --train-text-encoder where it is of a text encoder."
        )
    return filled


def _fill(part: str, model: Any, lora: LoRA, shape: LoraShape, file: Path, used: set[str]) -> Any:
    leaves, structure = jax.tree.flatten(model)
    filled = []
    for place, leaf in zip(places(model), leaves, strict=True):
        tensors = {key: np.asarray(leaf[i] if place.stacked else leaf) for i, key in enumerate(place.keys)}
        tensors = {key: place.one_to_file(x) for key, x in tensors.items()}
        for key, layer, field in _layers_of(place, part, lora):
            _check(layer, key, shape, file)
            tensor = getattr(layer, ROLES[field])
            if tensor is None or (field != "lora_magnitude" and tensor.shape != tensors[key].shape):
                raise ValueError(
                    f"--lora-init {file}: {key} is "
                    f"{'missing; it is no DoRA: leave --use-dora out' if tensor is None else tensor.shape}, "
                    f"{tensors[key].shape} is needed."
                )
            array = tensor.read().astype(np.float32).reshape(tensors[key].shape)
            if not np.isfinite(array).all():
                raise ValueError(f"--lora-init {file}: {key} holds NaN or infinity; give a LoRA that does not.")
            tensors[key] = array
            used.add(f"{part}.{key.rpartition('.')[0]}")
        filled.append(place.from_file(tensors))
    return jax.tree.unflatten(structure, filled)


def _layers_of(place: Place, part: str, lora: LoRA) -> Iterator[tuple[str, Layer, str]]:
    """(key, layer, field) of each of the array's keys that the file has a layer for."""
    for key in place.keys:
        module, _, field = key.rpartition(".")
        layer = lora.layers.get(f"{part}.{module}")
        if field in FIELDS and layer is not None:
            yield key, layer, field


def _check(layer: Layer, key: str, shape: LoraShape, file: Path) -> None:
    if layer.rank != shape.rank:
        raise ValueError(f"--lora-init {file}: {key} has rank {layer.rank}; give --lora-rank {layer.rank}.")
    if not np.isclose(layer.strength, shape.strength):
        raise ValueError(
            f"--lora-init {file}: {key} counts {layer.strength:g} times, here {shape.strength:g}; give --lora-alpha "
            f"{layer.strength * layer.rank:g} and leave --use-rslora out."
        )
    if (layer.magnitude is None) == shape.dora:
        raise ValueError(f"--lora-init {file}: {key} is {'no' if shape.dora else 'a'} DoRA; --use-dora must say so.")
