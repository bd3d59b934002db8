"""What a training step is given: pictures and token ids, or what the frozen encoders made of them."""

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
    input_ids: Int32[Array | np.ndarray, "b 77"]
    input_ids_2: Int32[Array | np.ndarray, "b 77"]
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
