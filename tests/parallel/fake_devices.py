"""Devices that are not here, for meshes of any size."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from sdxl_eqx.config import ParallelConfig
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import Layout


@dataclass(frozen=True)
class Device:
    """What JAX asks of a device when it makes a mesh."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0


def slices(count: int, *shape: int) -> list[Device]:
    """So many slices, each a grid of chips."""
    x, y, z = shape
    chips = itertools.product(range(count), range(z), range(y), range(x))
    return [Device(n, i, (x, y, z), process_index=i) for n, (i, z, y, x) in enumerate(chips)]


def layout(rules: Any = ParallelConfig.logical_axis_rules, **sizes: int) -> Layout:
    """A layout of these sizes of axes, on as many chips in a row."""
    inside: Any = {f"ici_{axis}_parallelism": n for axis, n in {"data": 1, **sizes}.items()}
    config = ParallelConfig(allow_split_physical_axes=True, **inside)
    return Layout(make_mesh(config, slices(1, math.prod(sizes.values()), 1, 1)), rules)
