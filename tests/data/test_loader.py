import itertools
import json
import logging
import time
from typing import Any

import numpy as np
import pytest

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.batch import Batch, LatentBatch
from sdxl_eqx.data.loader import BadItems, make_stream, picture_reader, position_after, to_batch
from sdxl_eqx.data.sources import ImageFolder
from sdxl_eqx.data.tokenizer import bundled_tokenizers
from sdxl_eqx.data.transforms import BadPicture

LENGTH = 24


def read(item, rng):
    """Finishes out of order under threads: even items take longer."""
    time.sleep(0.002 * (item % 2 == 0))
    return {"item": np.array(item), "draw": rng.random(3)}


def stream(source: Any = range(LENGTH), read: Any = read, *, bad=None, **options):
    options = {"batch_size": 4, "seed": 3, "shuffle": True, "num_threads": 2} | options
    return make_stream(source, read, bad=bad or BadItems(len(source), 0.0), **options)


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
    source = range(length)
    alone = take(stream(source), 11)
    shares = [take(stream(source, rows=own), 11) for own in rows]
    order = np.argsort(np.concatenate(rows))
    for step, batch in enumerate(alone):
        for name in batch:
            together = np.concatenate([share[step][name] for share in shares])[order]
            np.testing.assert_array_equal(batch[name], together)
    assert sorted(items(alone)[:length]) == list(source)


def test_processes_that_feed_the_same_rows_read_the_same():
    assert_equal(take(stream(rows=[0, 1]), 7), take(stream(rows=[0, 1], num_threads=0), 7))


def test_a_share_goes_on_where_any_number_of_processes_stopped():
    """Without bad items, a position is that of the whole sequence."""
    rows = [1, 3]
    alone, share = stream(), stream(rows=rows)
    take(alone, 5)
    share.set_state(position_after(5, len(rows)))
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
        raise BadPicture(f"{item}.png", "torn")
    return read(item, rng)


def test_bad_items_are_skipped_counted_once_and_logged_once_while_batches_stay_full(caplog):
    bad = BadItems(LENGTH, 0.0)
    with caplog.at_level(logging.WARNING, "sdxl_eqx"):
        batches = take(stream(read=read_most, bad=bad), 21)  # four epochs of 21 good items
    assert all(len(batch["item"]) == 4 for batch in batches)
    assert sorted(items(batches)) == sorted(4 * [i for i in range(LENGTH) if i not in (2, 3, 7)])
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
            raise BadPicture(f"{item:03d}.png", "torn")
        return read(item, rng)

    bad = BadItems(100, 0.2)
    rule = (
        r"21 of 100 pictures cannot be read, at most max\(10, 0.2 x 100\) may be.*001.png \(torn\); 003.png.*--max-bad"
    )
    with pytest.raises(ValueError, match=rule):
        take(stream(range(100), read_few, bad=bad, shuffle=False), 50)
    assert bad.count == 21


@pytest.mark.parametrize(("total", "max_fraction", "allowed"), [(100, 0.01, 10), (1000, 0.02, 20), (5, 1.0, 4)])
def test_the_limit_is_ten_or_the_share_but_never_all(total, max_fraction, allowed):
    bad = BadItems(total, max_fraction)
    for i in range(allowed):
        bad.add(BadPicture(str(i), "torn"))
        bad.add(BadPicture(str(i), "torn again"))
    assert bad.count == allowed
    with pytest.raises(ValueError, match=f"{allowed + 1} of {total}"):
        bad.add(BadPicture("one more", "torn"))


def test_a_process_whose_whole_share_is_bad_ends_rather_than_waits():
    def read_even(item, rng):
        if item % 2:
            raise BadPicture(f"{item}.png", "torn")
        return read(item, rng)

    with pytest.raises(ValueError, match="4 of 8 pictures cannot be read"):
        next(stream(range(8), read_even, shuffle=False, rows=[1, 3]))


def test_another_error_than_a_bad_picture_is_not_skipped():
    def broken(item, rng):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        next(stream(read=broken))


def test_pictures_become_a_batch(tokenizers):
    source = ImageFolder(resolve("asset:emoji"))
    config = DataConfig(resolution=32, random_flip=True)
    batch = to_batch(next(stream(source, picture_reader(config, tokenizers))))
    assert isinstance(batch, Batch)
    assert batch.pixels.shape == (4, 32, 32, 3) and batch.pixels.dtype == np.uint8
    assert batch.input_ids.shape == batch.input_ids_2.shape == (4, 77)
    assert np.asarray(batch.time_ids).tolist() == 4 * [[64, 64, 0, 0, 32, 32]]


def test_half_of_the_pictures_are_mirrored_and_the_wanted_share_of_captions_dropped(tokenizers):
    example = ImageFolder(resolve("asset:emoji"))[2]
    rng = np.random.default_rng(0)
    reader = picture_reader(DataConfig(resolution=64, random_flip=True, caption_dropout=0.3), tokenizers)
    plain = picture_reader(DataConfig(resolution=64), tokenizers)(example, rng)
    drawn = [reader(example, rng) for _ in range(200)]
    flips = sum(np.array_equal(d["pixels"], plain["pixels"][:, ::-1]) for d in drawn)
    same = sum(np.array_equal(d["pixels"], plain["pixels"]) for d in drawn)
    assert flips + same == 200 and 70 < flips < 130
    dropped = [d["input_ids"].tolist() == [49406] + 76 * [49407] for d in drawn]
    assert 35 < sum(dropped) < 85
    assert dropped == [d["input_ids_2"].tolist() == [49406, 49407] + 75 * [0] for d in drawn]


def test_the_fields_say_which_batch_it_is():
    latent = {
        "mean": np.zeros((1, 2, 2, 4), np.float32),
        "logvar": np.zeros((1, 2, 2, 4), np.float32),
        "context": np.zeros((1, 77, 8), np.float32),
        "pooled": np.zeros((1, 4), np.float32),
        "time_ids": np.zeros((1, 6), np.float32),
    }
    assert isinstance(to_batch(latent), LatentBatch)
    with pytest.raises(ValueError, match="must be the fields of Batch or of LatentBatch"):
        to_batch({"mean": latent["mean"]})
