"""An endless, seeded, resumable stream of batches (grain), and the account of what could not be read."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.batch import Batch, LatentBatch
from sdxl_eqx.data.sources import Example
from sdxl_eqx.data.tokenizer import Tokenizers, tokenize
from sdxl_eqx.data.transforms import BadPicture, read_picture, resize_and_crop

Arrays = dict[str, np.ndarray]
Read = Callable[[Any, np.random.Generator], Arrays]
"""Turns one item of a source into arrays; raises `BadPicture` for one that cannot be used."""

logger = logging.getLogger("sdxl_eqx")


class BadItems:
    """The items that could not be read, each logged once; too many of them end the run.

    Args:
        total: how many items there are.
        max_fraction: the share of them that may be bad (ten may be in any case).
    """

    def __init__(self, total: int, max_fraction: float):
        self.total = total
        self.limit = max(10, max_fraction * total)
        self.max_fraction = max_fraction
        self.reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        """How many distinct items were bad so far."""
        return len(self.reasons)

    def add(self, bad: BadPicture) -> None:
        """Count a bad item, if it is a new one.

        Raises:
            ValueError: more than max(10, max_fraction x all) are bad, or all are.
        """
        if bad.name in self.reasons:
            return
        self.reasons[bad.name] = bad.reason
        logger.warning("skipped %s: %s", bad.name, bad.reason)
        if self.count > self.limit or self.count >= self.total:
            raise self.error()

    def error(self) -> ValueError:
        """Says how many are bad, how many may be, and which come first."""
        first = "; ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:3])
        return ValueError(
            f"{self.count} of {self.total} pictures cannot be read, at most max(10, {self.max_fraction} x {self.total})"
            f" may be, and never all: {first}. Repair them, take them out of metadata.jsonl, "
            "or allow more with --max-bad-fraction"
        )


def make_stream(
    source: Sequence[Any] | grain.sources.RandomAccessDataSource[Any],
    read: Read,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    num_threads: int,
    rows: Sequence[int] | None = None,
    bad: BadItems,
) -> grain.DatasetIterator[Arrays]:
    """Batches for ever, each epoch in another order; of each, the `rows` that this process feeds (all by default).

    One sequence of samples follows from `seed` alone, cut into batches of `batch_size`. A sample's random draws depend
    on the seed and its place in that sequence, not on threads or processes. `get_state()` is JSON-able, and
    `set_state()` of it continues bit for bit. Bad items are skipped and counted as they are passed: the process's next
    sample takes their place.

    Raises (while iterating):
        ValueError: too many items are bad, as `BadItems` says.
    """

    def read_or_bad(item: Any, rng: np.random.Generator) -> Arrays | BadPicture:
        try:
            return read(item, rng)
        except BadPicture as error:
            return error

    samples = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        samples = samples.shuffle()
    samples = samples.repeat().random_map(read_or_bad)
    rows = range(batch_size) if rows is None else rows
    size = len(rows)

    def mine(i: int) -> Arrays | BadPicture:
        item = samples[i // size * batch_size + rows[i % size]]
        assert item is not None  # it is only where a filter stands before
        return item

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, 2 * size))
    own = grain.MapDataset.range(len(samples) // batch_size * size).map(mine).to_iter_dataset(options)
    return iter(own.filter(_Good(bad, len(source))).batch(size, drop_remainder=True))


def position_after(batches: int, size: int) -> dict[str, Any]:
    """The state of a stream that gave so many batches of `size` rows and met no bad items."""
    return {"next_index": batches * size}


class _Good:
    """Drops bad items in the consumer's thread, so that what is counted does not depend on prefetching."""

    def __init__(self, bad: BadItems, epoch: int):
        self.bad = bad
        self.epoch = epoch
        self.in_a_row = 0

    def __call__(self, item: Arrays | BadPicture) -> bool:
        if not isinstance(item, BadPicture):
            self.in_a_row = 0
            return True
        self.bad.add(item)
        self.in_a_row += 1
        if self.in_a_row >= self.epoch:  # this process's share may be all bad where the whole is not
            raise self.bad.error()
        return False


def picture_reader(config: DataConfig, tokenizers: Tokenizers) -> Read:
    """Reads an `Example` into the fields of a `Batch`, with random crop, flip and caption dropout by the config."""

    def read(item: Example, rng: np.random.Generator) -> Arrays:
        flip = config.random_flip and rng.random() < 0.5
        caption = "" if rng.random() < config.caption_dropout else item.caption
        picture = read_picture(item.path)
        pixels, time_ids = resize_and_crop(
            picture, config.resolution, center_crop=config.center_crop, flip=flip, rng=rng
        )
        (input_ids,), (input_ids_2,) = (tokenize(tokenizer, [caption])[0] for tokenizer in tokenizers)
        return {"pixels": pixels, "input_ids": input_ids, "input_ids_2": input_ids_2, "time_ids": time_ids}

    return read


def to_batch(arrays: Arrays) -> Batch | LatentBatch:
    """The batch type whose fields the arrays are.

    Raises:
        ValueError: they are the fields of neither.
    """
    for kind in (Batch, LatentBatch):
        if {field.name for field in dataclasses.fields(kind)} == arrays.keys():
            return kind(**arrays)
    raise ValueError(f"arrays must be the fields of Batch or of LatentBatch, not {sorted(arrays)}")
