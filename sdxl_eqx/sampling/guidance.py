"""The UNet as a denoiser, with classifier-free guidance."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdxl_eqx.arrays import Scalar
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.sdxl import Conditioning
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.sampling.samplers import Denoise

Latents = Float[Array, "b h w c"]


def denoiser(
    unet: UNet,
    schedule: ScheduleConfig,
    cond: Conditioning,
    uncond: Conditioning | None,
    *,
    guidance_scale: float,
    dtype: Any,
    compute: Compute,
) -> Denoise:
    """`(x, sigma, t) -> denoised` of a UNet that predicts noise or velocity.

    With `uncond`, predictions are `uncond + scale (cond - uncond)` (Ho and Salimans 2022), both in one batch.
    """
    both = cond if uncond is None else jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)

    def denoise(x: Latents, sigma: Scalar, t: Scalar) -> Latents:
        scaled = (x / jnp.sqrt(sigma**2 + 1)).astype(dtype)
        scaled = scaled if uncond is None else jnp.concatenate([scaled, scaled])
        time = jnp.full(scaled.shape[:1], t)
        out = unet(scaled, time, both.context, both.pooled, both.time_ids, compute=compute).astype(jnp.float32)
        if uncond is not None:
            without, with_prompt = jnp.split(out, 2)
            out = without + guidance_scale * (with_prompt - without)
        if schedule.prediction_type == "epsilon":
            return x - sigma * out
        return x / (sigma**2 + 1) - out * sigma / jnp.sqrt(sigma**2 + 1)

    return denoise
