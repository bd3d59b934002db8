import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdxl_eqx.data import pictures
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.pictures import picture_size, read_picture

TARGET = (20, 20)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def detail(h: int, w: int) -> Image.Image:
    """A picture with no pixel of a decoder's filling."""
    values = np.random.default_rng(0).integers(0, 256, (h // 4, w // 4, 3), np.uint8)
    return Image.fromarray(values).resize((w, h), Image.Resampling.BILINEAR)


def marked() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    return {"exif": exif, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}


RGB = detail(52, 84)
FILES = {
    "JPEG": encoded(RGB, "JPEG", quality=85),
    "JPEG with EXIF and profile": encoded(RGB, "JPEG", **marked()),
    "progressive JPEG": encoded(RGB, "JPEG", progressive=True),
    "JPEG with restart markers": encoded(RGB, "JPEG", restart_marker_rows=1),
    "grey JPEG": encoded(RGB.convert("L"), "JPEG"),
    "CMYK JPEG": encoded(RGB.convert("CMYK"), "JPEG"),
    "JPEG that Pillow decodes": encoded(RGB, "JPEG").replace(b"JFIF\0\x01", b"JFIF\0\x09"),
    "PNG": encoded(RGB, "PNG", **marked()),
    "palette PNG": encoded(RGB.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "16-bit PNG": encoded(Image.fromarray(np.asarray(RGB)[..., 0].astype(np.uint16) * 257), "PNG"),
    "APNG": encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]),
    "lossy WebP": encoded(RGB, "WEBP", quality=80, **marked()),
    "lossless WebP": encoded(RGB.convert("RGBA"), "WEBP", lossless=True),
    "animated WebP": encoded(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)]),
    "GIF": encoded(RGB, "GIF"),
    "animated GIF": encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)], transparency=0),
    "BMP": encoded(RGB, "BMP"),
    "TIFF": encoded(RGB, "TIFF", **marked()),
    "LZW TIFF": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "JPEG TIFF": encoded(RGB, "TIFF", compression="jpeg"),
    "AVIF": encoded(RGB, "AVIF", quality=60, speed=10, **marked()),
    "JPEG 2000": encoded(RGB, "JPEG2000"),
    "PPM": encoded(RGB, "PPM"),
}


def pixels(data: bytes) -> np.ndarray:
    return read_picture(data, "a picture").pixels


def size_of(data: bytes) -> tuple[int, int]:
    return picture_size(lambda n: data if n < 0 else data[:n], "a picture")


def read_or_bad(data: bytes) -> np.ndarray | None:
    """Pixels of what can be read, nothing for a bad sample; any other end is a failure."""
    try:
        size = picture_size(lambda n: data if n < 0 else data[:n], "fuzzed")
    except BadSample as bad:
        assert bad.name == "fuzzed" and bad.reason
        size = None
    try:
        picture = read_picture(data, "fuzzed", target=TARGET)
    except BadSample as bad:
        assert bad.name == "fuzzed" and bad.reason
        return None
    assert size == picture.size
    return picture.pixels


def test_a_damaged_file_is_a_bad_sample_that_names_it_and_the_reason():
    jpeg = encoded(detail(64, 64), "JPEG")
    png = encoded(detail(64, 64), "PNG")
    for data, reason in (
        (jpeg[: len(jpeg) // 2], "Premature end of JPEG file"),
        (jpeg[: len(jpeg) // 2] + b"\xff\xd9", "Corrupt JPEG data"),
        (jpeg[:100], "the JPEG ends before its pixels begin"),
        (png[: len(png) // 2], "truncated"),
        (b"hello", "its header is none of JPEG, PNG, .*, or is damaged"),
        (b"", "its header is none of JPEG"),
    ):
        with pytest.raises(BadSample, match=reason) as caught:
            read_picture(data, "cut.jpg")
        assert caught.value.name == "cut.jpg"


def test_formats_that_start_other_programs_are_not_read():
    with pytest.raises(BadSample, match="its header is none of"):
        pixels(encoded(Image.new("RGB", (4, 4)), "EPS"))
    with pytest.raises(BadSample, match="its header is none of"):
        size_of(encoded(Image.new("RGB", (16, 16)), "ICO"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_anywhere_is_whole_or_a_bad_sample(name):
    data = FILES[name]
    whole = read_or_bad(data)
    assert whole is not None
    # Pillow, unlike simplejpeg, takes a JPEG for whole that was cut and then given an end.
    tails = (b"", b"\xff\xd9") if data[0] == 0xFF and "Pillow" not in name else (b"",)
    rng = np.random.default_rng(0)
    for end in {*range(40), *rng.integers(0, len(data), 150).tolist(), *range(len(data) - 12, len(data))}:
        for tail in tails:
            read = read_or_bad(data[:end] + tail)
            if read is not None:  # what is missing held no pixels
                np.testing.assert_array_equal(read, whole, str(end))


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_damaged_bytes_is_read_or_a_bad_sample(name):
    data = FILES[name]
    rng = np.random.default_rng(1)
    for i in range(200):
        damaged = np.frombuffer(data, np.uint8).copy()
        reach = min(len(data), 80) if i % 2 else len(data)  # every other time the header
        places = rng.integers(0, reach, rng.integers(1, 6))
        damaged[places] = rng.integers(0, 256, len(places))
        read_or_bad(damaged.tobytes())


def plain_jpeg(h: int, w: int, sampling: tuple[int, int, int]) -> bytes:
    """A JPEG of one grey whose three channels have the sampling factors (4 bits across, 4 down): two bits a block."""
    across, down = (max(factor >> shift & 15 for factor in sampling) for shift in (4, 0))
    blocks = -(-h // (8 * down)) * -(-w // (8 * across)) * sum((factor >> 4) * (factor & 15) for factor in sampling)
    frame = struct.pack(">BHHB", 8, h, w, 3) + b"".join(bytes([i, factor, 0]) for i, factor in enumerate(sampling))
    code = b"\x01" + bytes(15) + b"\0"  # one code, of one bit: no difference, or the end of the block
    segments = [
        (0xDB, b"\0" + b"\x01" * 64),
        (0xC0, frame),
        (0xC4, b"\x00" + code),
        (0xC4, b"\x10" + code),
        (0xDA, b"\x03" + b"\0\0\1\0\2\0" + b"\0\x3f\0"),
    ]
    head = b"".join(struct.pack(">BBH", 0xFF, kind, 2 + len(body)) + body for kind, body in segments)
    return b"\xff\xd8" + head + bytes(-(-2 * blocks // 8)) + b"\xff\xd9"


@pytest.mark.parametrize("sampling", [(0x22, 0x11, 0x11), (0x31, 0x11, 0x11), (0x22, 0x12, 0x21), (0x14, 0x11, 0x11)])
def test_jpegs_of_unusual_subsampling_are_read_and_scaled_as_well(sampling):
    data = plain_jpeg(105, 201, sampling)
    assert size_of(data) == (105, 201)
    for target, most in ((None, 1), ((100, 100), 1), ((52, 90), 1 / 2), ((26, 40), 1 / 4), ((13, 10), 1 / 8)):
        read = read_picture(data, "a", target=target)
        assert read.size == (105, 201)
        assert read.pixels.shape[:2] == (-(-105 * most // 1), -(-201 * most // 1))
        assert (read.box is None) == (most == 1)
        assert (read.pixels == 128).all()


def test_a_jpeg_of_an_unknown_revision_is_read_by_pillow_and_scaled_as_well():
    whole = encoded(detail(105, 201), "JPEG", quality=95)
    data = whole.replace(b"JFIF\0\x01", b"JFIF\0\x09")
    assert data != whole
    np.testing.assert_array_equal(pixels(data), pixels(whole))
    for target in ((100, 100), (52, 90), (40, 40), (26, 40), (13, 10), (3, 3)):
        read, expected = (read_picture(some, "a", target=target) for some in (data, whole))
        assert read.size == (105, 201)
        shape, least = read.pixels.shape[:2], expected.pixels.shape[:2]
        assert all(a >= b for a, b in zip(shape, least, strict=True))
        if shape == least:
            np.testing.assert_array_equal(read.pixels, expected.pixels)
            assert read.box == expected.box
    with pytest.raises(BadSample, match="truncated"):
        pixels(data[: len(data) // 2])


def test_the_bound_of_pixels_holds_after_a_jpeg_is_scaled_down(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    monkeypatch.setattr(pictures, "MAX_JPEG_PIXELS", 4000)
    image = detail(60, 60)
    data = encoded(image, "JPEG")
    assert size_of(data) == (60, 60)
    with pytest.raises(BadSample, match="60x60 must be at least one and at most 1000 pixels; scale it down"):
        pixels(data)
    assert read_picture(data, "a", target=(30, 30)).pixels.shape == (30, 30, 3)
    with pytest.raises(BadSample, match=r"45x45 .* 1000 pixels"):
        read_picture(data, "a", target=(40, 40))
    with pytest.raises(BadSample, match=r"64x64 .* at most 4000 pixels"):
        read_picture(encoded(Image.new("RGB", (64, 64)), "JPEG"), "a", target=(8, 8))
    for whole in (encoded(image, "JPEG", progressive=True), encoded(image, "PNG"), encoded(image, "GIF")):
        for read in (size_of, lambda data: read_picture(data, "a", target=(8, 8))):
            with pytest.raises(BadSample, match=r"60x60 .* 1000 pixels"):
                read(whole)


def test_a_progressive_jpeg_may_not_have_endless_scans():
    data = encoded(detail(64, 64), "JPEG", progressive=True)
    assert pixels(data).shape == (64, 64, 3)
    scan = data[data.index(b"\xff\xda") : data.rindex(b"\xff\xd9")]
    with pytest.raises(BadSample, match="at most 500 scans, not"):
        pixels(data[:-2] + scan * 500 + b"\xff\xd9")


def test_a_jpeg_of_200_megapixels_is_read_where_it_is_needed_small():
    data = plain_jpeg(12240, 16320, (0x22, 0x11, 0x11))
    assert size_of(data) == (12240, 16320)
    read = read_picture(data, "a", target=(64, 64))
    assert read.size == (12240, 16320)
    assert read.pixels.shape == (1530, 2040, 3)
    with pytest.raises(BadSample, match=r"16320x12240 must be .* at most 89478485 pixels"):
        pixels(data)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    """The data with the first place of some bytes changed."""
    assert old in data
    return data.replace(old, new, 1)


def claims(side: int) -> dict[str, bytes]:
    """Small files of each format whose headers claim side x side pixels."""
    small = Image.new("RGB", (61, 67))
    two = struct.pack
    png = encoded(small, "PNG")
    return {
        "JPEG": replaced(encoded(small, "JPEG"), two(">HH", 67, 61), two(">HH", side, side)),
        "PNG": png[:8] + chunk(b"IHDR", two(">II", side, side) + png[24:29]) + png[33:],
        "GIF": replaced(encoded(small, "GIF"), two("<HH", 61, 67), two("<HH", side, side)),
        "BMP": replaced(encoded(small, "BMP"), two("<ii", 61, 67), two("<ii", side, side)),
        "TIFF": replaced(
            replaced(encoded(small, "TIFF"), two("<HHII", 256, 4, 1, 61), two("<HHII", 256, 4, 1, side)),
            two("<HHII", 257, 4, 1, 67),
            two("<HHII", 257, 4, 1, side),
        ),
        "JPEG2000": replaced(encoded(small, "JPEG2000"), two(">II", 67, 61), two(">II", side, side)),
        "PPM": replaced(encoded(small, "PPM"), b"61 67", f"{side} {side}".encode()),
    }


@pytest.mark.parametrize("name", claims(1))
def test_a_header_that_claims_billions_of_pixels_is_refused_at_once(name):
    data = claims(60000)[name]
    start = time.monotonic()
    for read in (size_of, pixels, lambda data: read_picture(data, "a", target=TARGET)):
        with pytest.raises(
            BadSample, match=r"60000x60000 must be at least one and at most [0-9]+ pixels; scale it down"
        ):
            read(data)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("name", ["JPEG", "PNG", "BMP", "PPM"])
def test_a_picture_of_no_pixels_is_refused(name):
    for read in (size_of, pixels):
        with pytest.raises(BadSample):
            read(claims(0)[name])
