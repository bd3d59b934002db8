"""Which rows of a batch each process feeds, on meshes of devices that are not here."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from fake_devices import Device

from sdxl_eqx.config import ParallelConfig
from sdxl_eqx.parallel.mesh import batch_sharding, make_mesh, own_rows

AXES = ("data", "fsdp", "context", "tensor")


@dataclass(frozen=True)
class Seen(Device):
    """A device as the process `here` sees it."""

    here: int = 0

    @property
    def client(self) -> Any:
        """What knows which process this is."""
        return SimpleNamespace(process_index=lambda: self.here)


def rows(processes: int, each: int, batch_size: int, **options: Any) -> list[list[int]]:
    """The rows of each process, of so many with so many devices; `options` are those of the mesh."""
    found = []
    for here in range(processes):
        devices = [Seen(n, 0, (n, 0, 0), n // each, "gpu", "any", here=here) for n in range(processes * each)]
        mesh = make_mesh(ParallelConfig(**options), devices)
        found.append(own_rows(batch_sharding(mesh, AXES, batch_size), batch_size))
    return found


@pytest.mark.parametrize(
    ("processes", "each", "batch_size"), [(2, 1, 2), (2, 4, 8), (4, 2, 16), (3, 2, 12), (8, 1, 8), (1, 8, 8)]
)
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_processes_that_share_the_batch_feed_each_row_once_and_in_order(processes, each, batch_size, axis):
    sizes = {"ici_data_parallelism": 1, f"ici_{axis}_parallelism": -1}
    found = rows(processes, each, batch_size, **sizes)
    assert [row for own in found for row in own] == list(range(batch_size))
    assert {len(own) for own in found} == {batch_size // processes}


def test_processes_whose_devices_hold_the_same_rows_feed_the_same():
    sizes = {"ici_data_parallelism": 2, "ici_context_parallelism": 4}
    assert rows(4, 2, 2, **sizes) == [[0], [0], [1], [1]]
    assert rows(2, 2, 1, ici_data_parallelism=1, ici_tensor_parallelism=4) == [[0], [0]]


def test_rows_that_do_not_lie_together_are_still_in_the_order_of_the_batch():
    order = ("fsdp", "data", "context", "tensor")
    found = rows(2, 2, 8, mesh_axes=order, ici_data_parallelism=2, ici_fsdp_parallelism=2)
    assert found == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_one_process_feeds_all_rows_of_its_devices():
    mesh = make_mesh(ParallelConfig(ici_fsdp_parallelism=2), jax.devices())
    for batch_size in (16, 8, 4, 1):
        assert own_rows(batch_sharding(mesh, AXES, batch_size), batch_size) == list(range(batch_size))
