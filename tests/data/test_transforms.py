import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_eqx.data.pictures import Picture, read_picture
from sdxl_eqx.data.transforms import draw_crop, mirror, resize_and_crop, scaled_size

SIDE = st.integers(1, 300)
SIZES = st.tuples(SIDE, SIDE)
TARGETS = st.tuples(st.integers(1, 64), st.integers(1, 64))
SEEDS = st.integers(0, 99)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(h: int, w: int) -> np.ndarray:
    """Values that Lanczos keeps within 0 to 255: Pillow cuts off the rest between its two passes, in either order."""
    return np.random.default_rng(0).integers(80, 176, (h, w, 3), np.uint8)


def whole(pixels: np.ndarray) -> Picture:
    """A picture that was not scaled while it was decoded."""
    return Picture(pixels, (pixels.shape[0], pixels.shape[1]))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((64, 64), (64, 64), (64, 64)),
        ((300, 200), (64, 64), (96, 64)),
        ((32, 48), (64, 64), (64, 96)),
        ((64, 101), (32, 32), (32, 50)),  # 50.5, to even
        ((64, 103), (32, 32), (32, 52)),  # 51.5, to even
        ((1000, 1500), (896, 1152), (896, 1344)),
        ((1500, 1000), (896, 1152), (1728, 1152)),
        ((1, 60000), (512, 512), (512, 30720000)),
    ],
)
def test_scaled_sizes_are_those_computed_by_hand(size, target, expected):
    assert scaled_size(size, target) == expected


@given(st.tuples(st.integers(1, 70000), st.integers(1, 70000)), st.tuples(st.integers(1, 4096), st.integers(1, 4096)))
@settings(max_examples=300)
def test_a_scaled_size_covers_the_target_with_one_side_exact_and_keeps_the_ratio(size, target):
    (h, w), (H, W) = size, target
    scaled_h, scaled_w = scaled_size(size, target)
    assert scaled_h >= H and scaled_w >= W
    assert scaled_h == H or scaled_w == W
    scale = max(H / h, W / w)
    assert abs(scaled_h - h * scale) <= 0.5001 and abs(scaled_w - w * scale) <= 0.5001
    assert scaled_size(size, size) == size


@given(SIZES, TARGETS, st.booleans(), SEEDS)
@settings(max_examples=200)
def test_a_crop_lies_inside_the_scaled_picture(size, target, center_crop, seed):
    top, left = draw_crop(size, target, center_crop=center_crop, rng=rng(seed))
    scaled_h, scaled_w = scaled_size(size, target)
    assert 0 <= top <= scaled_h - target[0] and 0 <= left <= scaled_w - target[1]
    if center_crop:
        assert (top, left) == ((scaled_h - target[0]) // 2, (scaled_w - target[1]) // 2)


def test_random_crops_reach_both_ends_and_follow_from_the_seed():
    wide = {draw_crop((8, 12), (8, 8), center_crop=False, rng=rng(seed)) for seed in range(40)}
    high = {draw_crop((24, 16), (8, 8), center_crop=False, rng=rng(seed)) for seed in range(40)}
    assert wide == {(0, left) for left in range(5)}
    assert high == {(top, 0) for top in range(5)}
    assert draw_crop((9, 99), (8, 8), center_crop=False, rng=rng(3)) == draw_crop(
        (9, 99), (8, 8), center_crop=False, rng=rng(3)
    )


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((64, 64), (64, 64), [64, 64, 0, 0, 64, 64]),
        ((64, 101), (64, 64), [64, 101, 0, 18, 64, 64]),
        ((300, 200), (64, 64), [300, 200, 16, 0, 64, 64]),
        ((32, 48), (64, 64), [32, 48, 0, 16, 64, 64]),
        ((100, 200), (40, 64), [100, 200, 0, 8, 40, 64]),
    ],
)
def test_time_ids_of_a_middle_crop_are_those_computed_by_hand(size, target, expected):
    top_left = draw_crop(size, target, center_crop=True, rng=rng())
    pixels, time_ids = resize_and_crop(whole(noise(*size)), target, top_left)
    assert pixels.shape == (*target, 3)
    assert time_ids.dtype == np.float32
    assert time_ids.tolist() == expected


@given(SIZES, TARGETS, SEEDS)
@settings(max_examples=100)
def test_a_crop_is_that_of_the_whole_picture_scaled_where_time_ids_say(size, target, seed):
    picture = whole(noise(*size))
    pixels, time_ids = resize_and_crop(picture, target, draw_crop(size, target, center_crop=False, rng=rng(seed)))
    h, w, top, left, H, W = (int(number) for number in time_ids)
    assert (h, w, H, W) == (*size, *target)
    scaled_h, scaled_w = scaled_size(size, target)
    scaled = np.array(Image.fromarray(picture.pixels).resize((scaled_w, scaled_h), Image.Resampling.LANCZOS))
    assert np.abs(pixels.astype(int) - scaled[top : top + H, left : left + W]).max() <= 2


@given(SIZES, TARGETS, SEEDS)
@settings(max_examples=100)
def test_a_mirrored_crop_is_that_of_the_mirrored_picture_and_mirrors_back(size, target, seed):
    crop = draw_crop(size, target, center_crop=False, rng=rng(seed))
    pixels, time_ids = resize_and_crop(whole(noise(*size)), target, crop)
    mirrored, mirrored_ids = mirror(pixels, time_ids)
    np.testing.assert_array_equal(mirrored, pixels[:, ::-1])
    top, left = (int(number) for number in mirrored_ids[2:4])
    assert left == scaled_size(size, target)[1] - target[1] - crop[1]
    flipped = whole(np.ascontiguousarray(noise(*size)[:, ::-1]))
    expected, expected_ids = resize_and_crop(flipped, target, (top, left))
    assert np.abs(mirrored.astype(int) - expected).max() <= 2
    np.testing.assert_array_equal(mirrored_ids, expected_ids)
    for again, first in zip(mirror(mirrored, mirrored_ids), (pixels, time_ids), strict=True):
        np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize(("size", "target"), [((40, 72), (40, 72)), ((40, 72), (40, 40)), ((72, 40), (40, 40))])
def test_where_nothing_is_scaled_the_pixels_are_copied_bit_for_bit(size, target):
    picture = read_picture(encoded(Image.fromarray(noise(*size)), "PNG"), "a", target=target)
    top, left = draw_crop(size, target, center_crop=False, rng=rng(1))
    pixels, _ = resize_and_crop(picture, target, (top, left))
    np.testing.assert_array_equal(pixels, noise(*size)[top : top + target[0], left : left + target[1]])


def smooth(h: int, w: int) -> Image.Image:
    return Image.fromarray(noise(-(-h // 16), -(-w // 16))).resize((w, h), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(256, 256), (257, 259), (333, 251), (190, 500)])
@pytest.mark.parametrize("target", [(128, 128), (64, 96), (48, 48), (100, 30), (60, 140), (16, 16)])
@pytest.mark.parametrize("orientation", [1, 7])
def test_a_jpeg_that_was_scaled_while_decoded_gives_the_crop_and_ids_of_one_that_was_not(size, target, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(*size), "JPEG", quality=95, exif=exif)
    full, scaled = read_picture(data, "a"), read_picture(data, "a", target=target)
    assert full.size == scaled.size == (size if orientation == 1 else size[::-1])
    crop = draw_crop(full.size, target, center_crop=False, rng=rng(1))
    (expected, expected_ids), (pixels, time_ids) = (resize_and_crop(some, target, crop) for some in (full, scaled))
    np.testing.assert_array_equal(time_ids, expected_ids)
    assert time_ids[:2].tolist() == list(full.size)
    assert scaled.pixels.size < full.pixels.size or min(a / b for a, b in zip(full.size, target, strict=True)) < 4 / 3
    assert 10 * np.log10(255**2 / np.mean((pixels.astype(float) - expected) ** 2 + 1e-9)) > 37


def test_a_row_that_ends_within_a_pixel_is_not_stretched_even_where_the_sizes_agree():
    ramp = np.broadcast_to(np.arange(0, 252, 4, dtype=np.uint8)[:, None], (63, 63, 3))
    data = encoded(Image.fromarray(np.ascontiguousarray(ramp)), "JPEG", quality=100)
    scaled = read_picture(data, "a", target=(32, 32))
    assert scaled.pixels.shape == (32, 32, 3) and scaled.box == (0, 0, 31.5, 31.5)
    pixels, expected = (resize_and_crop(some, (32, 32), (0, 0))[0] for some in (scaled, read_picture(data, "a")))
    assert np.abs(pixels.astype(int) - expected)[2:-2].max() <= 2


def test_a_picture_of_extreme_shape_costs_no_more_than_its_crop():
    size = (1, 60000)
    crop = draw_crop(size, (512, 512), center_crop=True, rng=rng())
    pixels, time_ids = resize_and_crop(whole(np.full((*size, 3), 9, np.uint8)), (512, 512), crop)
    assert (pixels == 9).all()
    assert mirror(pixels, time_ids)[1].tolist() == [1, 60000, 0, 15359744, 512, 512]
