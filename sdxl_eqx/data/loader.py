"""An endless, seeded, resumable stream of batches (grain)."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jaxtyping import Float32

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.bad import BadItems, BadSample
from sdxl_eqx.data.captions import Visit, caption
from sdxl_eqx.data.control import read_control
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.pictures import Size, read_picture
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.store import Arrays
from sdxl_eqx.data.tokenizer import Tokenizers, tokenize
from sdxl_eqx.data.transforms import draw_crop, mirror, resize_and_crop

Read = Callable[[int, np.random.Generator], Arrays]
"""Reads a sample by its index, drawing what is random about this visit; raises `BadSample` for one that cannot be
used."""

FOR_EVER = 2**62
"""Samples of a stream."""


@dataclass(frozen=True)
class _Item:
    """A sample as it was read, or a batch of them, and what could not be on the way to it."""

    arrays: Arrays | None
    bad: tuple[BadSample, ...]


def make_stream(
    order: Order,
    read: Read,
    *,
    seed: int,
    num_threads: int,
    rows: Sequence[int] | None = None,
    bad: BadItems,
) -> grain.DatasetIterator[Arrays]:
    """The batches of an order for ever; of each, the `rows` that this process feeds (all by default).

    What is drawn for a visit follows from the seed, the sample and the epoch alone, not from threads, processes or
    where the stream was interrupted. A sample that cannot be used is counted when its batch is given, and another one
    of its bucket, drawn likewise, takes its place; where the whole bucket cannot be used, the next batch of another one
    is given. The n-th batch is a function of n: `position(n)` goes there.

    Raises (while iterating):
        ValueError: too many samples are bad, as `BadItems` says.
    """
    rows = range(order.batch_size) if rows is None else rows
    size = len(rows)
    batch = functools.lru_cache(maxsize=4 + 2 * num_threads)(order.batch)

    def first_good(samples: Iterable[int], rng: np.random.Generator, failures: list[BadSample]) -> Arrays | None:
        for sample in samples:
            try:
                return read(sample, rng)
            except BadSample as error:
                failures.append(error)
            if len({failure.name for failure in failures}) > bad.limit:
                break
        return None

    def item(i: int) -> _Item:
        row, number = rows[i % size], i // size
        failures: list[BadSample] = []
        tried: set[int] = set()
        while len(tried) < order.buckets and len({failure.name for failure in failures}) <= bad.limit:
            ordered = batch(number)
            number += 1
            if ordered.bucket in tried:
                continue
            tried.add(ordered.bucket)
            sample, epoch = int(ordered.samples[row]), int(ordered.epochs[row])
            rng = np.random.default_rng([seed, sample, epoch])
            arrays = first_good([sample], rng, failures)
            if arrays is None:
                members = order.members(ordered.bucket)
                others = np.roll(members, -int(rng.integers(len(members))))
                arrays = first_good(map(int, others), rng, failures)
            if arrays is not None:
                return _Item(arrays, tuple(failures))
        return _Item(None, tuple(failures))

    def stack(items: Sequence[_Item]) -> _Item:
        arrays = [one.arrays for one in items if one.arrays is not None]
        failures = tuple(failure for one in items for failure in one.bad)
        if len(arrays) < len(items):
            return _Item(None, failures)
        return _Item({name: np.stack([one[name] for one in arrays]) for name in arrays[0]}, failures)

    def count(item: _Item) -> Arrays:
        # In the consumer's thread, so that what is counted does not depend on prefetching.
        for failure in item.bad:
            bad.add(failure)
        if item.arrays is None:  # all that take part, though not all that is held out too
            raise bad.error()
        return item.arrays

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, size))
    samples = grain.MapDataset.range(FOR_EVER // size * size).map(item).to_iter_dataset(options)
    batches = samples.batch(size, drop_remainder=True, batch_fn=stack)
    # Whole batches too are made before they are asked for: copying one takes longer than a step may wait.
    ahead = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1 if num_threads else 0)
    return iter(ahead.map(count))


def position(batches: int, size: int) -> dict[str, Any]:
    """The state of a stream that gave so many batches of `size` rows."""
    return {"next_index": batches * size}


def picture_reader(
    source: Source,
    tokenizers: Tokenizers,
    config: DataConfig,
    targets: Callable[[int], Size],
    *,
    with_control: bool = False,
) -> Read:
    """Reads samples into the fields of a `Batch`, if asked with what a ControlNet sees; `targets` says to which
    (height, width) each is cropped."""

    def read(sample: int, rng: np.random.Generator) -> Arrays:
        visit = Visit.draw(config, rng)
        words = caption(source.captions(sample), visit, config, rng)
        target = targets(sample)
        picture = read_picture(source.picture(sample), source.name(sample), target=target)
        crop = draw_crop(picture.size, target, center_crop=config.center_crop, rng=rng)
        pixels, time_ids = resize_and_crop(picture, target, crop)
        if visit.flip:
            pixels, time_ids = mirror(pixels, time_ids)
        ids, ids_2 = (tokenize(tokenizer, [words], config.caption_chunks)[0][0] for tokenizer in tokenizers)
        arrays = {"pixels": pixels, "input_ids": ids, "input_ids_2": ids_2, "time_ids": time_ids}
        if with_control:
            arrays["control"] = read_control(source, sample, picture.size, target, crop, flip=visit.flip)
        return arrays

    return read


def weighted(read: Read, weights: Float32[np.ndarray, " n"]) -> Read:
    """What `read` reads, with the weight of each sample's loss."""

    def read_with_weight(sample: int, rng: np.random.Generator) -> Arrays:
        return {**read(sample, rng), "weight": np.asarray(weights[sample])}

    return read_with_weight
