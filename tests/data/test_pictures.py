import io
import logging
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from sdxl_eqx.data import pictures
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.pictures import picture_size, read_picture, scaled_size


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def coordinates(h: int, w: int) -> np.ndarray:
    """A picture whose red is the row and green the column of each pixel."""
    rows, columns = np.mgrid[:h, :w].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)


def photo(h: int, w: int, seed: int = 0) -> np.ndarray:
    """Smooth fields with detail whose amplitude falls as in photographs."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    f[0, 0] = np.inf
    fields = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(h, w))) / f**1.2, s=(h, w)) for _ in range(3)]
    light, red, blue = (field / field.std() for field in fields)
    rgb = np.stack([45 * light + 12 * red, 45 * light - 6 * red - 6 * blue, 45 * light + 12 * blue], axis=-1)
    return np.clip(128 + rgb + rng.normal(size=rgb.shape), 0, 255).astype(np.uint8)


def pixels(data: bytes) -> np.ndarray:
    return read_picture(data, "a picture").pixels


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def size_of(data: bytes) -> tuple[int, int]:
    return picture_size(lambda n: data if n < 0 else data[:n], "a picture")


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


def icc(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2.1) of the tags."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x" + bytes(79), b"cprt": b"text" + bytes(5), **tags}
    tags[b"wtpt"] = xyz(0.9505, 1.0, 1.0891)
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = bytes(8) + struct.pack(">I", 0x02100000) + (b"prtr" if space == b"CMYK" else b"mntr") + space + pcs
    head += bytes(12) + b"acsp" + bytes(28) + xyz(0.9642, 1.0, 0.8249)[8:] + bytes(48)
    return struct.pack(">I", 128 + len(table) + len(body)) + head[4:] + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(value * 256))


def matrix_profile(red, green, blue, power: float, padding: int = 0) -> bytes:
    primaries = {b"rXYZ": xyz(*red), b"gXYZ": xyz(*green), b"bXYZ": xyz(*blue)}
    tags = {b"pad ": b"data" + bytes(padding), **primaries}
    return icc(b"RGB ", b"XYZ ", {**tags, **{name: gamma(power) for name in (b"rTRC", b"gTRC", b"bTRC")}})


def cmyk_profile() -> bytes:
    """A print profile of a 2 x 2 x 2 x 2 table into Lab: each ink darkens, and they tint a little."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(16, 4)
    lab = np.array([255, 128, 128]) + inks @ np.array([[-60, -40, -50], [-60, 70, 0], [-20, 0, 80], [-150, 0, 0]])
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(np.eye(3, dtype=int) * 65536).ravel())
    return icc(b"CMYK", b"Lab ", {b"A2B0": table + ramp * 4 + lab.clip(0, 255).astype(np.uint8).tobytes() + ramp * 3})


DISPLAY_P3_PRIMARIES = (0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)
DISPLAY_P3 = matrix_profile(*DISPLAY_P3_PRIMARIES, 2.2)
ADOBE_RGB = matrix_profile((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446), 2.2)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY = icc(b"GRAY", b"XYZ ", {b"kTRC": gamma(1.0)})


def converted(image: Image.Image, profile: bytes) -> np.ndarray:
    """To sRGB by Pillow's one-call interface."""
    srgb = ImageCms.createProfile("sRGB")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return np.array(ImageCms.profileToProfile(image, source, srgb, ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000", "AVIF"])
def test_an_rgb_picture_comes_back_as_it_is(kind):
    picture = coordinates(50, 90)
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    data = encoded(Image.fromarray(picture), kind, **options)
    assert size_of(data) == read_picture(data, "a", target=(5, 5)).size == (50, 90)
    assert np.abs(pixels(data).astype(int) - picture).max() <= (2 if kind == "AVIF" else 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_made_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(coordinates(40, 72)), kind, exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    read = read_picture(data, "a")
    assert np.abs(read.pixels.astype(int) - expected).max() <= 4
    assert size_of(data) == read.size == expected.shape[:2]
    assert read.box is None
    if kind == "JPEG":  # bytes that may fill the space between segments change nothing
        filled = data.replace(b"\xff\xe1", b"\xff\xff\xe1")
        np.testing.assert_array_equal(pixels(filled), read.pixels)
        assert size_of(filled) == read.size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_that_is_scaled_down_lies_where_its_box_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = photo(403, 301)
    data = encoded(Image.fromarray(whole), "JPEG", quality=95, exif=exif)
    read = read_picture(data, "a", target=(100, 100) if orientation < 5 else (100, 120))
    assert read.box is not None and read.pixels.shape[0] < read.size[0] / 2
    top, left, bottom, right = read.box
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    small = Image.fromarray(read.pixels).resize((80, 90), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    assert psnr(np.array(small), np.array(upright.resize((80, 90), Image.Resampling.LANCZOS))) > 42


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0??",
        b"Exif\0\0II*\0",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0",  # an orientation of 9
    ],
)
def test_damaged_exif_leaves_a_picture_as_it_is(exif):
    data = encoded(Image.fromarray(coordinates(16, 24)), "JPEG", exif=exif)
    np.testing.assert_array_equal(pixels(data), by_pillow(data[:2] + data[2:].replace(exif, bytes(len(exif)))))
    assert size_of(data) == (16, 24)


def test_transparency_lies_over_white():
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8)
    la = np.array([[[10, 255], [10, 0], [10, 51]]], np.uint8)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        data = encoded(Image.fromarray(rgba), kind, **options)
        np.testing.assert_array_equal(pixels(data), [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]])
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(la))), [[[10] * 3, [255] * 3, [206] * 3]])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_lies_over_white(mode):
    image = Image.new(mode, (2, 1), "black")
    image.putpixel((1, 0), (9,) * len(mode) if mode == "RGB" else 9)
    data = encoded(image, transparency=9 if mode == "L" else (9, 9, 9))
    np.testing.assert_array_equal(pixels(data), [[[0, 0, 0], [255, 255, 255]]])


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 1), ("PNG", bytes([255, 0])), ("GIF", 1)])
def test_a_palette_is_looked_up_and_its_transparent_colour_lies_over_white(kind, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    np.testing.assert_array_equal(pixels(encoded(image, kind)), [[[10, 20, 30], [40, 50, 60]]])
    data = encoded(image, kind, transparency=transparency)
    np.testing.assert_array_equal(pixels(data), [[[10, 20, 30], [255, 255, 255]]])


def test_greys_of_one_8_and_16_bits_become_rgb():
    grey = np.array([[0, 128, 255]], np.uint8)
    deep = np.array([[0, 128 * 256 + 255, 65535]], np.uint16)
    expected = grey[..., None].repeat(3, -1)
    for data in (
        encoded(Image.fromarray(grey)),
        encoded(Image.fromarray(deep)),
        encoded(Image.fromarray(deep), "TIFF"),
        encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
    ):
        np.testing.assert_array_equal(pixels(data), expected)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey > 200))), [[[0] * 3, [0] * 3, [255] * 3]])
    square = Image.fromarray(photo(16, 16)).convert("L")
    data = encoded(square, "JPEG")
    np.testing.assert_array_equal(pixels(data), by_pillow(data))


def test_16_bit_rgb_keeps_its_high_bytes():
    deep = np.random.default_rng(0).integers(0, 65536, (3, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 5, 3, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    np.testing.assert_array_equal(pixels(data), deep >> 8)


def with_adobe_transform(data: bytes, transform: int) -> bytes:
    marked = bytearray(data)
    marked[data.index(b"Adobe") + 11] = transform
    return bytes(marked)


@pytest.mark.parametrize("transform", [0, 2])
def test_cmyk_and_ycck_jpegs_of_inverted_inks_become_rgb(transform):
    inks = np.random.default_rng(0).integers(0, 256, (4, 4, 4), np.uint8).repeat(8, 0).repeat(8, 1)
    data = with_adobe_transform(encoded(Image.frombuffer("CMYK", (32, 32), inks), "JPEG", quality=95), transform)
    np.testing.assert_array_equal(pixels(data), by_pillow(data))
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels(encoded(red, "JPEG")).astype(int) - [255, 0, 0]).max() < 6
    np.testing.assert_array_equal(pixels(encoded(red, "TIFF")), np.broadcast_to([255, 0, 0], (16, 16, 3)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 3
    assert size_of(data) == (10, 20)


@pytest.mark.parametrize("profile", [DISPLAY_P3, ADOBE_RGB], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("TIFF", {})])
def test_colours_of_an_embedded_profile_become_those_of_srgb(profile, kind, options):
    image = Image.fromarray(photo(48, 64))
    data = encoded(image, kind, icc_profile=profile, **options)
    expected = converted(Image.open(io.BytesIO(data)), profile)
    np.testing.assert_array_equal(pixels(data), expected)
    assert np.abs(expected.astype(int) - by_pillow(data)).max() > 10


def test_a_profile_that_a_jpeg_has_in_parts_is_put_together():
    parted = matrix_profile(*DISPLAY_P3_PRIMARIES, 2.2, padding=70000)
    image = Image.fromarray(photo(48, 64))
    data = encoded(image, "JPEG", icc_profile=parted)
    np.testing.assert_array_equal(pixels(data), pixels(encoded(image, "JPEG", icc_profile=DISPLAY_P3)))


def test_profiles_of_grey_rgb_over_grey_transparent_and_cmyk_pictures_are_converted():
    colours = Image.fromarray(photo(32, 32))
    grey = colours.convert("L")
    for kind in ("PNG", "JPEG"):
        data = encoded(grey, kind, icc_profile=GREY)
        opened = Image.open(io.BytesIO(data))
        np.testing.assert_array_equal(pixels(data), converted(opened, GREY))
        data = encoded(grey, kind, icc_profile=ADOBE_RGB)
        np.testing.assert_array_equal(pixels(data), converted(opened.convert("RGB"), ADOBE_RGB))
    clear = colours.copy()
    clear.putalpha(Image.new("L", clear.size, 51))
    over_white = 255 - (255 - converted(colours, DISPLAY_P3).astype(float)) * 0.2
    assert np.abs(pixels(encoded(clear, icc_profile=DISPLAY_P3)) - over_white).max() <= 0.6
    inks = colours.convert("CMYK")
    for kind in ("TIFF", "JPEG"):
        data = encoded(inks, kind, icc_profile=cmyk_profile())
        expected = converted(Image.open(io.BytesIO(data)), cmyk_profile())
        np.testing.assert_array_equal(pixels(data), expected)
        assert np.abs(expected.astype(int) - by_pillow(data)).max() > 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_srgb_profile_changes_nothing(kind):
    image = Image.fromarray(photo(32, 32))
    np.testing.assert_array_equal(pixels(encoded(image, kind, icc_profile=SRGB)), pixels(encoded(image, kind)))
    assert pictures._transform(SRGB, "RGB") is None  # nor is any time spent on it


@pytest.mark.parametrize("profile", [b"nonsense", DISPLAY_P3[:200], GREY], ids=["none", "cut", "of greys"])
def test_a_profile_that_does_not_serve_is_ignored_and_the_log_says_so_once(profile, caplog):
    pictures._transform.cache_clear()
    image = Image.fromarray(photo(32, 32))
    with caplog.at_level(logging.WARNING, "sdxl_eqx"):
        for kind in ("PNG", "JPEG", "PNG"):
            np.testing.assert_array_equal(
                pixels(encoded(image, kind, icc_profile=profile)), pixels(encoded(image, kind))
            )
    assert [f"profile of {len(profile)} bytes is ignored" in message for message in caplog.messages] == [True]


def test_floating_point_pixels_are_refused():
    with pytest.raises(BadSample, match=r"^a picture: floating-point pixels have no known range; save it"):
        pixels(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_what_follows_a_jpeg_in_its_file_does_not_matter():
    data = encoded(Image.fromarray(photo(64, 48)), "JPEG")
    np.testing.assert_array_equal(pixels(data + b"\xff\xd8\xff\xda a motion picture" * 600), pixels(data))


@pytest.mark.parametrize("space", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(256, 256), (301, 403), (403, 301)])
def test_a_jpeg_that_is_scaled_down_looks_as_if_it_had_been_decoded_whole(space, size):
    image = Image.fromarray(photo(*size)).convert(space)
    data = encoded(image, "JPEG", quality=90)
    read = read_picture(data, "a", target=(96, 128))
    scaled_h, scaled_w = scaled_size(size, (96, 128))
    assert read.size == size_of(data) == size
    assert size > read.pixels.shape[:2] >= (scaled_h, scaled_w)
    top, left, bottom, right = read.box or (0, 0, *read.pixels.shape[:2])
    crop = (left, top, right, bottom)
    small = Image.fromarray(read.pixels).resize((scaled_w, scaled_h), Image.Resampling.LANCZOS, box=crop)
    whole = Image.open(io.BytesIO(data)).resize((scaled_w, scaled_h), Image.Resampling.LANCZOS).convert("RGB")
    assert psnr(np.array(small), np.array(whole)) > 36


@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.tuples(st.integers(1, 90), st.integers(1, 90)))
@settings(max_examples=60)
def test_a_jpeg_is_never_decoded_smaller_than_its_scaled_size(size, target):
    data = encoded(Image.new("RGB", size[::-1], "red"), "JPEG")
    read = read_picture(data, "a", target=target)
    assert read.size == size
    least = [min(side, scaled) for side, scaled in zip(size, scaled_size(size, target), strict=True)]
    assert all(side >= scaled for side, scaled in zip(read.pixels.shape, least, strict=False))
    assert np.abs(read.pixels.astype(int) - [254, 0, 0]).max() <= 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_at_the_least_eighths_that_suffice(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (240, 160)), "JPEG", exif=exif)
    for side, decoded in ((20, 20), (21, 40), (60, 60), (80, 80), (81, 100), (120, 120), (121, 160), (200, 160)):
        shape = read_picture(data, "a", target=(side, side)).pixels.shape[:2]
        assert sorted(shape) == [decoded, decoded * 3 // 2]


def test_a_size_needs_the_whole_file_only_where_its_header_is_long():
    asked = []

    def size(data: bytes) -> tuple[int, int]:
        asked.clear()

        def read(n: int) -> bytes:
            asked.append(n)
            return data if n < 0 else data[:n]

        return picture_size(read, "a picture")

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 220, 3), np.uint8))
    for kind, asks in (("JPEG", [65536]), ("PNG", [65536]), ("BMP", [65536]), ("TIFF", [65536, -1])):
        options = {"quality": 100} if kind == "JPEG" else {}
        data = encoded(noise, kind, **options)
        assert len(data) > 65536
        assert size(data) == (200, 220)
        assert asked == asks
    data = encoded(noise, "JPEG", icc_profile=DISPLAY_P3 + bytes(100_000))
    assert size(data) == (200, 220)
    assert asked == [65536, -1]
    assert size(encoded(Image.new("L", (3, 2)))) == (2, 3)
    assert asked == [65536]
    with pytest.raises(BadSample, match="none of JPEG"):
        size(b"x" * 70000)


def test_what_reading_a_file_raises_is_not_hidden():
    bad = BadSample("a.jpg", "it is gone")

    def read(_: int) -> bytes:
        raise bad

    with pytest.raises(BadSample) as caught:
        picture_size(read, "a.jpg")
    assert caught.value is bad


def test_many_threads_read_what_one_reads():
    image = Image.fromarray(photo(160, 200))
    files = [
        encoded(image, kind, **options)
        for kind in ("JPEG", "PNG", "WEBP")
        for options in ({}, {"icc_profile": DISPLAY_P3}, {"icc_profile": ADOBE_RGB})
    ]
    expected = [read_picture(data, "a", target=(64, 64)).pixels for data in files]
    pictures._transform.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: read_picture(files[i % len(files)], "a", target=(64, 64)).pixels, range(180)))
    for i, array in enumerate(read):
        np.testing.assert_array_equal(array, expected[i % len(files)])
