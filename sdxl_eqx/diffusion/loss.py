"""The denoising loss, and the draws it is taken at."""

from typing import Any

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sdxl_eqx.arrays import Scalar
from sdxl_eqx.diffusion.prediction import to_target
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.models.sdxl import Conditioning
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.compute import Compute


def draw(
    schedule: Schedule, shape: tuple[int, int, int, int], *, key: PRNGKeyArray
) -> tuple[Float[Array, "b h w c"], Int[Array, " b"]]:
    """(noise, timesteps) for latents of that shape; every timestep is as likely as any other (Ho et al. 2020)."""
    noise_key, time_key = jr.split(key)
    eps = jr.normal(noise_key, shape, jnp.float32)
    t = jr.randint(time_key, shape[:1], 0, schedule.config.num_train_timesteps)
    return eps, t


def denoising_loss(
    unet: UNet,
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    cond: Conditioning,
    *,
    dtype: Any,
    compute: Compute,
) -> Scalar:
    """Mean squared error, in float32, of the prediction at timesteps `t` (diffusers `train_text_to_image_sdxl.py`).

    `x0` are latents already scaled, in float32; the UNet, cast already, runs in `dtype`.
    """
    x_t = schedule.add_noise(x0, eps, t).astype(dtype)
    time = t.astype(jnp.float32)
    prediction = unet(x_t, time, cond.context, cond.pooled, cond.time_ids, compute=compute)
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - to_target(schedule, x0, eps, t)))
