"""What a training step is given: pictures and token ids, or what the frozen encoders made of one or both."""

import dataclasses
from collections.abc import Mapping

import equinox as eqx
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from sdxl_eqx.arrays import Array, Float


class Batch(eqx.Module):
    """Pictures and captions that the step encodes itself.

    `pixels` are sRGB in 0..255. `time_ids` are (original height, original width, crop top, crop left, target height,
    target width), the micro-conditioning of the SDXL paper (section 2.2, heights first).
    """

    pixels: UInt8[Array | np.ndarray, "b H W 3"]
    input_ids: Int32[Array | np.ndarray, "b s"]
    input_ids_2: Int32[Array | np.ndarray, "b s"]
    time_ids: Float32[Array | np.ndarray, "b 6"]


class LatentTextBatch(eqx.Module):
    """Pictures after the VAE, and captions that the step encodes itself. Fields as in `Batch` and `LatentBatch`."""

    mean: Float32[Array | np.ndarray, "b h w c"]
    logvar: Float32[Array | np.ndarray, "b h w c"]
    input_ids: Int32[Array | np.ndarray, "b s"]
    input_ids_2: Int32[Array | np.ndarray, "b s"]
    time_ids: Float32[Array | np.ndarray, "b 6"]


class LatentBatch(eqx.Module):
    """Pictures and captions after the frozen encoders.

    `mean` and `logvar` are the moments of the VAE's posterior, not scaled; `time_ids` are those of `Batch`.
    """

    mean: Float32[Array | np.ndarray, "b h w c"]
    logvar: Float32[Array | np.ndarray, "b h w c"]
    context: Float[Array | np.ndarray, "b s e"]
    pooled: Float[Array | np.ndarray, "b p"]
    time_ids: Float32[Array | np.ndarray, "b 6"]


AnyBatch = Batch | LatentTextBatch | LatentBatch


def to_batch(arrays: Mapping[str, np.ndarray]) -> AnyBatch:
    """The batch type whose fields the arrays are.

    Raises:
        ValueError: they are the fields of none.
    """
    for kind in (Batch, LatentTextBatch, LatentBatch):
        if {field.name for field in dataclasses.fields(kind)} == arrays.keys():
            return kind(**arrays)
    raise ValueError(f"arrays must be the fields of a batch, not {sorted(arrays)}")
