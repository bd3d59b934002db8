import io

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.data import transforms
from sdxl_eqx.data.transforms import BadPicture, mirror, read_picture, resize_and_crop


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def coordinates(h: int, w: int) -> np.ndarray:
    """A picture whose red is the row and green the column of each pixel."""
    rows, columns = np.mgrid[:h, :w].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_an_rgb_picture_comes_back_as_it_is(tmp_path):
    picture = coordinates(5, 9)
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(picture)))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), picture)


@pytest.mark.parametrize(("orientation", "turned"), [(3, lambda p: p[::-1, ::-1]), (6, lambda p: np.rot90(p, -1))])
def test_exif_orientation_is_applied(orientation, turned):
    exif = Image.Exif()
    exif[274] = orientation
    picture = coordinates(5, 9)
    np.testing.assert_array_equal(read_picture(encoded(Image.fromarray(picture), exif=exif)), turned(picture))


def test_transparency_lies_over_white():
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8)
    la = np.array([[[10, 255], [10, 0]]], np.uint8)
    np.testing.assert_array_equal(
        read_picture(encoded(Image.fromarray(rgba))), [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]
    )
    np.testing.assert_array_equal(read_picture(encoded(Image.fromarray(la))), [[[10, 10, 10], [255, 255, 255]]])


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_palette_is_looked_up_and_its_transparent_colour_lies_over_white(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    np.testing.assert_array_equal(read_picture(encoded(image)), [[[10, 20, 30], [40, 50, 60]]])
    data = encoded(image, transparency=transparency)
    np.testing.assert_array_equal(read_picture(data), [[[10, 20, 30], [255, 255, 255]]])


def test_greys_of_one_8_and_16_bits_become_rgb():
    grey = np.array([[0, 128, 255]], np.uint8)
    deep = np.array([[0, 128 * 256, 65535]], np.uint16)
    expected = grey[..., None].repeat(3, -1)
    np.testing.assert_array_equal(read_picture(encoded(Image.fromarray(grey))), expected)
    np.testing.assert_array_equal(read_picture(encoded(Image.fromarray(deep))), expected)
    np.testing.assert_array_equal(read_picture(encoded(Image.fromarray(deep.astype(np.int32)), "TIFF")), expected)
    np.testing.assert_array_equal(read_picture(encoded(Image.fromarray(grey > 200))), [[[0] * 3, [0] * 3, [255] * 3]])


def test_cmyk_becomes_rgb():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = read_picture(encoded(red, "JPEG", quality=95)).astype(int)
    assert np.abs(pixels - [255, 0, 0]).max() < 6


def test_floating_point_pixels_are_refused():
    with pytest.raises(BadPicture, match="no known range"):
        read_picture(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_a_damaged_file_is_a_bad_picture_that_names_file_and_reason(tmp_path):
    data = encoded(Image.fromarray(rng().integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    for name, content in (("cut.jpg", data[: len(data) // 2]), ("text.jpg", b"hello"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadPicture, match=name) as caught:
            read_picture(tmp_path / name)
        assert caught.value.name == str(tmp_path / name)
        assert caught.value.reason
    with pytest.raises(BadPicture, match=r"gone.jpg: FileNotFoundError"):
        read_picture(tmp_path / "gone.jpg")


def test_too_many_pixels_are_an_error(monkeypatch):
    data = encoded(Image.new("1", (10000, 9000)))
    with pytest.raises(BadPicture, match="pixels"):
        read_picture(data)
    monkeypatch.setattr(transforms, "MAX_PIXELS", 99)
    with pytest.raises(BadPicture, match="10x10 is more than 99 pixels; scale it down"):
        read_picture(encoded(Image.new("L", (10, 10))))


@pytest.mark.parametrize(
    ("h", "w", "flip", "expected"),
    [
        (64, 64, False, [64, 64, 0, 0, 64, 64]),
        (64, 100, False, [64, 100, 0, 18, 64, 64]),
        (64, 101, False, [64, 101, 0, 18, 64, 64]),
        (64, 101, True, [64, 101, 0, 19, 64, 64]),  # 101 - 64 - 18
        (300, 200, True, [300, 200, 16, 0, 64, 64]),  # scaled to 96 x 64
        (32, 48, False, [32, 48, 0, 16, 64, 64]),  # scaled up to 64 x 96
    ],
)
def test_time_ids_of_a_middle_crop_are_those_computed_by_hand(h, w, flip, expected):
    picture = np.zeros((h, w, 3), np.uint8)
    square, time_ids = resize_and_crop(picture, 64, center_crop=True, flip=flip, rng=rng())
    assert square.shape == (64, 64, 3)
    assert time_ids.dtype == np.float32
    assert time_ids.tolist() == expected


@pytest.mark.parametrize(("h", "w"), [(64, 200), (200, 64)])
@pytest.mark.parametrize("seed", range(4))
def test_the_crop_really_is_where_time_ids_say(h, w, seed):
    picture = coordinates(h, w)
    plain, ids = resize_and_crop(picture, 64, center_crop=False, flip=False, rng=rng(seed))
    top, left = ids[2:4].astype(int)
    np.testing.assert_array_equal(plain, picture[top : top + 64, left : left + 64])

    flipped, flipped_ids = resize_and_crop(picture, 64, center_crop=False, flip=True, rng=rng(seed))
    top, left = flipped_ids[2:4].astype(int)
    np.testing.assert_array_equal(flipped, picture[:, ::-1][top : top + 64, left : left + 64])
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


def test_a_flip_mirrors_the_recorded_crop():
    square, ids = resize_and_crop(coordinates(64, 200), 64, center_crop=False, flip=False, rng=rng(1))
    mirrored, mirrored_ids = mirror(square, ids)
    assert mirrored_ids[3] == 200 - 64 - ids[3]
    assert ids[3] != mirrored_ids[3]
    for again, expected in zip(mirror(mirrored, mirrored_ids), (square, ids), strict=True):
        np.testing.assert_array_equal(again, expected)


def test_random_crops_reach_both_ends():
    lefts = {resize_and_crop(np.zeros((8, 12, 3), np.uint8), 8, center_crop=False, flip=False, rng=rng(s))[1][3]
             for s in range(40)}  # fmt: skip
    assert lefts == {0, 1, 2, 3, 4}


def test_a_scaled_crop_is_the_crop_of_the_scaled_picture():
    picture = rng().integers(0, 256, (150, 287, 3), np.uint8)
    square, ids = resize_and_crop(picture, 64, center_crop=False, flip=False, rng=rng(2))
    whole = np.array(Image.fromarray(picture).resize((round(287 * 64 / 150), 64), Image.Resampling.LANCZOS))
    top, left = ids[2:4].astype(int)
    assert np.abs(square.astype(int) - whole[top : top + 64, left : left + 64]).max() <= 1


def test_a_picture_of_extreme_shape_costs_no_more_than_its_square():
    square, ids = resize_and_crop(np.zeros((1, 60000, 3), np.uint8), 512, center_crop=True, flip=True, rng=rng())
    assert square.shape == (512, 512, 3)
    assert ids[1] == 60000
