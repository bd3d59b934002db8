from typing import Any

import jax
import numpy as np
import pytest
from fake_devices import slices

from sdxl_eqx.config import ParallelConfig
from sdxl_eqx.parallel.mesh import batch_sharding, global_batch_size, make_mesh

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")


def mesh(data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices: Any = None, **options: Any):
    """A mesh of these ici_ sizes over the devices, by default those here."""
    config = ParallelConfig(
        ici_data_parallelism=data,
        ici_fsdp_parallelism=fsdp,
        ici_context_parallelism=context,
        ici_tensor_parallelism=tensor,
        **options,
    )
    return make_mesh(config, jax.devices() if devices is None else devices)


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ((-1, 1, 1, 1), (8, 1, 1, 1)),
        ((-1, 4, 1, 1), (2, 4, 1, 1)),
        ((2, -1, 1, 1), (2, 4, 1, 1)),
        ((1, 8, 1, 1), (1, 8, 1, 1)),
        ((8, -1, 1, 1), (8, 1, 1, 1)),
        ((-1, 2, 2, 2), (1, 2, 2, 2)),
        ((1, 2, -1, 1), (1, 2, 4, 1)),
        ((2, 1, 2, -1), (2, 1, 2, 2)),
    ],
)
def test_one_axis_may_take_the_rest(asked, shape):
    found = mesh(*asked)
    assert tuple(found.shape.items()) == tuple(zip(AXES, shape, strict=True))
    assert set(found.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("asked", [(-1, 3), (2, 2), (16, 1), (-1, 16), (3, -1)])
def test_a_mesh_that_the_devices_do_not_fill_is_refused(asked):
    flags = ", ".join(f"--ici-{axis}-parallelism {n}" for axis, n in zip(AXES, asked, strict=False) if n != 1)
    with pytest.raises(
        ValueError, match=f"^{flags}: do not multiply to the 8 devices here; (set one of them to -1|they must divide 8)"
    ):
        mesh(*asked)


def test_axes_of_one_device_alone_are_named_too():
    with pytest.raises(ValueError, match=r"^all --ici- sizes 1: do not multiply to the 8 devices here; set"):
        mesh(data=1)


def test_each_axis_has_its_slices_outermost_and_its_devices_of_one_slice_within():
    found = mesh(-1, 2, devices=slices(2, 2, 2, 1), dcn_data_parallelism=1, dcn_fsdp_parallelism=2)
    assert dict(found.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    at = np.vectorize(lambda device: device.slice_index)(found.devices)[:, :, 0, 0]
    np.testing.assert_array_equal(at, [[0, 0, 1, 1], [0, 0, 1, 1]])
    assert {device.id for device in found.devices.flat} == set(range(8))


def test_by_default_each_slice_is_a_part_of_data_and_holds_everything():
    found = mesh(1, -1, devices=slices(2, 2, 2, 1))
    assert dict(found.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    for i, one in enumerate(found.devices):
        assert {device.slice_index for device in one.flat} == {i}


def test_each_network_has_a_rest_of_its_own():
    options = {"dcn_data_parallelism": 2, "dcn_context_parallelism": -1}
    found = mesh(1, -1, tensor=2, devices=slices(4, 2, 2, 1), **options)
    assert dict(found.shape) == {"data": 2, "fsdp": 2, "context": 2, "tensor": 2}
    at = np.vectorize(lambda device: device.slice_index)(found.devices)
    assert all(len(set(at[i, :, j].flat)) == 1 for i in range(2) for j in range(2))
    assert len(set(at[:, 0, :, 0].flat)) == 4


@pytest.mark.parametrize("count", [1, 2])
def test_the_axes_may_be_in_another_order(count):
    order = ("tensor", "data", "context", "fsdp")
    found = mesh(
        -1, 2, mesh_axes=order, devices=slices(count, 2, 2, 1), dcn_data_parallelism=1, dcn_fsdp_parallelism=-1
    )
    assert tuple(found.shape.items()) == (("tensor", 1), ("data", 2), ("context", 1), ("fsdp", 2 * count))


@pytest.mark.parametrize(
    ("count", "options", "says"),
    [
        (
            1,
            {"dcn_data_parallelism": 2},
            "--dcn-data-parallelism 2: do not multiply to the 1 slice here; leave them out",
        ),
        (
            1,
            {"dcn_fsdp_parallelism": 4},
            "--dcn-data-parallelism -1, --dcn-fsdp-parallelism 4: do not multiply to the 1 slice here; leave them out",
        ),
        (
            2,
            {"dcn_data_parallelism": 1},
            "all --dcn- sizes 1: do not multiply to the 2 slices here; set one of them to -1",
        ),
        (
            2,
            {"dcn_tensor_parallelism": 3},
            "--dcn-data-parallelism -1, --dcn-tensor-parallelism 3: do not multiply to the 2 slices here; they must",
        ),
        (
            2,
            {"fsdp": 8},
            "--ici-data-parallelism -1, --ici-fsdp-parallelism 8: do not multiply to the 4 devices of a slice",
        ),
    ],
)
def test_slices_that_the_sizes_do_not_fill_are_refused(count, options, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        mesh(devices=slices(count, 2, 2, 1), **options)


@pytest.mark.parametrize("count", [1, 2])
def test_an_axis_takes_part_of_a_physical_axis_only_where_that_is_allowed(count):
    devices = slices(count, 4, 4, 1)
    with pytest.raises(ValueError, match=r"a mesh of 2 x 2 x 1 x 4 .* add --allow-split-physical-axes"):
        mesh(2, 2, tensor=4, devices=devices)
    found = mesh(2, 2, tensor=4, devices=devices, allow_split_physical_axes=True)
    assert dict(found.shape) == {"data": 2 * count, "fsdp": 2, "context": 1, "tensor": 4}


@pytest.mark.parametrize(("per_device", "expected"), [(2.0, 16), (1.0, 8), (1.5, 12), (0.5, 4)])
def test_the_global_batch_is_that_of_all_devices_where_they_can_share_it(per_device, expected):
    if expected % 8 == 0:
        assert global_batch_size(per_device, mesh(2, 4), BATCH) == expected
        return
    with pytest.raises(ValueError, match=rf"--per-device-batch-size {per_device:g}: makes {expected} samples"):
        global_batch_size(per_device, mesh(2, 4), BATCH)


@pytest.mark.parametrize(
    ("per_device", "sizes", "axes", "expected"),
    [
        (0.5, {"data": 4, "context": 2}, BATCH, 4),
        (0.25, {"data": 2, "context": 2, "tensor": 2}, BATCH, 2),
        (0.125, {"context": 8, "data": 1}, BATCH, 1),
        (0.5, {"data": 2, "fsdp": 4}, ("data",), 4),
        (0.375, {"data": 1, "tensor": 8}, (), 3),
    ],
)
def test_axes_that_do_not_share_the_batch_allow_parts_of_a_sample_a_device(per_device, sizes, axes, expected):
    assert global_batch_size(per_device, mesh(**sizes), axes) == expected


@pytest.mark.parametrize(
    ("per_device", "sizes", "says"),
    [
        (0.3, {"data": 8}, r"0\.3: makes 2\.4 samples a step on 8 devices, which 8 devices \(data x fsdp\)"),
        (
            0.25,
            {"data": 4, "context": 2},
            r"0\.25: makes 2 samples a step on 8 devices, which 4 devices \(data x fsdp\)",
        ),
    ],
)
def test_a_batch_that_is_not_whole_or_not_shared_evenly_is_refused(per_device, sizes, says):
    with pytest.raises(ValueError, match=f"^--per-device-batch-size {says} cannot share evenly; use a whole number"):
        global_batch_size(per_device, mesh(**sizes), BATCH)


def test_each_device_holds_its_share_of_a_batch():
    x = jax.device_put(np.arange(16 * 3).reshape(16, 3), batch_sharding(mesh(2, 4), AXES, 16))
    rows = sorted(int(shard.data[0, 0]) // 3 for shard in x.addressable_shards)
    assert rows == list(range(0, 16, 2))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(
    ("batch_size", "axes", "shares"),
    [
        (8, AXES, AXES),
        (4, AXES, ("data", "fsdp", "context")),
        (2, AXES, ("data", "fsdp")),
        (6, AXES, ("data", "fsdp")),
        (3, AXES, ("data",)),
        (2, ("tensor", "context", "data"), ("tensor",)),
        (1, ("tensor",), ()),
    ],
)
def test_axes_that_do_not_divide_a_batch_are_left_out_from_the_last_on(batch_size, axes, shares):
    found = batch_sharding(mesh(1, 2, 2, 2), axes, batch_size)
    assert found.spec == jax.sharding.PartitionSpec(shares)
    size = int(np.prod([found.mesh.shape[axis] for axis in shares], dtype=int))
    assert found.shard_shape((batch_size,)) == (batch_size // size,)
