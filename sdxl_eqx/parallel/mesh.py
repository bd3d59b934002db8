"""The mesh of devices, and how many samples a step of it takes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdxl_eqx.config import MeshConfig


def slice_count(devices: Iterable[Any]) -> int:
    """How many slices these devices are of; 1 where they have none."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """A mesh of the axes data, fsdp, context and tensor over all devices.

    The ici_ sizes are of the fast network inside a slice (a TPU slice; the GPUs of a host), the dcn_ sizes over
    slices; each axis is the product of its two. In either group one -1 takes what the others leave.

    Raises:
        ValueError: where sizes do not multiply to the devices of a slice, or to the number of slices, or do not fit a
            TPU's physical axes.
    """
    slices = slice_count(devices)
    inside = _sizes(config, "ici", len(devices) // slices, "devices here" if slices == 1 else "devices of a slice")
    across = _sizes(config, "dcn", slices, "slice here" if slices == 1 else "slices here")
    split = config.allow_split_physical_axes
    try:
        if slices == 1:
            grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=split)
        else:
            grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=split)
    except NotImplementedError as error:
        raise ValueError(
            f"a mesh of {' x '.join(map(str, inside))} does not fit the physical axes of these TPUs "
            f"({str(error).splitlines()[0][:200]}); add --allow-split-physical-axes, or choose other sizes."
        ) from error
    return Mesh(grid, config.mesh_axes, axis_types=(AxisType.Auto,) * len(config.mesh_axes))


def describe(mesh: Mesh) -> str:
    """The devices and how they share the work: `8 tpu (data 2 x fsdp 4)`."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} {mesh.devices.flat[0].platform}{f' ({axes})' if axes else ''}"


def _sizes(config: MeshConfig, network: str, count: int, what: str) -> tuple[int, ...]:
    """The sizes of the axes on one of the networks."""
    sizes = {axis: getattr(config, f"{network}_{axis}_parallelism") for axis in config.mesh_axes}
    flags = ", ".join(f"--{network}-{axis}-parallelism {size}" for axis, size in sizes.items() if size != 1)
    known = math.prod(size for size in sizes.values() if size != -1)
    found = tuple(count // known if size == -1 else size for size in sizes.values())
    if math.prod(found) != count:
        remedy = "set one of them to -1" if -1 not in sizes.values() else f"they must divide {count}"
        if network == "dcn" and count == 1:
            remedy = "leave them out"
        raise ValueError(f"{flags or f'all --{network}- sizes 1'}: do not multiply to the {count} {what}; {remedy}.")
    return found


def global_batch_size(per_device: float, mesh: Mesh, axes: Sequence[str]) -> int:
    """Samples of one step: so many for each device, though only `axes` share them.

    Raises:
        ValueError: where that is not whole, or does not divide over the devices that share it.
    """
    size = per_device * mesh.size
    shares = math.prod(mesh.shape[axis] for axis in axes)
    if size != int(size) or int(size) % shares:
        raise ValueError(
            f"--per-device-batch-size {per_device:g}: makes {size:g} samples a step on {mesh.size} devices, which "
            f"{shares} devices ({' x '.join(axes) or 'one'}) cannot share evenly; use a whole number."
        )
    return int(size)


def own_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, which are those that it feeds."""
    index = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for slices in index if slices is not None for row in range(batch_size)[slices[0]]})


def batch_sharding(mesh: Mesh, axes: Sequence[str], batch_size: int) -> NamedSharding:
    """How a batch is spread as it is read: over `axes`, without the last ones until they divide it."""
    while batch_size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return NamedSharding(mesh, P(tuple(axes)))
