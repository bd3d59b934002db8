"""Which key of a file holds which part of which array: attribute paths are diffusers' keys but for what is here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

M = TypeVar("M")

STACKS = ("transformer_blocks", "layers")
"""Attributes that hold a stack of blocks: slice i of axis 0 is `NAME.{i}.` in files."""


def is_stacked(path: str) -> bool:
    """Whether the array at that path has a leading axis of depth."""
    return any(part in STACKS for part in path.split("."))


@dataclass(frozen=True)
class Place:
    """One array of a model: the keys that fill it (one a slice of axis 0 if stacked) and its shape in the file."""

    path: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    """Of one key's tensor, in the file's layout."""
    stacked: bool

    def to_file(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The file's tensors of this array."""
        slices = list(array) if self.stacked else [array]
        return {key: self.one_to_file(part) for key, part in zip(self.keys, slices, strict=True)}

    def one_to_file(self, part: np.ndarray) -> np.ndarray:
        """One key's tensor, of the whole array or of one slice of a stack."""
        return _swap(part, to_file=True)

    def from_file(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The array of these tensors."""
        parts = [_swap(tensors[key], to_file=False) for key in self.keys]
        return np.stack(parts) if self.stacked else parts[0]


def _swap(x: np.ndarray, *, to_file: bool) -> np.ndarray:
    """Convolutions are HWIO here and OIHW in files; all else is stored as it is."""
    if x.ndim != 4:
        return x
    return x.transpose(3, 2, 0, 1) if to_file else x.transpose(2, 3, 1, 0)


def places(model: Any, *, prefix: str = "") -> list[Place]:
    """Where each array of a model (or of its `jax.eval_shape`) lies in a diffusers file, in tree order."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part in STACKS), None)
        shape = tuple(leaf.shape)
        if at is None:
            keys: tuple[str, ...] = (prefix + name,)
        else:
            keys = tuple(prefix + ".".join([*parts[: at + 1], str(i), *parts[at + 1 :]]) for i in range(shape[0]))
            shape = shape[1:]
        if len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        found.append(Place(name, keys, shape, stacked=at is not None))
    return found
