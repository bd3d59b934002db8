"""Where a run goes on in its data."""

from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_eqx.parallel import hosts
from sdxl_eqx.training import feed
from sdxl_eqx.training.setup import Run

STEP = 7


def went_on(monkeypatch: pytest.MonkeyPatch, positions: list[dict[str, Any]], rows: list[list[int]]) -> list[Any]:
    """Where the stream of each process of a run is put, whose positions were saved, if they now feed these rows."""
    found = []
    count = len(rows)
    monkeypatch.setattr(feed.jax, "process_count", lambda: count)
    for process in range(count):
        run: Any = object.__new__(Run)
        run.data_positions, run.state = positions, SimpleNamespace(step=STEP)
        monkeypatch.setattr(feed.jax, "process_index", lambda process=process: process)
        alike = [len(positions) == count and (count == 1 or positions[i]["rows"] == rows[i]) for i in range(count)]

        def gather(same: bool, process: int = process, alike: list[bool] = alike) -> list[bool]:
            assert same == alike[process]
            return alike

        monkeypatch.setattr(hosts, "gather_json", gather)
        stream = SimpleNamespace(set_state=found.append)
        feed._go_on(stream, run, rows[process])
    return found


def at(index: int, *rows: int) -> dict[str, Any]:
    return {"stream": {"next_index": index}, "rows": list(rows)}


def test_processes_that_feed_the_same_rows_go_on_where_each_was(monkeypatch):
    assert went_on(monkeypatch, [at(15, 0, 1), at(14, 2, 3)], [[0, 1], [2, 3]]) == [
        {"next_index": 15},
        {"next_index": 14},
    ]


def test_one_process_goes_on_where_it_was_whatever_its_batch(monkeypatch):
    assert went_on(monkeypatch, [at(29, 0, 1, 2, 3)], [[0, 1]]) == [{"next_index": 29}]


@pytest.mark.parametrize(
    ("positions", "rows"),
    [
        ([at(15, 0, 1), at(14, 2, 3)], [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ([at(15, 0, 1), at(14, 2, 3)], [[0, 1, 2, 3]]),
        ([at(29, 0, 1, 2, 3)], [[0, 1], [2, 3]]),
        ([at(15, 0, 1), at(14, 2, 3)], [[0, 1], [2]]),
    ],
)
def test_processes_that_feed_other_rows_all_go_on_after_the_batches_of_its_steps(monkeypatch, positions, rows):
    assert went_on(monkeypatch, positions, rows) == [{"next_index": STEP * len(own)} for own in rows]
