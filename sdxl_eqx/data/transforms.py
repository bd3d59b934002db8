"""From a picture file to the square the model sees, and the numbers that tell the model how it was cut."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485
"""Larger pictures are refused (Pillow's own bound, from which it warns of decompression bombs)."""


class BadPicture(ValueError):
    """A picture that cannot be used; `name` is its file, `reason` is why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def read_picture(source: Path | bytes) -> UInt8[np.ndarray, "H W 3"]:
    """sRGB pixels in 0..255 of a file or of its bytes: upright by its EXIF orientation, transparency over white.

    16-bit greys keep their high byte; of an animation the first frame counts.

    Raises:
        BadPicture: truncated, no picture, larger than `MAX_PIXELS`, or of floating-point values.
    """
    name = str(source) if isinstance(source, Path) else "picture in memory"
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels; scale it down")
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # damaged files make decoders raise anything, down to struct.error and IndexError
        raise BadPicture(name, f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 bits a channel")
    if image.mode.startswith("I"):
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(
    picture: UInt8[np.ndarray, "H W 3"],
    resolution: int,
    *,
    center_crop: bool,
    flip: bool,
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "R R 3"], Float32[np.ndarray, " 6"]]:
    """A square of the picture, whose shorter side is first scaled to `resolution`, and its `time_ids`.

    The square is the middle or drawn from `rng`; a flip mirrors it and the recorded left edge. The ids are
    (original height, original width, crop top, crop left, resolution, resolution), the crop in scaled pixels: what
    diffusers' `train_text_to_image_sdxl.py` records.
    """
    h, w = picture.shape[:2]
    scaled_h, scaled_w = _scaled(h, w, resolution)
    if center_crop:
        top, left = (scaled_h - resolution) // 2, (scaled_w - resolution) // 2
    else:
        top, left = (int(rng.integers(side - resolution + 1)) for side in (scaled_h, scaled_w))
    if (scaled_h, scaled_w) == (h, w):
        square = np.ascontiguousarray(picture[top : top + resolution, left : left + resolution])
    else:  # only the square is computed: a long panorama never exists at its full scaled width
        y, x = h / scaled_h, w / scaled_w
        box = (left * x, top * y, (left + resolution) * x, (top + resolution) * y)
        scaled = Image.fromarray(picture).resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
        square = np.array(scaled)
    time_ids = np.array([h, w, top, left, resolution, resolution], np.float32)
    return mirror(square, time_ids) if flip else (square, time_ids)


def mirror(
    square: UInt8[np.ndarray, "R R 3"], time_ids: Float32[np.ndarray, " 6"]
) -> tuple[UInt8[np.ndarray, "R R 3"], Float32[np.ndarray, " 6"]]:
    """The same crop of the mirrored picture: `left` becomes `scaled width - resolution - left`."""
    h, w, _, left, resolution, _ = (int(i) for i in time_ids)
    mirrored_ids = time_ids.copy()
    mirrored_ids[3] = _scaled(h, w, resolution)[1] - resolution - left
    return np.ascontiguousarray(square[:, ::-1]), mirrored_ids


def _scaled(h: int, w: int, resolution: int) -> tuple[int, int]:
    """Size after the shorter side is scaled to `resolution`."""
    scale = resolution / min(h, w)
    return round(h * scale), round(w * scale)
