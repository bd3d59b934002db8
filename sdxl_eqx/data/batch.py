"""What a training step is given: pictures and token ids, or what the frozen encoders made of one or both.

Every batch may have `control`, what a ControlNet sees of each picture, of its very crop, sRGB in 0..255, and `weight`,
what each sample's loss is multiplied by. They are None, and no leaves, where nothing of them is trained with.
"""

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
    control: UInt8[Array | np.ndarray, "b H W 3"] | None = None
    weight: Float32[Array | np.ndarray, " b"] | None = None


class LatentTextBatch(eqx.Module):
    """Pictures after the VAE, and captions that the step encodes itself. Fields as in `Batch` and `LatentBatch`."""

    mean: Float32[Array | np.ndarray, "b h w c"]
    logvar: Float32[Array | np.ndarray, "b h w c"]
    input_ids: Int32[Array | np.ndarray, "b s"]
    input_ids_2: Int32[Array | np.ndarray, "b s"]
    time_ids: Float32[Array | np.ndarray, "b 6"]
    control: UInt8[Array | np.ndarray, "b H W 3"] | None = None
    weight: Float32[Array | np.ndarray, " b"] | None = None


class LatentBatch(eqx.Module):
    """Pictures and captions after the frozen encoders.

    `mean` and `logvar` are the moments of the VAE's posterior, not scaled; `time_ids` are those of `Batch`.
    """

    mean: Float32[Array | np.ndarray, "b h w c"]
    logvar: Float32[Array | np.ndarray, "b h w c"]
    context: Float[Array | np.ndarray, "b s e"]
    pooled: Float[Array | np.ndarray, "b p"]
    time_ids: Float32[Array | np.ndarray, "b 6"]
    control: UInt8[Array | np.ndarray, "b H W 3"] | None = None
    weight: Float32[Array | np.ndarray, " b"] | None = None


AnyBatch = Batch | LatentTextBatch | LatentBatch


def to_batch(arrays: Mapping[str, np.ndarray]) -> AnyBatch:
    """The batch type whose fields the arrays are, with or without those that may be None.

    Raises:
        ValueError: they are the fields of none.
    """
    for kind in (Batch, LatentTextBatch, LatentBatch):
        fields = dataclasses.fields(kind)
        needed = {field.name for field in fields if field.default is dataclasses.MISSING}
        if needed <= arrays.keys() <= {field.name for field in fields}:
            return kind(**arrays)
    raise ValueError(f"arrays must be the fields of a batch, not {sorted(arrays)}")
