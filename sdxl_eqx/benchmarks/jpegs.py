"""JPEGs to measure with: photographs of the user's, or noise that resembles them."""

import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdxl_eqx.data.pictures import Picture, read_picture, scaled_size
from sdxl_eqx.data.sources.folder import PICTURES
from sdxl_eqx.data.sources.source import Source
from sdxl_eqx.data.transforms import resize_and_crop

log = logging.getLogger("sdxl_eqx")

EXPONENT = 1.2
"""Amplitudes of photographs fall about as 1 / frequency to this power (Tolhurst, Tadmor and Chao 1992)."""

QUALITY = 90


class Jpegs(Source):
    """JPEGs in memory as a data set."""

    def __init__(self, files: Sequence[bytes]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Its number."""
        return f"JPEG {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        """The same for all."""
        return ("a photograph of a landscape in the evening, trees, a lake, mountains in the distance",)

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The file, or its first `limit` bytes."""
        return self.files[index] if limit < 0 else self.files[index][:limit]


def make_jpegs(count: int, sides: Sequence[int], photos: str = "") -> dict[int, list[bytes]]:
    """So many square JPEGs (4:2:0) of each side in pixels, from the photographs of a folder or from seeded noise.

    Raises:
        ValueError: the folder holds no picture, or one that cannot be read.
    """
    files: dict[int, list[bytes]] = {side: [] for side in sides}
    for squares in _photographs(photos, count, sides) if photos else _noises(count, sides):
        for side, pixels in squares.items():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
            files[side].append(file.getvalue())
    return files


def noise(seed: int, side: int) -> UInt8[np.ndarray, "H W 3"]:
    """Smooth random fields with detail at every scale, dim in their colours, and the noise of a sensor."""
    rng = np.random.default_rng(seed)
    n = -(-side // 256) * 256  # a side of which the Fourier transform is fast
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None]).astype(np.float32)
    f[0, 0] = np.inf

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def field() -> np.ndarray:
        values = np.fft.irfft2((draw(*f.shape) + 1j * draw(*f.shape)) / f**EXPONENT, s=(n, n))
        return (values / values.std())[:side, :side]

    luma, red, blue = 128 + 45 * field(), 12 * field(), 12 * field()
    rgb = np.stack([luma + red, luma - (red + blue) / 2, luma + blue], axis=-1)
    return np.clip(rgb + 2 * draw(side, side, 3), 0, 255).astype(np.uint8)


def _noises(count: int, sides: Sequence[int]) -> Iterator[dict[int, np.ndarray]]:
    """Parts of one noise for each seed: scaling it would change its spectrum."""
    for seed in range(count):
        whole = noise(seed, max(sides))
        yield {side: whole[:side, :side] for side in sides}


def _photographs(folder: str, count: int, sides: Sequence[int]) -> Iterator[dict[int, np.ndarray]]:
    """The middle of each photograph at each size."""
    if not Path(folder).is_dir():
        raise ValueError(f"--photos {folder}: must be a folder.")
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES)[:count]
    if not paths:
        raise ValueError(f"--photos {folder}: must hold pictures, such as .jpg; there is none directly in it.")
    for path in paths:
        picture = read_picture(path.read_bytes(), str(path))
        if min(picture.size) < max(sides):
            log.warning(
                "%s is enlarged for a side of %d: that makes it smoother than a photograph is", path, max(sides)
            )
        yield {side: _square(picture, side) for side in sides}


def _square(picture: Picture, side: int) -> UInt8[np.ndarray, "H W 3"]:
    h, w = scaled_size(picture.size, (side, side))
    return resize_and_crop(picture, (side, side), ((h - side) // 2, (w - side) // 2))[0]
