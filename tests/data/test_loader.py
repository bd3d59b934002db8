import contextlib
import itertools
import json
import logging
import threading
import time
from typing import Any

import numpy as np
import pytest

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.bad import BadItems, BadSample
from sdxl_eqx.data.batch import Batch, to_batch
from sdxl_eqx.data.loader import make_stream, picture_reader, position
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.tokenizer import bundled_tokenizers

LENGTH = 24


def read(item, rng):
    """Finishes out of order under threads: even items take longer."""
    time.sleep(0.002 * (item % 2 == 0))
    return {"item": np.array(item), "draw": rng.random(3)}


def stream(
    length: int = LENGTH, read: Any = read, *, bad=None, seed=3, shuffle=True, buckets=None, num_threads=2, **options
):
    of = np.zeros(length, np.int16) if buckets is None else buckets
    order = Order(of, batch_size=4, seed=seed, shuffle=shuffle)
    return make_stream(order, read, seed=seed, num_threads=num_threads, bad=bad or BadItems(length, 0.0), **options)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def items(batches):
    return np.concatenate([batch["item"] for batch in batches]).tolist()


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.fixture(scope="module")
def tokenizers():
    return bundled_tokenizers()


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_order_and_draws_do_not_depend_on_the_number_of_threads(num_threads):
    assert_equal(take(stream(num_threads=num_threads), 9), take(stream(num_threads=3), 9))


def test_each_epoch_has_every_item_once_in_another_order_and_with_other_draws():
    batches = take(stream(), 12)
    first, second = items(batches[:6]), items(batches[6:])
    assert sorted(first) == sorted(second) == list(range(LENGTH))
    assert first != second != list(range(LENGTH))
    draws = np.concatenate([batch["draw"] for batch in batches])
    assert len(np.unique(draws)) == draws.size


def test_the_seed_fixes_the_order_and_another_seed_changes_it():
    assert items(take(stream(), 6)) == items(take(stream(), 6))
    assert items(take(stream(), 6)) != items(take(stream(seed=4), 6))


def test_without_shuffling_the_order_is_the_source_s():
    assert items(take(stream(shuffle=False), 12)) == [*range(LENGTH), *range(LENGTH)]


@pytest.mark.parametrize("length", [24, 22])
@pytest.mark.parametrize(
    "rows", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1, 2, 3]], [[0, 1, 2, 3]]]
)
def test_processes_share_what_one_process_sees(length, rows):
    """The same samples with the same draws in the same places, step by step; also where no batch ends an epoch."""
    alone = take(stream(length), 11)
    shares = [take(stream(length, rows=own), 11) for own in rows]
    order = np.argsort(np.concatenate(rows))
    for step, batch in enumerate(alone):
        for name in batch:
            together = np.concatenate([share[step][name] for share in shares])[order]
            np.testing.assert_array_equal(batch[name], together)
    assert sorted(items(alone)[:length]) == list(range(length))


def test_processes_that_feed_the_same_rows_read_the_same():
    assert_equal(take(stream(rows=[0, 1]), 7), take(stream(rows=[0, 1], num_threads=0), 7))


def test_a_share_goes_on_where_any_number_of_processes_stopped():
    rows = [1, 3]
    alone, share = stream(), stream(rows=rows)
    take(alone, 5)
    share.set_state(position(5, len(rows)))
    for batch, own in zip(take(alone, 4), take(share, 4), strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name][rows], own[name])


@pytest.mark.parametrize("steps", [0, 1, 4, 6, 8])
def test_a_stream_continues_bit_for_bit_from_its_saved_state(steps):
    one = stream()
    take(one, steps)
    state = json.loads(json.dumps(one.get_state()))
    other = stream(num_threads=4)
    take(other, 3)
    other.set_state(state)
    assert_equal(take(other, 5), take(one, 5))


def read_most(item, rng):
    if item in (2, 3, 7):
        raise BadSample(f"{item}.png", "torn")
    return read(item, rng)


def test_bad_items_are_skipped_counted_once_and_logged_once_while_batches_stay_full(caplog):
    bad = BadItems(LENGTH, 0.0)
    with caplog.at_level(logging.WARNING, "sdxl_eqx"):
        batches = take(stream(read=read_most, bad=bad), 21)  # four epochs of 21 good items
    assert all(len(batch["item"]) == 4 for batch in batches)
    good = [i for i in range(LENGTH) if i not in (2, 3, 7)]
    assert set(items(batches)) == set(good)
    for i in range(3):  # each good item comes once an epoch, and others in the places of the bad ones
        assert set(good) <= set(items(batches[6 * i : 6 * i + 6]))
    assert bad.count == 3
    assert sorted(r.getMessage() for r in caplog.records) == [f"skipped {i}.png: torn" for i in (2, 3, 7)]


def test_what_is_counted_does_not_depend_on_how_far_threads_read_ahead():
    counts = []
    for num_threads in (0, 4):
        bad = BadItems(LENGTH, 0.0)
        counts.append(
            [(len(batch), bad.count) for batch in take(stream(read=read_most, bad=bad, num_threads=num_threads), 6)]
        )
    assert counts[0] == counts[1]


def test_a_stream_with_bad_items_continues_bit_for_bit():
    one = stream(read=read_most)
    take(one, 4)
    other = stream(read=read_most)
    other.set_state(json.loads(json.dumps(one.get_state())))
    assert_equal(take(other, 6), take(one, 6))


def test_more_bad_items_than_the_limit_end_the_stream():
    def read_few(item, rng):
        if item % 2:
            raise BadSample(f"{item:03d}.png", "torn")
        return read(item, rng)

    bad = BadItems(100, 0.2)
    rule = r"21 of 100 samples cannot be used, at most max\(10, 0.2 x 100\) may be.*001.png \(torn\).*--max-bad"
    with pytest.raises(ValueError, match=rule):
        take(stream(100, read_few, bad=bad, shuffle=False), 50)
    assert bad.count == 21


@pytest.mark.parametrize(("total", "max_fraction", "allowed"), [(100, 0.01, 10), (1000, 0.02, 20), (5, 1.0, 4)])
def test_the_limit_is_ten_or_the_share_but_never_all(total, max_fraction, allowed):
    bad = BadItems(total, max_fraction)
    for i in range(allowed):
        bad.add(BadSample(str(i), "torn"))
        bad.add(BadSample(str(i), "torn again"))
    assert bad.count == allowed
    with pytest.raises(ValueError, match=f"{allowed + 1} of {total}"):
        bad.add(BadSample("one more", "torn"))


def test_what_stands_in_the_place_of_a_bad_item_is_the_same_on_any_number_of_processes():
    alone = take(stream(read=read_most), 8)
    rows = [[0, 3], [1, 2]]
    shares = [take(stream(read=read_most, rows=own), 8) for own in rows]
    for step, batch in enumerate(alone):
        for own, share in zip(rows, shares, strict=True):
            for name in batch:
                np.testing.assert_array_equal(batch[name][own], share[step][name])


def test_another_item_of_the_same_bucket_takes_the_place_of_a_bad_one():
    buckets = np.arange(LENGTH) % 3
    batches = take(stream(read=read_most, buckets=buckets), 30)
    assert all(len(set(buckets[batch["item"]])) == 1 for batch in batches)
    assert not {2, 3, 7} & set(items(batches))


def test_where_a_bucket_holds_bad_items_alone_the_next_batch_of_another_one_is_given():
    def read_some(item, rng):
        if 4 <= item < 8:
            raise BadSample(f"{item}.png", "torn")
        return read(item, rng)

    bad, buckets = BadItems(16, 1.0), np.arange(16) // 4
    alone = take(stream(16, read_some, bad=bad, buckets=buckets), 24)
    assert {int(b) for batch in alone for b in buckets[batch["item"]]} == {0, 2, 3}
    assert all(len(set(buckets[batch["item"]])) == 1 for batch in alone)
    assert set(items(alone[:4])) == {*range(4), *range(8, 16)}  # the first epoch
    assert bad.count == 4
    shares = [take(stream(16, read_some, buckets=buckets, rows=own), 24) for own in ([0, 3], [1, 2])]
    for step, batch in enumerate(alone):
        for own, share in zip(([0, 3], [1, 2]), shares, strict=True):
            np.testing.assert_array_equal(batch["item"][own], share[step]["item"])


def test_bad_items_of_all_buckets_but_one_may_not_be_more_than_the_limit():
    def read_first(item, rng):
        if item >= 4:
            raise BadSample(f"{item}.png", "torn")
        return read(item, rng)

    with pytest.raises(ValueError, match=r"11 of 24 samples cannot be used.*\.png \(torn\)"):
        take(stream(24, read_first, bad=BadItems(24, 0.0), buckets=np.arange(24) // 4), 30)


def test_a_set_of_bad_items_alone_ends_the_stream():
    def none(item, rng):
        raise BadSample(f"{item}.png", "torn")

    with pytest.raises(ValueError, match="8 of 8 samples cannot be used"):
        next(stream(8, none))


def test_another_error_than_a_bad_picture_is_not_skipped():
    def broken(item, rng):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        next(stream(read=broken))


def emoji(config, tokenizers, target=(32, 32)):
    source = ImageFolder(str(resolve("asset:emoji")))
    return picture_reader(source, tokenizers, config, lambda sample: target)


def test_pictures_become_a_batch(tokenizers):
    config = DataConfig(resolution=32, random_flip=True)
    batch = to_batch(next(stream(read=emoji(config, tokenizers, (32, 24)))))
    assert isinstance(batch, Batch)
    assert batch.pixels.shape == (4, 32, 24, 3) and batch.pixels.dtype == np.uint8
    assert batch.input_ids.shape == batch.input_ids_2.shape == (4, 77)
    ids = np.asarray(batch.time_ids)
    assert (ids[:, :3] == [64, 64, 0]).all() and (ids[:, 4:] == [32, 24]).all()
    assert len(set(ids[:, 3])) > 1 and (ids[:, 3] <= 8).all()


def test_half_of_the_pictures_are_mirrored_and_the_wanted_share_of_captions_dropped(tokenizers):
    rng = np.random.default_rng(0)
    reader = emoji(DataConfig(resolution=64, random_flip=True, caption_dropout=0.3), tokenizers, (64, 64))
    plain = emoji(DataConfig(resolution=64), tokenizers, (64, 64))(2, rng)
    drawn = [reader(2, rng) for _ in range(200)]
    flips = sum(np.array_equal(d["pixels"], plain["pixels"][:, ::-1]) for d in drawn)
    same = sum(np.array_equal(d["pixels"], plain["pixels"]) for d in drawn)
    assert flips + same == 200 and 70 < flips < 130
    dropped = [d["input_ids"].tolist() == [49406] + 76 * [49407] for d in drawn]
    assert 35 < sum(dropped) < 85
    assert dropped == [d["input_ids_2"].tolist() == [49406, 49407] + 75 * [0] for d in drawn]


def test_captions_come_in_chunks_and_their_tags_in_another_order(tokenizers):
    config = DataConfig(caption_chunks=2, caption_shuffle=True)
    drawn = [emoji(config, tokenizers)(2, np.random.default_rng(i)) for i in range(20)]
    assert all(d["input_ids"].shape == d["input_ids_2"].shape == (154,) for d in drawn)
    assert len({d["input_ids"].tobytes() for d in drawn}) > 1


def test_a_batch_is_copied_together_before_it_is_asked_for(monkeypatch):
    """A step does not wait for the copy."""
    made, stack = threading.Semaphore(0), np.stack

    def counted(arrays):
        made.release()
        return stack(arrays)

    monkeypatch.setattr(np, "stack", counted)
    with contextlib.closing(stream()) as batches:
        next(batches)
        fields, given = ("item", "draw"), 2
        assert all(made.acquire(timeout=10) for _ in range(given * len(fields)))
