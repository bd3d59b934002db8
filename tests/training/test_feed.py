"""Where a run goes on in its data, and what its batches say of the wait for them."""

import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.data.batch import LatentBatch
from sdxl_eqx.data.buckets import one_bucket
from sdxl_eqx.data.loader import picture_reader
from sdxl_eqx.data.sources.synthetic import Synthetic
from sdxl_eqx.data.tokenizer import bundled_tokenizers
from sdxl_eqx.flags import merge
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training import feed as feeding
from sdxl_eqx.training.feed import Batches, feed, next_batch
from sdxl_eqx.training.inputs import Inputs
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


class Encoded:
    """A cache in whose place pictures are read anew."""

    usable = np.ones(8, bool)

    def reader(self, source, tokenizers, *, with_control):
        data = TrainConfig().data
        return picture_reader(source, tokenizers, data, lambda sample: (16, 16), with_control=with_control)


def fed(monkeypatch, *, weights: Any = None, **values: Any) -> dict[str, np.ndarray]:
    """The first batch of 4 of 8 samples."""
    config = merge(TrainConfig(), {"resolution": 16, "dataset_save_location": "cache", **values})
    parts = object.__new__(ModelParts)
    object.__setattr__(parts, "tokenizers", bundled_tokenizers())
    found = run({}, 4)
    found.config, found.encoders, found.state = config, None, SimpleNamespace(step=np.int32(0))
    found.inputs = Inputs(Synthetic(8, 20, 0), parts, np.zeros(0, int), weights)
    found.program.layout, found.program.encoding, found.program.batch_sharding = object.__new__(Layout), None, None
    found.program.is_encoded, found.folder = True, SimpleNamespace(path=Path("nowhere"))
    monkeypatch.setattr(feeding, "own_rows", lambda sharding, size: range(size))
    looked = lambda *args, **options: (None, one_bucket(np.ones(8, bool), 16))  # noqa: E731
    monkeypatch.setattr(feeding, "look_at", looked)
    monkeypatch.setattr(hosts, "to_host", lambda tree: tree)
    encoding = SimpleNamespace(cached=lambda *args, **options: Encoded())
    monkeypatch.setattr(feeding, "Encoding", lambda *args: encoding)
    return next(feed(found).stream)


@pytest.mark.parametrize("cached", [False, True])
def test_a_controlnet_s_batches_have_what_it_sees_and_others_do_not(monkeypatch, cached):
    values = {"cache_latents_text_encoder_outputs": cached}
    batch = fed(monkeypatch, train_controlnet=True, **values)
    np.testing.assert_array_equal(batch["control"], batch["pixels"])  # of noise the picture itself
    assert not {"control", "weight"} & fed(monkeypatch, **values).keys()


@pytest.mark.parametrize("cached", [False, True])
def test_samples_of_unequal_weight_bring_it(monkeypatch, cached):
    weights = np.linspace(0, 1, 8, dtype=np.float32)
    batch = fed(monkeypatch, weights=weights, enable_data_shuffling=False, cache_latents_text_encoder_outputs=cached)
    np.testing.assert_array_equal(batch["weight"], weights[:4])
