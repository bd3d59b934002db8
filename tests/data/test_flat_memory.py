"""A stream for ever takes no more memory than its first batches."""

import ctypes
import gc
import os
from pathlib import Path

import numpy as np
import pytest

from sdxl_eqx.data.bad import BadItems
from sdxl_eqx.data.loader import Read, make_stream
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.sources.synthetic import Synthetic

BATCH = 4
BUCKETS = 3
GROWTH = 10e6
"""Bytes that may be told apart from none: of allocators and of the collector's moment."""


def resident() -> int:
    """Bytes of this process's own that lie in memory. Not of libraries: the system takes back pages of files that it
    can read again, and one run seemed to shrink by 15 MB meanwhile."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier tests freed would take in what is kept now
    _, pages, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (pages - of_files) * os.sysconf("SC_PAGE_SIZE")


def growth(read: Read, *, samples: int, count: int, warm: int) -> float:
    """Bytes that memory grows by while `count` records stream after the first `warm`."""
    order = Order(np.arange(samples) % BUCKETS, batch_size=BATCH, seed=0, shuffle=True)
    stream = make_stream(order, read, seed=0, num_threads=2, bad=BadItems(samples, 0.0))
    visits = np.zeros(samples, int)

    def take(records: int) -> int:
        for _ in range(records // BATCH):
            np.add.at(visits, next(stream)["item"], 1)
        return resident()

    before = take(warm)
    after = take(count)
    stream.close()
    # All of them were read, epoch after epoch.
    assert visits.sum() == warm + count and np.ptp(visits) <= 2 and visits.min() >= (warm + count) // samples - 1
    return after - before


def large(sample: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A record of 16 KB."""
    return {"item": np.array(sample), "pixels": np.full((64, 64, 4), sample % 256, np.uint8)}


def test_records_over_many_epochs_leave_memory_as_it_was_after_the_first_ones():
    assert growth(large, samples=3_000, count=16_000, warm=2_000) < GROWTH  # of 256 MB


def test_what_a_reader_keeps_is_noticed():
    """The measurement itself."""
    kept = []

    def keeping(sample: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        record = large(sample, rng)
        if sample % 2:
            kept.append(record["pixels"])
        return record

    assert growth(keeping, samples=3_000, count=3_000, warm=600) > GROWTH


@pytest.mark.slow
def test_200_000_synthetic_records_leave_memory_as_it_was_after_the_first_20_000():
    source = Synthetic(70_000, 8, seed=0)

    def read(sample: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        data = np.frombuffer(source.picture(sample), np.uint8)
        caption = np.array(source.captions(sample)[0], "U40")
        return {"item": np.array(sample), "data": data, "caption": caption, "draw": rng.random(8)}

    assert growth(read, samples=len(source), count=180_000, warm=20_000) < GROWTH
