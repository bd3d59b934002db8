"""JPEGs made squares as training does it, beside plain Pillow."""

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdxl_eqx.benchmarks.figures import Figure
from sdxl_eqx.benchmarks.timing import alternated, milliseconds, pinned
from sdxl_eqx.data.pictures import read_picture, scaled_size
from sdxl_eqx.data.transforms import resize_and_crop


@dataclass(frozen=True)
class Decode:
    """JPEGs of one side that are made squares of another, in pixels, and how many times as fast as Pillow is asked."""

    source: int
    target: int
    least: float | None = None


def decoding(files: Mapping[int, list[bytes]], decodes: Sequence[Decode], rounds: int) -> list[Figure]:
    """Milliseconds a JPEG on one core, and how near to Pillow's pixels it comes."""
    figures: list[Figure] = []
    with pinned(1):
        for one in decodes:
            qualities, times = [], []
            for data in files[one.source]:
                qualities.append(psnr(ours(data, one.target), plain(data, one.target)))
                mine, baseline = (partial(milliseconds, partial(way, data, one.target)) for way in (ours, plain))
                times.append(alternated(mine, baseline, rounds))
            both = [tuple(map(statistics.mean, zip(*way, strict=True))) for way in zip(*times, strict=True)]
            name = f"JPEG {one.source} -> {one.target}"
            figures += [
                Figure(f"{name}, one core", "ms", *both, least=one.least),
                Figure(f"{name}, worst PSNR", "dB", (min(qualities),), least=35.0),
                Figure(f"{name}, median PSNR", "dB", (statistics.median(qualities),)),
            ]
    return figures


def ours(data: bytes, side: int) -> UInt8[np.ndarray, "H W 3"]:
    """The middle of a JPEG as training reads it."""
    picture = read_picture(data, "a JPEG of the benchmark", target=(side, side))
    h, w = scaled_size(picture.size, (side, side))
    return resize_and_crop(picture, (side, side), ((h - side) // 2, (w - side) // 2))[0]


def plain(data: bytes, side: int) -> UInt8[np.ndarray, "H W 3"]:
    """The same by Pillow alone: all pixels decoded, Lanczos over all of them, the middle cut out."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    h, w = scaled_size((image.height, image.width), (side, side))
    image = image.resize((w, h), Image.Resampling.LANCZOS)
    top, left = (h - side) // 2, (w - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)))


def psnr(one: UInt8[np.ndarray, "H W 3"], other: UInt8[np.ndarray, "H W 3"]) -> float:
    """Peak signal to noise in dB. Equal pictures count as if one value were one step off, so that it is finite."""
    error = np.square(one.astype(np.float64) - other).sum()
    return float(10 * np.log10(255**2 * one.size / max(error, 1.0)))
