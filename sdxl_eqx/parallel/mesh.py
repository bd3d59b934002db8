"""The mesh of devices, and how many samples a step of it takes."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdxl_eqx.config import ParallelConfig

BATCH = P(("data", "fsdp"))
"""The batch axis is shared by both axes of the mesh."""


def make_mesh(config: ParallelConfig, devices: Sequence[Any]) -> Mesh:
    """A mesh of axes data and fsdp over all devices; one -1 takes what the other leaves.

    Raises:
        ValueError: where the axes do not multiply to the number of devices.
    """
    sizes = {"data": config.ici_data_parallelism, "fsdp": config.ici_fsdp_parallelism}
    flags = ", ".join(f"--ici-{name}-parallelism {size}" for name, size in sizes.items())
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"{flags}: each must be above 0, or one of them -1 to take the rest.")
    known = 1
    for size in sizes.values():
        known *= max(size, 1)
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    if shape[0] * shape[1] != len(devices):
        raise ValueError(f"{flags}: do not multiply to the {len(devices)} devices here; set one of them to -1.")
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def global_batch_size(per_device: float, mesh: Mesh) -> int:
    """Samples of one step over all devices.

    Raises:
        ValueError: where that is not whole, or does not divide over the devices that share the batch.
    """
    size = per_device * mesh.size
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if size != int(size) or int(size) % shares:
        raise ValueError(
            f"--per-device-batch-size {per_device:g}: makes {size:g} samples a step on {mesh.size} devices, which "
            f"{shares} devices (data x fsdp) cannot share evenly; use a whole number."
        )
    return int(size)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: its first axis over data and fsdp."""
    return NamedSharding(mesh, BATCH)
