"""Where a run goes on in its data, and what its batches say of the wait for them."""

import signal
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_eqx.data.batch import LatentBatch
from sdxl_eqx.parallel import hosts
from sdxl_eqx.training.feed import Batches, next_batch
from sdxl_eqx.training.setup import Run

STEP = 7


def run(position: dict[str, int], batch_size: int) -> Any:
    found: Any = object.__new__(Run)
    found.data_position, found.state = position, SimpleNamespace(step=np.int32(STEP))
    found.program = SimpleNamespace(batch_size=batch_size)
    return found


def test_a_run_goes_on_at_the_batch_after_those_it_was_given():
    assert next_batch(run({"next_batch": 9, "batch_size": 4}, 4)) == 9


def test_a_run_with_another_batch_size_goes_on_after_as_many_samples():
    assert next_batch(run({"next_batch": 9, "batch_size": 4}, 6)) == 6
    assert next_batch(run({"next_batch": 9, "batch_size": 4}, 2)) == 18


def test_a_run_that_saved_no_position_goes_on_at_the_batch_of_its_step():
    assert next_batch(run({}, 4)) == STEP


def batches(read, *, position=0, is_one=False) -> Batches:
    return Batches(iter(read, None), position, is_one=is_one)


def first(one: Batches) -> float:
    batch = one.next()
    assert isinstance(batch, LatentBatch)
    return float(batch.mean[0, 0, 0, 0])


def arrays(n: int) -> dict[str, np.ndarray]:
    moments, text = np.full((1, 2, 2, 4), n, np.float32), np.zeros((1, 77, 8), np.float32)
    return {"mean": moments, "logvar": moments, "context": text, "pooled": text[:, 0], "time_ids": text[:, 0, :6]}


def test_batches_count_on_from_their_position_and_say_how_long_they_were_waited_for():
    given = iter(range(5))

    def read():
        time.sleep(0.05)
        return arrays(next(given))

    one = batches(read, position=3)
    assert [first(one) for _ in range(3)] == [0, 1, 2]
    assert one.next_index == 6
    assert 0.15 <= one.waited < 1.0


def test_the_first_batch_comes_again_and_again_where_it_is_asked_for():
    given = iter(range(5))
    one = batches(lambda: arrays(next(given)), is_one=True)
    assert [first(one) for _ in range(3)] == [0, 0, 0]


def test_of_several_processes_one_without_more_batches_goes_on_with_its_last_and_has_all_stop(monkeypatch):
    given, killed = iter(range(2)), []

    def read():
        n = next(given, None)
        if n is None:
            raise ValueError("too many samples are bad")
        return arrays(n)

    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr("os.kill", lambda process, number: killed.append(number))
    one = batches(read)
    assert [first(one) for _ in range(4)] == [0, 1, 1, 1]
    assert killed == [signal.SIGTERM]
    with pytest.raises(ValueError, match="too many samples are bad"):
        one.raise_failure()


def test_alone_a_process_without_more_batches_ends(monkeypatch):
    def read():
        raise ValueError("too many samples are bad")

    with pytest.raises(ValueError, match="too many samples are bad"):
        batches(read).next()
