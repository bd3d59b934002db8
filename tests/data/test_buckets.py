import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_eqx.data import buckets as module
from sdxl_eqx.data.buckets import Buckets, choose_buckets, one_bucket

SIDES = st.integers(1, 900)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=40)
CHOICES = {"count": st.integers(1, 9), "upscale": st.booleans(), "resolution": st.sampled_from([64, 256, 512])}


def choose(sizes, resolution=512, count=9, upscale=False) -> Buckets:
    return choose_buckets(np.array(sizes, np.int32), resolution, count=count, upscale=upscale)


def usable(sizes, upscale):
    return [min(size) >= (1 if upscale else 64) for size in sizes]


def cut(size, shape):
    scale = max(shape[0] / size[0], shape[1] / size[1])
    return 1 - shape[0] * shape[1] / (size[0] * size[1] * scale**2)


@settings(deadline=None)
@given(sizes=SIZES, **CHOICES)
def test_every_usable_picture_has_one_of_few_shapes_of_whole_steps_and_no_larger_area(
    sizes, count, upscale, resolution
):
    if not any(usable(sizes, upscale)):
        with pytest.raises(ValueError, match="--bucket-upscale"):
            choose(sizes, resolution, count, upscale)
        return
    buckets = choose(sizes, resolution, count, upscale)
    assert 1 <= len(buckets.shapes) <= count
    for h, w in buckets.shapes:
        assert h % 64 == w % 64 == 0 and h * w <= resolution**2 and max(h, w) <= 4 * min(h, w)
    assert (buckets.of >= 0).tolist() == usable(sizes, upscale)
    counts = buckets.counts()
    assert (counts > 0).all() and (np.diff(counts) <= 0).all() and counts.sum() == sum(usable(sizes, upscale))


@settings(deadline=None)
@given(sizes=SIZES, count=st.integers(1, 9), resolution=st.sampled_from([64, 256, 512]))
def test_no_picture_is_enlarged_unless_asked(sizes, count, resolution):
    sizes = [*sizes, (70, 300)]
    buckets = choose(sizes, resolution, count)
    for (h, w), of in zip(sizes, buckets.of, strict=True):
        if of >= 0:
            H, W = buckets.shapes[of]
            assert h >= H and w >= W


@settings(deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99), upscale=st.booleans())
def test_the_shapes_do_not_depend_on_the_order_of_the_pictures(sizes, seed, upscale):
    sizes = [*sizes, (300, 200)]
    mixed = np.random.default_rng(seed).permutation(len(sizes))
    one, other = choose(sizes, upscale=upscale), choose(np.array(sizes)[mixed], upscale=upscale)
    assert one.shapes == other.shapes
    assert one.of[mixed].tolist() == other.of.tolist()


@settings(deadline=None)
@given(sizes=SIZES, upscale=st.booleans())
def test_each_picture_takes_the_shape_of_those_chosen_that_cuts_off_least_of_equal_area(sizes, upscale):
    sizes = [*sizes, (300, 200)]
    buckets = choose(sizes, upscale=upscale)
    for size, of in zip(sizes, buckets.of, strict=True):
        if of < 0:
            continue
        H, W = buckets.shapes[of]
        rivals = [(h, w) for h, w in buckets.shapes if h * w == H * W and (upscale or (h <= size[0] and w <= size[1]))]
        assert cut(size, (H, W)) <= min(cut(size, shape) for shape in rivals) + 1e-9


def test_squares_of_the_resolution_or_more_make_one_square_bucket():
    assert choose([(512, 512), (600, 600), (4000, 4000)]).shapes == ((512, 512),)


def test_pictures_that_cannot_be_read_take_no_part():
    buckets = choose([(0, 0), (512, 512), (0, 0)])
    assert buckets.of.tolist() == [-1, 0, -1]


def test_phone_photos_and_wide_ones_get_their_own_shapes():
    buckets = choose([(3024, 4032)] * 5 + [(4032, 3024)] * 3 + [(1080, 1920)] * 2, resolution=1024)
    shapes = [buckets.shapes[i] for i in (buckets.of[0], buckets.of[5], buckets.of[9])]
    ratios = [w / h for h, w in shapes]
    assert len(set(shapes)) == 3
    np.testing.assert_allclose(ratios, [4 / 3, 3 / 4, 16 / 9], rtol=0.04)
    assert all(h * w > 0.9 * 1024**2 for h, w in shapes)
    assert buckets.of[0] == 0


def test_nine_shapes_lose_little_of_a_mix_of_pictures():
    rng = np.random.default_rng(0)
    ratio, area = np.exp(rng.normal(0, 0.35, 3000)), 1.3e6
    sizes = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1).astype(int)
    buckets = choose(sizes, resolution=1024)
    losses = [cut(size, buckets.shapes[of]) for size, of in zip(sizes, buckets.of, strict=True)]
    assert np.mean(losses) < 0.05
    fewer = choose(sizes, resolution=1024, count=3)
    assert np.mean(losses) < np.mean([cut(s, fewer.shapes[of]) for s, of in zip(sizes, fewer.of, strict=True)])


def test_a_few_small_pictures_do_not_make_the_others_small():
    buckets = choose([(512, 512)] * 50 + [(100, 90)], count=1)
    assert buckets.shapes == ((64, 64),)  # the one shape that all can take
    buckets = choose([(512, 512)] * 50 + [(100, 90)], count=2)
    assert buckets.shapes == ((512, 512), (64, 64))
    assert choose([(512, 512)] * 50 + [(100, 90)], count=1, upscale=True).shapes == ((512, 512),)


def test_a_million_pictures_take_seconds():
    rng = np.random.default_rng(0)
    sizes = rng.integers(64, 3000, (300_000, 2))
    began = time.perf_counter()
    choose(sizes, resolution=1024)
    assert time.perf_counter() - began < 30


def test_the_histogram_says_what_each_shape_holds():
    buckets = choose([(512, 512)] * 6 + [(256, 1024)] * 3, resolution=512)
    one, other = buckets.describe(2).splitlines()
    assert "512 x 512" in one and "6 pictures, 3.0 batches an epoch" in one
    assert "256 x 1024" in other and one.count("#") == 2 * other.count("#")
    assert "a batch in 2.0 epochs" in buckets.describe(12).splitlines()[0]


def test_one_bucket_is_the_square_for_all_that_can_be_used():
    buckets = one_bucket(np.array([True, False, True]), 512)
    assert buckets.shapes == ((512, 512),) and buckets.of.tolist() == [0, -1, 0]


def test_pictures_too_small_for_every_candidate_get_a_shape_after_the_candidates_are_used_up():
    sides = range(64, 2049, 64)
    larger = [(h, w) for h in sides for w in sides if h * w <= 1024**2 and max(h, w) <= 4 * min(h, w)]
    sizes = [*larger[1:] * 2, (64, 64)]
    assert len(larger) > module.CANDIDATES
    buckets = choose(sizes, resolution=1024, count=200)
    assert buckets.shapes[buckets.of[-1]] == (64, 64)


def test_how_many_sizes_are_weighed_at_once_changes_nothing(monkeypatch):
    sizes = np.random.default_rng(0).integers(64, 900, (200, 2))
    whole = choose(sizes)
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    assert choose(sizes).shapes == whole.shapes and (choose(sizes).of == whole.of).all()


@pytest.mark.parametrize("upscale", [True, False])
def test_where_no_picture_can_be_read_the_error_does_not_advise_to_enlarge(upscale):
    with pytest.raises(ValueError, match="none of 2 pictures can be read"):
        choose([(0, 0), (0, 0)], upscale=upscale)


def test_one_bucket_without_samples_is_an_error():
    with pytest.raises(ValueError, match="none of 2 samples"):
        one_bucket(np.zeros(2, bool), 512)
