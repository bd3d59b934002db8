"""Where each array of a state lies, from its path and shape alone; models know nothing of it."""

from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdxl_eqx.weights.names import is_stacked

T = TypeVar("T")

SMALL = 2**14
"""Arrays of fewer elements stay whole on every device: gathering them costs more than they take."""


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """fsdp on the longest axis that it divides, never on the depth of a stack; nothing for small arrays."""
    fsdp = mesh.shape["fsdp"]
    size = 1
    for n in shape:
        size *= n
    if fsdp == 1 or size < SMALL:
        return P()
    first = 1 if is_stacked(path) else 0
    axes = [i for i in range(first, len(shape)) if shape[i] % fsdp == 0]
    if not axes:
        return P()
    axis = max(axes, key=lambda i: (shape[i], i))
    return P(*("fsdp" if i == axis else None for i in range(axis + 1)))


def shardings(tree: T, mesh: Mesh) -> T:
    """The sharding of each array of a state (or of its shapes); optimizer moments and averages like their parameter."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, spec(name, tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())
