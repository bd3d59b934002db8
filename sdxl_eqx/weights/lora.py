"""LoRA files: read in every format people use, merged into a model, written for kohya's scripts and for diffusers.

`W + scale * alpha / r * up @ down` (Hu et al. 2021, arXiv:2106.09685), and with a magnitude `m` for each output
`m * V / |V|` of that sum V (DoRA, Liu et al. 2024, arXiv:2402.09353), as PEFT computes them.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.weights.lora_keys import (
    ADAPTER_METADATA,
    KOHYA,
    AdapterConfig,
    Role,
    adapter_configs,
    kohya_name,
    modules,
)
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.tensors import DTYPES, Tensor, Tensors, open_file, write_file

FLOATS = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))
"""The dtypes that a LoRA, and what it changes, may be of."""

STALE = ("sshs_", "modelspec.hash_", "ss_network_dim", "ss_network_alpha", "ss_network_module", ADAPTER_METADATA)
"""Starts of metadata that describe the one file they came in, and no copy in another format."""


@dataclass(frozen=True)
class Layer:
    """What a LoRA adds to one matrix or convolution, in the file's layout."""

    down: Tensor
    """(r, in), or (r, in, k, k) of a convolution."""
    up: Tensor
    """(out, r), or (out, r, 1, 1) of a convolution."""
    alpha: float | None = None
    """The numerator of the strength alpha / r; None: r."""
    magnitude: Tensor | None = None
    """(out,), DoRA's norm of the sum for each output."""

    def cast(self, dtype: Any) -> "Layer":
        """The layer with its tensors in a dtype."""
        magnitude = None if self.magnitude is None else self.magnitude.cast(dtype)
        return replace(self, down=self.down.cast(dtype), up=self.up.cast(dtype), magnitude=magnitude)

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def strength(self) -> float:
        """alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class LoRA:
    """Layers by `part.path` of their module in diffusers' names, and the metadata of their file."""

    layers: dict[str, Layer]
    metadata: dict[str, str] = field(default_factory=dict)


def read_lora(file: Path, model: Model) -> LoRA:
    """A LoRA file for `model`, mapped and not read; keys may be of kohya, PEFT, diffusers and ComfyUI, and mixed.

    Raises:
        ValueError: for what is no LoRA of that model or is incomplete, saying what it is and the remedy.
    """
    tensors, metadata = open_file(file)
    found = modules(tensors, model, file)
    configs = adapter_configs(tensors, metadata, file)
    layers = {}
    for module, keys in found.items():
        part, _, path = module.partition(".")
        try:
            layers[module] = _layer(keys, tensors, model.parts[part][f"{path}.weight"], configs.get(part), path)
        except ValueError as error:
            raise ValueError(f"{file}: {module}: {error}") from None
    return LoRA(layers, metadata)


def _layer(
    keys: Mapping[Role, str], tensors: Tensors, weight: Tensor, config: AdapterConfig | None, path: str
) -> Layer:
    for key in (keys[which] for which in ("down", "up", "magnitude") if which in keys):
        if tensors[key].dtype not in FLOATS:
            raise ValueError(f"{key} is of {tensors[key].dtype}, it must be floating-point; save it as such.")
    down, up = tensors[keys["down"]], tensors[keys["up"]]
    rank = down.shape[0] if down.shape else 0
    out, inner = weight.shape[0], weight.shape[1:]
    if rank < 1 or _plain(down.shape) != (rank, *_plain(weight.shape)[1:]) or _plain(up.shape) != (out, rank):
        raise ValueError(
            f"down {down.shape} and up {up.shape} do not fit the model's weight {weight.shape}: they must be "
            f"(r, {', '.join(map(str, inner))}) and ({out}, r) for one r; give a LoRA that was trained on this model."
        )
    alpha = _alpha(tensors[keys["alpha"]], keys["alpha"]) if "alpha" in keys else None
    if config is not None:
        own = config.alpha(path, rank)
        if "alpha" in keys and (alpha or rank) != own:
            raise ValueError(f"{keys['alpha']} is {alpha or rank:g}, the metadata say {own:g}; remove one of them.")
        alpha = own
    magnitude = None
    if "magnitude" in keys:
        magnitude = tensors[keys["magnitude"]]
        ours = ((out,), (out, 1), (out, *_ones(inner)))
        # PEFT has a convolution's along axis 1; LyCORIS has there what belongs to the inputs.
        peft = "lora_magnitude_vector" in keys["magnitude"] and magnitude.shape == (1, out, *_ones(inner[1:]))
        if magnitude.shape not in ours and not peft:
            raise ValueError(
                f"{keys['magnitude']} has shape {magnitude.shape}; a magnitude for each output ({out},) is needed: "
                "train it with wd_on_output=True (DoRA's own form)."
            )
        magnitude = _shaped(magnitude, (out,))
    return Layer(_shaped(down, (rank, *inner)), _shaped(up, (out, rank, *_ones(inner[1:]))), alpha, magnitude)


def _ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * len(shape)


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a 1x1 convolution as that of a matrix."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor if tensor.shape == shape else tensor.then(lambda x: x.reshape(shape), shape)


def _alpha(tensor: Tensor, key: str) -> float | None:
    """The number; None for 0, which kohya's scripts take for the rank."""
    if tensor.nbytes != tensor.dtype.itemsize:
        raise ValueError(f"{key} has shape {tensor.shape}; one number is needed.")
    value = float(tensor.read().reshape(()).astype(np.float64))
    if not np.isfinite(value):
        raise ValueError(f"{key} is {value}; the file is damaged.")
    return value or None


def merge(model: Model, loras: Sequence[tuple[LoRA, float]]) -> Model:
    """`model` with LoRAs in its weights, each with its scale; tensors are merged in float32 when they are read.

    They are applied in their order, which matters only where one is a DoRA: its norm is of the model's own weight and
    its own sum, and its factor applies to all that came before, as in PEFT with several adapters. A DoRA of scale 0 is
    not without effect, there as here.

    Raises:
        ValueError: for a layer that does not fit the model; when a tensor is read, for values that are not finite.
    """
    changes: dict[str, list[tuple[Layer, float]]] = {}
    for lora, scale in loras:
        if not np.isfinite(scale):
            raise ValueError(f"the scale of a LoRA must be finite, is {scale}.")
        for module, layer in lora.layers.items():
            changes.setdefault(module, []).append((layer, float(scale)))
    parts = {part: dict(tensors) for part, tensors in model.parts.items()}
    for module, layers in changes.items():
        part, _, path = module.partition(".")
        weight = parts.get(part, {}).get(f"{path}.weight")
        if weight is None or weight.dtype not in FLOATS:
            raise ValueError(f"{module}: the model has no floating-point weight of it; give the model of the LoRA.")
        for layer, _ in layers:
            shape = (layer.up.shape[0], *layer.down.shape[1:])
            if weight.shape != shape:
                raise ValueError(f"{module}: the LoRA changes a weight {shape}, the model's is {weight.shape}.")
        parts[part][f"{path}.weight"] = _merged(module, weight, layers)
    return replace(model, parts=parts)


def _merged(module: str, weight: Tensor, layers: Sequence[tuple[Layer, float]]) -> Tensor:
    def read() -> np.ndarray:
        own = weight.read().astype(np.float32)
        total = own.copy() if any(layer.magnitude is not None for layer, _ in layers[1:]) else own
        # What is not finite is found below, where it can be named.
        with np.errstate(all="ignore"):
            for layer, scale in layers:
                up, down = (_float32(t, module) for t in (layer.up, layer.down))
                change = (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(weight.shape)
                change *= np.float32(scale * layer.strength)
                if layer.magnitude is None:
                    total += change
                    continue
                # At the first layer `own` may be `total`, which nothing has changed yet.
                norm = np.linalg.norm((own + change).reshape(len(up), -1), axis=1)
                total += change
                total *= (_float32(layer.magnitude, module) / norm).reshape(-1, *_ones(weight.shape[1:]))
            merged = total.astype(weight.dtype)
        if not _is_finite(merged):
            raise ValueError(f"{module}: merged values overflow {weight.dtype}; give smaller scales or a wider dtype.")
        return merged

    return Tensor(weight.shape, weight.dtype, read)


def _float32(tensor: Tensor, module: str) -> np.ndarray:
    x = tensor.read().astype(np.float32)
    if not _is_finite(x):
        raise ValueError(f"{module}: the LoRA holds NaN or infinite values; it is damaged, or its training diverged.")
    return x


def _is_finite(x: np.ndarray) -> bool:
    # Several times as fast in float32 as in half precision.
    return bool(np.isfinite(x.astype(np.float32, copy=False)).all())


def write_kohya(lora: LoRA, unet: UNetConfig, file: Path) -> None:
    """Write what kohya's scripts, ComfyUI and A1111 load; every layer has its alpha."""
    tensors: Tensors = {}
    for module, layer in lora.layers.items():
        name, inner = kohya_name(module, unet), layer.down.shape[1:]
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = Tensor.of(_exact(_alpha_of(layer)))
        if layer.magnitude is not None:
            tensors[f"{name}.dora_scale"] = _shaped(layer.magnitude, (*layer.magnitude.shape, *_ones(inner)))
    ranks, alphas = {layer.rank for layer in lora.layers.values()}, {_alpha_of(x) for x in lora.layers.values()}
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        **_kept(lora.metadata),
        # A1111 takes a file for one of SDXL by these; kohya's own tools write Dynamic where layers differ.
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(_number(alphas.pop())) if len(alphas) == 1 else "Dynamic",
    }
    write_file(tensors, file, metadata=metadata)


def write_peft(lora: LoRA, file: Path) -> None:
    """Write what diffusers' `load_lora_weights` loads, with ranks and alphas where its `save_lora_weights` has them.

    Raises:
        ValueError: where only some layers of a part are DoRA, which PEFT's config cannot say.
    """
    tensors: Tensors = {}
    config: dict[str, Any] = {}
    for module, layer in lora.layers.items():
        tensors[f"{module}.lora_A.weight"] = layer.down
        tensors[f"{module}.lora_B.weight"] = layer.up
        if layer.magnitude is not None:
            kernel = layer.down.shape[2:]
            # PEFT has a convolution's along axis 1.
            shape = (1, *layer.magnitude.shape, *_ones(kernel)) if kernel else layer.magnitude.shape
            # PEFT loads it with and without `.weight` and saves it without, in which transformers 5 does not find it.
            end = "" if module.startswith("unet.") else ".weight"
            tensors[f"{module}.lora_magnitude_vector{end}"] = _shaped(layer.magnitude, shape)
    for part in KOHYA:
        start = f"{part}."
        layers = {name.removeprefix(start): x for name, x in lora.layers.items() if name.startswith(start)}
        if layers:
            config.update({f"{part}.{key}": value for key, value in _config(part, layers).items()})
    written = json.dumps(config, indent=2, sort_keys=True)
    write_file(tensors, file, metadata={**_kept(lora.metadata), "format": "pt", ADAPTER_METADATA: written})


def _config(part: str, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """PEFT's `LoraConfig` of one part."""
    dora = {layer.magnitude is not None for layer in layers.values()}
    if len(dora) > 1:
        raise ValueError(f"{part}: some layers are DoRA and some not, which PEFT cannot load; write kohya's format.")
    # transformers 5 has no `text_model.` in the first encoder, others do: what is without it fits the end of both.
    names = {path: path.removeprefix("text_model.") for path in layers}
    alphas = {path: _alpha_of(layer) for path, layer in layers.items()}
    r, alpha = (Counter(x).most_common(1)[0][0] for x in ([x.rank for x in layers.values()], alphas.values()))
    # PEFT takes a pattern for the end of any path; the UNet's are whole.
    mark = "^" if part == "unet" else ""
    return {
        "r": r,
        "lora_alpha": _number(alpha),
        "rank_pattern": {mark + names[path]: layer.rank for path, layer in layers.items() if layer.rank != r},
        "alpha_pattern": {mark + names[path]: _number(value) for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(names.values()),
        "use_dora": dora.pop(),
    }


def _alpha_of(layer: Layer) -> float:
    return float(layer.rank) if layer.alpha is None else layer.alpha


def _number(x: float) -> int | float:
    """4 for 4.0, as the files have it."""
    return int(x) if x == int(x) else x


def _exact(alpha: float) -> np.ndarray:
    """In float32 as kohya's scripts write it, or in float64 where that would round."""
    short = np.asarray(alpha, np.float32)
    return short if float(short) == alpha else np.asarray(alpha, np.float64)


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if not key.startswith(STALE)}
