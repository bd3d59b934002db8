"""From the bytes of a picture's file to upright sRGB pixels, no larger than they are needed."""

import functools
import io
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from sdxl_eqx.data.bad import BadSample

logger = logging.getLogger("sdxl_eqx")

Size = tuple[int, int]
"""(height, width)."""

Box = tuple[float, float, float, float]
"""(top, left, bottom, right)."""

MAX_PIXELS = 89_478_485
"""Pictures of more decoded pixels are refused (Pillow's own bound, from which it warns of decompression bombs)."""

MAX_JPEG_PIXELS = 4 * MAX_PIXELS
"""What a JPEG may have before it is scaled down: its blocks all have to be read, whatever is made of them."""

MAX_SCANS = 500
"""Each scan of a progressive JPEG passes over the whole picture, and takes only a few bytes to ask for."""

HEADER_BYTES = 1 << 16
"""Most headers lie within so many bytes."""

FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is read besides JPEG; formats that call other programs or hold pictures within pictures are not."""

# Pillow would warn or raise before a JPEG can be scaled down; every picture here is held against the bounds above.
Image.MAX_IMAGE_PIXELS = None

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each EXIF orientation upright."""


@dataclass(frozen=True)
class Picture:
    """sRGB pixels of a picture, perhaps scaled down while decoding, and the size that its file has (upright)."""

    pixels: UInt8[np.ndarray, "H W 3"]
    size: Size
    box: Box | None = None
    """Where in `pixels` the picture lies, if not everywhere: scaled down, an edge may end within a pixel."""


@dataclass(frozen=True)
class _JpegHeader:
    size: Size
    channels: int
    is_progressive: bool
    orientation: int
    profile: bytes


def scaled_size(size: Size, target: Size) -> Size:
    """The smallest size of the picture's ratio that covers `target`; one of its sides is the target's."""
    h, w = size
    H, W = target
    scale = max(H / h, W / w)
    return max(H, round(h * scale)), max(W, round(w * scale))


def picture_size(read: Callable[[int], bytes], name: str) -> Size:
    """Size of a picture as it is seen upright, from its header alone.

    Args:
        read: gives the first n bytes of the file, or all of them for -1; asked for all only if the header needs it.
        name: what the data set calls the picture.

    Raises:
        BadSample: not a picture, or one that `read_picture` refuses for what its header says.
    """
    data = read(HEADER_BYTES)
    if len(data) >= HEADER_BYTES:
        try:
            return _size(data)
        except Exception as error:  # a header that was cut makes decoders raise anything
            logger.debug("%s: the header needs more than %d bytes (%s)", name, HEADER_BYTES, error)
        data = read(-1)
    try:
        return _size(data)
    except Exception as error:  # damaged headers make decoders raise anything, down to struct.error and IndexError
        raise BadSample(name, _reason(error)) from error


def read_picture(data: bytes, name: str, *, target: Size | None = None) -> Picture:
    """The picture in a file's bytes: sRGB, upright by its EXIF orientation, transparency over white.

    An embedded colour profile is converted to sRGB (relative colorimetric); one that is damaged, or of another kind
    than the pixels, is ignored, and the log says so. 16-bit channels keep their high byte; of an animation the first
    frame counts.

    Args:
        data: the whole file.
        name: what the data set calls the picture.
        target: size that a scaled picture has to cover. A JPEG is decoded at the least eighths that suffice for
            `scaled_size`; other formats come as they are.

    Raises:
        BadSample: truncated or damaged, no picture, too large, or of floating-point values.
    """
    try:
        return _read_jpeg(data, target) if _is_jpeg(data) else _read_other(data)
    except Exception as error:  # damaged files make decoders raise anything, down to struct.error and IndexError
        raise BadSample(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"its header is none of JPEG, {', '.join(FORMATS)}, or is damaged"
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8\xff")


def _size(data: bytes) -> Size:
    """Upright size from bytes that hold the header."""
    if _is_jpeg(data):
        header = _jpeg_header(data)
        return _turned(header.size, header.orientation)
    if len(data) == HEADER_BYTES and data[:4] in (b"II*\0", b"MM\0*"):
        raise ValueError("the tags of a TIFF may lie anywhere in it")  # and Pillow warns of what lies outside
    with _open(data) as image:
        return _turned((image.height, image.width), _orientation(_exif(image)))


def _turned(size: Size, orientation: int) -> Size:
    return size if orientation <= 4 else (size[1], size[0])


def _check(size: Size, limit: int) -> None:
    h, w = size
    if not 0 < h * w <= limit:
        raise ValueError(f"{w}x{h} must be at least one and at most {limit} pixels; scale it down")


def _open(data: bytes) -> Image.Image:
    """A picture other than a JPEG, of which only the header is read."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check((image.height, image.width), MAX_PIXELS)
    return image


def _exif(image: Image.Image) -> bytes:
    """EXIF of an opened picture; a TIFF has none, it is turned upright by Pillow."""
    exif = image.info.get("exif")
    return exif if isinstance(exif, bytes) else b""


def _orientation(exif: bytes) -> int:
    """Orientation (1 to 8) from EXIF; 1 where there is none or it is damaged, as viewers show it.

    Pillow's own reading warns of damaged EXIF, and warnings can be silenced only for all threads.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (offset,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == 0x0112:
                return value if value in _TURNS else 1
    except struct.error:
        return 1
    return 1


def _upright(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "H W 3"]:
    if orientation == 1:
        return pixels
    return np.array(Image.fromarray(pixels).transpose(_TURNS[orientation]))


def _jpeg_header(data: bytes) -> _JpegHeader:
    """What the segments before the pixels say (ITU T.81, annex B), within the bounds that are set here."""
    frame, marker, exif, profile = None, 0, b"", []
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # stands alone
            at += 2
            continue
        if marker in (0xD9, 0xDA):  # end of the picture, start of the pixels
            break
        length = int.from_bytes(data[at + 2 : at + 4])
        segment = data[at + 4 : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = (marker, *struct.unpack_from(">BHHB", segment))
        elif marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif = exif or segment
        elif marker == 0xE2 and segment.startswith(b"ICC_PROFILE\0"):
            profile.append(segment[12:])  # number of this part, count of the parts, the part
        at += 2 + length
    if frame is None or marker != 0xDA:
        raise ValueError("the JPEG ends before its pixels begin")
    kind, bits, h, w, channels = frame
    if bits != 8 or channels not in (1, 3, 4):
        raise ValueError(f"a JPEG must have 1, 3 or 4 channels of 8 bits, not {channels} of {bits}; save it again")
    # A progressive JPEG is held whole while it is decoded, at whatever scale.
    is_progressive = kind in (0xC2, 0xC6, 0xCA, 0xCE)
    _check((h, w), MAX_PIXELS if is_progressive else MAX_JPEG_PIXELS)
    joined = b"".join(part[2:] for part in sorted(profile))
    return _JpegHeader((h, w), channels, is_progressive, _orientation(exif), joined)


def _read_jpeg(data: bytes, target: Size | None) -> Picture:
    header = _jpeg_header(data)
    if header.is_progressive and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ValueError(f"a progressive JPEG may have at most {MAX_SCANS} scans, not {scans}; save it again")
    upright = _turned(header.size, header.orientation)
    eighths = 8
    if target is not None:
        needed = _turned(scaled_size(upright, target), header.orientation)
        # Seven eighths take as long as all and are less exact.
        enough = (m for m in (1, 2, 3, 4, 5, 6) if _at_least(_eighths(header.size, m), needed))
        eighths = next(enough, 8)
    _check(_eighths(header.size, eighths), MAX_PIXELS)
    image, eighths = _decode_jpeg(data, header, eighths)
    pixels = image if isinstance(image, np.ndarray) else _to_srgb(image, header.profile)
    pixels = _upright(pixels, header.orientation)
    return Picture(pixels, upright, _box(pixels.shape[:2], upright, eighths, header.orientation))


def _eighths(size: Size, m: int) -> Size:
    """Size of a JPEG decoded at m eighths: libjpeg rounds up."""
    return -(-size[0] * m // 8), -(-size[1] * m // 8)


def _at_least(size: Size, other: Size) -> bool:
    return size[0] >= other[0] and size[1] >= other[1]


def _box(decoded: Size, size: Size, eighths: int, orientation: int) -> Box | None:
    """Where the picture lies in the pixels decoded at m eighths: the end of a file's row and column may be padding."""
    (H, W), (h, w) = decoded, (side * eighths / 8 for side in size)
    if (h, w) == (H, W):
        return None
    top = H - h if orientation in (3, 4, 7, 8) else 0.0
    left = W - w if orientation in (2, 3, 6, 7) else 0.0
    return top, left, top + h, left + w


def _decode_jpeg(
    data: bytes, header: _JpegHeader, eighths: int
) -> tuple[UInt8[np.ndarray, "h w 3"] | Image.Image, int]:
    """Pixels in sRGB or a picture that is still to be converted, and the eighths that it really came at."""
    h, w = _eighths(header.size, eighths)
    is_rgb = header.channels == 3 or (header.channels == 1 and not header.profile)
    space = "RGB" if is_rgb else "GRAY" if header.channels == 1 else "CMYK"
    try:
        decoded = simplejpeg.decode_jpeg(data, space, min_height=h, min_width=w, strict=True)
    except ValueError as error:
        if any(word in str(error) for word in ("Corrupt", "Premature")):
            raise
        return _decode_odd_jpeg(data, header, eighths)
    if decoded.shape[:2] != (h, w):
        raise ValueError(f"the JPEG's headers contradict each other: {w}x{h} and {decoded.shape[1::-1]}")
    if is_rgb and (not header.profile or _transform(header.profile, "RGB") is None):
        return decoded, eighths
    if space == "CMYK":  # JPEGs hold what is left of the light (Adobe's convention), Pillow the ink
        return Image.frombuffer("CMYK", (w, h), np.ascontiguousarray(255 - decoded)), eighths
    return Image.fromarray(decoded.squeeze(-1) if space == "GRAY" else decoded), eighths


def _decode_odd_jpeg(data: bytes, header: _JpegHeader, eighths: int) -> tuple[Image.Image, int]:
    """A JPEG that libjpeg-turbo's simple interface refuses, such as one of unusual subsampling, decoded by Pillow."""
    divisor = 8 if eighths == 1 else 4 if eighths == 2 else 2 if eighths <= 4 else 1
    h, w = header.size
    image = JpegImageFile(io.BytesIO(data))
    if image.size != (w, h):
        raise ValueError(f"the JPEG's headers contradict each other: {w}x{h} and {image.size}")
    image.draft(image.mode, (max(w // divisor, 1), max(h // divisor, 1)))
    divisor = next(d for d in (8, 4, 2, 1) if image.size == (-(-w // d), -(-h // d)))
    image.load()
    return image, 8 // divisor


def _read_other(data: bytes) -> Picture:
    with _open(data) as image:
        orientation = _orientation(_exif(image))
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range; save it with 8 bits a channel")
        profile = image.info.get("icc_profile") or b""
        image.load()
        pixels = _upright(_to_srgb(image, profile), orientation)
    return Picture(pixels, (pixels.shape[0], pixels.shape[1]))


def _to_srgb(image: Image.Image, profile: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """sRGB of a picture of any mode but floating point, transparency over white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    alpha = None
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode != "CMYK":
        image = image.convert("RGB")
    if is_grey:
        image = image.getchannel("R") if image.mode == "RGB" else image
    image = _apply(profile, image)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return np.array(image)


def _apply(profile: bytes, image: Image.Image) -> Image.Image:
    """RGB of a picture of mode L, RGB or CMYK."""
    transform = _transform(profile, image.mode) if profile else None
    return image.convert("RGB") if transform is None else transform.apply(image.convert(transform.input_mode))


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What takes pixels of a mode (L, RGB, CMYK) to sRGB, or None where they are to be kept as they are.

    A transform may be used by many threads at once: Little CMS changes nothing in it.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.tobytes()[16:20].decode("latin-1").strip()  # the header's field of the data colour space
        transform_mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space, "")
        if transform_mode != mode and (transform_mode, mode) != ("RGB", "L"):
            raise ValueError(f"it is one of {space!r} for {mode} pixels")
        transform = ImageCms.ImageCmsTransform(
            source,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            transform_mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
    except Exception as error:  # Pillow raises OSError, ValueError and PyCMSError for what Little CMS cannot read
        logger.warning("a colour profile of %d bytes is ignored, colours are taken for sRGB: %s", len(profile), error)
        return None
    return None if _is_srgb(transform) else transform


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform changes no colour by more than the roundings of an sRGB profile's tables."""
    if transform.input_mode == "CMYK":
        return False
    levels = np.arange(0, 256, 15).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    grid = Image.fromarray(colours if transform.input_mode == "RGB" else colours[..., 0])
    expected, converted = (np.asarray(image).astype(int) for image in (grid.convert("RGB"), transform.apply(grid)))
    return bool(np.abs(converted - expected).max() <= 2)
