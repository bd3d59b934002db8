"""From a picture to the crop that the model sees, and the numbers that tell the model how it was cut."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from sdxl_eqx.data.pictures import Picture, Size, scaled_size


def draw_crop(size: Size, target: Size, *, center_crop: bool, rng: np.random.Generator) -> tuple[int, int]:
    """(top, left) of a crop of `target` in the picture scaled to cover it: the middle, or drawn from `rng`."""
    room_h, room_w = (scaled - side for scaled, side in zip(scaled_size(size, target), target, strict=True))
    if center_crop:
        return room_h // 2, room_w // 2
    return int(rng.integers(room_h + 1)), int(rng.integers(room_w + 1))


def resize_and_crop(
    picture: Picture, target: Size, top_left: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "H W 3"], Float32[np.ndarray, " 6"]]:
    """A crop of the picture scaled to cover `target` (Lanczos, antialiased), and its `time_ids`.

    The ids are (original height, original width, crop top, crop left, target height, target width), the crop in scaled
    pixels: SDXL's micro-conditioning (arXiv:2307.01952, section 2.2) as diffusers' `train_text_to_image_sdxl.py` has
    it.

    Args:
        picture: a picture read whole or for this target.
        target: size of the crop.
        top_left: where it lies in the scaled picture, as `draw_crop` says.
    """
    H, W = target
    top, left = top_left
    scaled_h, scaled_w = scaled_size(picture.size, target)
    decoded_h, decoded_w = picture.pixels.shape[:2]
    if picture.box is None and (decoded_h, decoded_w) == (scaled_h, scaled_w):
        pixels = np.ascontiguousarray(picture.pixels[top : top + H, left : left + W])
    else:  # only the crop is computed: a long panorama never exists at its full scaled width
        y0, x0, y1, x1 = picture.box or (0, 0, decoded_h, decoded_w)
        y, x = (y1 - y0) / scaled_h, (x1 - x0) / scaled_w
        box = (x0 + left * x, y0 + top * y, x0 + (left + W) * x, y0 + (top + H) * y)
        pixels = np.array(Image.fromarray(picture.pixels).resize((W, H), Image.Resampling.LANCZOS, box=box))
    return pixels, np.array([*picture.size, top, left, H, W], np.float32)


def mirror(
    pixels: UInt8[np.ndarray, "H W 3"], time_ids: Float32[np.ndarray, " 6"]
) -> tuple[UInt8[np.ndarray, "H W 3"], Float32[np.ndarray, " 6"]]:
    """The same crop of the mirrored picture: `left` becomes `scaled width - W - left`."""
    h, w, _, left, H, W = (int(i) for i in time_ids)
    mirrored_ids = time_ids.copy()
    mirrored_ids[3] = scaled_size((h, w), (H, W))[1] - W - left
    return flipped(pixels), mirrored_ids


def flipped(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """The mirrored picture."""
    # NumPy takes more than twice as long for it.
    return np.array(Image.fromarray(pixels).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def as_of_size(picture: Picture, size: Size) -> Picture:
    """The middle of a picture as if it had been scaled to cover another size; nothing is interpolated yet."""
    if picture.size == size:
        return picture
    (own_h, own_w), (h, w) = picture.size, size
    scale = max(h / own_h, w / own_w)
    y0, x0, y1, x1 = picture.box or (0.0, 0.0, *map(float, picture.pixels.shape[:2]))
    # What of each side lies outside on either end.
    y, x = ((y1 - y0) * (1 - h / (own_h * scale)) / 2, (x1 - x0) * (1 - w / (own_w * scale)) / 2)
    return Picture(picture.pixels, size, (y0 + y, x0 + x, y1 - y, x1 - x))
