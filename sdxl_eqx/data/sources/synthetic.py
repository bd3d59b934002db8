"""Noise in place of a data set, to time a run or to try one out."""

import struct

import numpy as np

from sdxl_eqx.data.sources.source import Conditioned


class Synthetic(Conditioned):
    """So many square pictures of noise, made when they are asked for, the same ones for the same seed.

    Args:
        count: how many there are.
        resolution: their sides in pixels.
        seed: of all of them.

    Raises:
        ValueError: there would be none, or none with a pixel.
    """

    def __init__(self, count: int, resolution: int, seed: int):
        for name, value in (("count", count), ("resolution", resolution)):
            if value < 1:
                raise ValueError(f"{name} of synthetic pictures must be at least 1, not {value}")
        self.count = count
        self.resolution = resolution
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Synthetic({self.count} pictures of {self.resolution} x {self.resolution}, seed {self.seed})"

    def name(self, index: int) -> str:
        """Its number; they count from 0."""
        return f"synthetic picture {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        """One caption, another for each picture."""
        return (f"noise, number {index}",)

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The bytes of an uncompressed BMP, of 24 bits a pixel; only as many are drawn as are asked for."""
        rows = -(-3 * self.resolution // 4) * 4  # bytes of a row, which ends at a multiple of four
        size = self.resolution * rows
        offset = 54
        header = struct.pack("<2sIHHI", b"BM", offset + size, 0, 0, offset)
        header += struct.pack("<IiiHHIIiiII", 40, self.resolution, self.resolution, 1, 24, 0, size, 0, 0, 0, 0)
        if limit >= 0:
            size = max(0, min(size, limit - offset))
        words = np.random.PCG64([self.seed, index]).random_raw(-(-size // 8)).astype("<u8", copy=False)
        data = header + words.tobytes()[:size]
        return data if limit < 0 else data[:limit]

    def condition(self, index: int) -> bytes:
        """The picture itself."""
        return self.picture(index)
