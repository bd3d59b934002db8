"""Modules filled from tensors, and the files of one part of a diffusers folder."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from sdxl_eqx.weights.hub import PICKLES, STEMS
from sdxl_eqx.weights.names import Place, places
from sdxl_eqx.weights.tensors import FLOATS, Tensors, check_finite, open_file

M = TypeVar("M")

LEFT_OUT = ("logit_scale", "position_ids")
"""Last words of keys that files carry and no model here has a place for."""

STRANGERS = ("model_ema.", "alphas_cumprod", "betas", "sqrt_", "log_one_minus", "posterior_", "denoiser.", "logvar",
             "loss.")  # fmt: skip
"""Starts of keys of training code, which are no weights of the model."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: naming the file, where it is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; a diffusers folder of SDXL has it.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object.")
    return value


def weight_files(folder: Path, *, variant: str = "") -> list[Path]:
    """The safetensors of one part of a diffusers folder: one file, or the shards that its index names; [] if none.

    `variant` is the word in the names of other precisions, such as fp16.

    Raises:
        ValueError: where only a pickle is there, or a shard is missing.
    """
    for stem in STEMS:
        dotted = f".{variant}" if variant else ""
        single = folder / f"{stem}{dotted}.safetensors"
        index = folder / f"{stem}.safetensors.index{dotted}.json"
        if single.is_file():
            return [single]
        if index.is_file():
            shards = read_json(index).get("weight_map", {})
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise ValueError(f"{index}: its weight_map must name the file of each key; fetch it again.")
            names = sorted(set(shards.values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing or not names:
                raise ValueError(f"{index}: names shards that are not there ({missing}); fetch them.")
            return [folder / name for name in names]
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        asked = f"of variant {variant}" if variant else "without a variant"
        raise ValueError(f"{folder}: has no weights {asked} but {others[0]}; name its variant with --variant.")
    pickles = [p.name for p in folder.glob("*") if p.suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{folder}: only pickled weights ({pickles[0]}), which can run code when read and are never loaded; "
            "save the model again with safe_serialization=True in diffusers or transformers."
        )
    return []


Put = Callable[[Place, np.ndarray], Any]


def clip_key(key: str) -> str:
    """A text encoder's key as the published files have it: transformers 5 saves CLIPTextModel without `text_model.`."""
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def read_model(
    skeleton: M,
    files: Sequence[Path],
    *,
    dtype: Any,
    rename: Callable[[str], str] = str,
    put: Put | None = None,
) -> M:
    """`fill` from safetensors files in diffusers' names; `rename` turns a file's key into the published one.

    Raises:
        ValueError: for keys that are missing, unknown or held twice, wrong shapes, and files that are no safetensors.
    """
    tensors: Tensors = {}
    twice = []
    for file in files:
        for stored, tensor in open_file(file)[0].items():
            key = rename(stored)
            twice += [key] if key in tensors else []
            tensors[key] = tensor
    source = ", ".join(str(file) for file in files)
    check_keys(places(skeleton), tensors, twice=twice, source=source)
    return fill(skeleton, tensors, dtype=dtype, put=put, source=source)


def fill(skeleton: M, tensors: Tensors, *, dtype: Any, source: str, put: Put | None = None) -> M:
    """`skeleton` (shapes, as of `eqx.filter_eval_shape`) filled from tensors in diffusers' names.

    Arrays are read one after the other, cast to `dtype`, and given to `put` (by default onto JAX's default device), so
    that the host never holds a second copy of the model.

    Raises:
        ValueError: for keys that are missing or unknown, wrong shapes, and numbers that are not finite.
    """
    wanted = places(skeleton)
    check_keys(wanted, tensors, source=source)
    leaves = []
    for place in wanted:
        array = place.from_file({key: tensors[key].read() for key in place.keys}).astype(dtype)
        check_finite(array, f"{source}: {place.path}")
        leaves.append(put(place, array) if put else jax.numpy.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(skeleton), leaves)


def check_keys(wanted: Sequence[Place], where: Tensors, *, twice: Sequence[str] = (), source: str) -> None:
    """Check that `where` has what a model wants, in its shapes, and nothing else; `source` is named in the error.

    Raises:
        ValueError: naming what is missing, unknown, held twice or of another shape.
    """
    keys = {key for place in wanted for key in place.keys}
    unknown = sorted(key for key in where if key not in keys and key.split(".")[-1] not in LEFT_OUT)
    missing = sorted(keys - where.keys())
    for word, which in (("missing", missing), ("unknown", unknown), ("held twice", sorted(twice))):
        if which:
            shown = ", ".join(which[:5]) + (f" and {len(which) - 5} more" if len(which) > 5 else "")
            raise ValueError(
                f"{source}: {len(which)} keys {word}: {shown}. "
                "These weights are not of the model that config.json describes."
            )
    for place in wanted:
        for key in place.keys:
            if where[key].shape != place.shape:
                raise ValueError(
                    f"{source}: {key} has shape {where[key].shape}, the model's config says {place.shape}; config and "
                    "weights do not belong together (a file without a config is described by --config-from)."
                )
            if where[key].dtype not in FLOATS:
                raise ValueError(f"{source}: {key} has dtype {where[key].dtype}; weights are floating-point numbers.")
