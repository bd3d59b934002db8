import jax
import numpy as np
import pytest

from sdxl_eqx.config import ParallelConfig
from sdxl_eqx.parallel.mesh import batch_sharding, global_batch_size, make_mesh


def mesh(data: int, fsdp: int):
    return make_mesh(ParallelConfig(ici_data_parallelism=data, ici_fsdp_parallelism=fsdp), jax.devices())


@pytest.mark.parametrize(
    ("asked", "shape"),
    [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((1, 8), (1, 8)), ((8, -1), (8, 1))],
)
def test_one_axis_may_take_the_rest(asked, shape):
    found = mesh(*asked)
    assert tuple(found.shape.items()) == (("data", shape[0]), ("fsdp", shape[1]))
    assert set(found.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("asked", [(-1, 3), (2, 2), (16, 1), (-1, 16), (3, -1)])
def test_a_mesh_that_the_devices_do_not_fill_is_refused(asked):
    flags = f"--ici-data-parallelism {asked[0]}, --ici-fsdp-parallelism {asked[1]}"
    with pytest.raises(ValueError, match=f"{flags}: do not multiply to the 8 devices here; set one of them to -1"):
        mesh(*asked)


@pytest.mark.parametrize("asked", [(-1, -1), (0, 8), (-2, 4)])
def test_a_size_without_meaning_is_refused(asked):
    with pytest.raises(ValueError, match="must be above 0, or one of them -1"):
        mesh(*asked)


@pytest.mark.parametrize(("per_device", "expected"), [(2.0, 16), (1.0, 8), (1.5, 12), (0.5, 4)])
def test_the_global_batch_is_that_of_all_devices_where_they_can_share_it(per_device, expected):
    if expected % 8 == 0:
        assert global_batch_size(per_device, mesh(2, 4)) == expected
        return
    with pytest.raises(ValueError, match=rf"--per-device-batch-size {per_device:g}: makes {expected} samples"):
        global_batch_size(per_device, mesh(2, 4))


def test_a_batch_that_is_not_whole_is_refused():
    with pytest.raises(ValueError, match=r"--per-device-batch-size 0\.3: makes 2\.4 samples a step on 8 devices"):
        global_batch_size(0.3, mesh(8, 1))


def test_each_device_holds_its_share_of_a_batch():
    x = jax.device_put(np.arange(16 * 3).reshape(16, 3), batch_sharding(mesh(2, 4)))
    rows = sorted(int(shard.data[0, 0]) // 3 for shard in x.addressable_shards)
    assert rows == list(range(0, 16, 2))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
