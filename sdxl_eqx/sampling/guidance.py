"""The UNet as a denoiser: classifier-free guidance, its rescaling, and what ControlNets add."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdxl_eqx.models.controlnet import ControlNet, sum_controls
from sdxl_eqx.models.sdxl import Conditioning
from sdxl_eqx.models.unet import Control, UNet
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.sampling.schedulers.level import Denoise, Latents, Level


class Steering(eqx.Module):
    """A ControlNet, the picture it sees and how strong it is at each evaluation."""

    net: ControlNet
    image: Float[Array, "b H W c"]
    """In [0, 1], at the size of the pictures that are drawn."""
    scales: Float[Array, " n"]


def denoiser(
    unet: UNet,
    cond: Conditioning,
    uncond: Conditioning | None,
    scales: Float[Array, " n"],
    *,
    prediction_type: str,
    rescale: float = 0.0,
    steering: tuple[Steering, ...] = (),
    beside: Float[Array, "b h w k"] | None = None,
    dtype: Any,
    compute: Compute,
) -> Denoise:
    """What a UNet takes for the picture under the noise.

    With `uncond`, predictions are `uncond + scale (cond - uncond)` (Ho and Salimans 2022), both in one batch, with the
    scale of each evaluation; `rescale` of it then gets the standard deviation of the prediction with the prompt (Lin et
    al. 2023, equation 16). `beside` are further input channels, such as an inpainting UNet's mask and picture.
    """
    both = cond if uncond is None else jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)

    def twice(x: Array) -> Array:
        return x if uncond is None else jnp.concatenate([x, x])

    def denoise(x: Latents, level: Level) -> Latents:
        scaled = twice(level.model_input(x).astype(dtype))
        time = jnp.full(scaled.shape[:1], level.t)
        control = _control(steering, scaled, time, level)
        if beside is not None:
            scaled = jnp.concatenate([scaled, twice(beside.astype(dtype))], axis=-1)
        out = unet(scaled, time, both.context, both.pooled, both.time_ids, control=control, compute=compute)
        out = out.astype(jnp.float32)
        if uncond is not None:
            without, with_prompt = jnp.split(out, 2)
            out = without + scales[level.index] * (with_prompt - without)
            if rescale > 0:
                spread = with_prompt.std((1, 2, 3), keepdims=True) / out.std((1, 2, 3), keepdims=True)
                out = rescale * out * spread + (1 - rescale) * out
        return level.to_x0(x, out, prediction_type)

    def _control(steering: tuple[Steering, ...], scaled: Array, time: Array, level: Level) -> Control | None:
        if not steering:
            return None
        return sum_controls(
            [
                one.net(
                    scaled, time, both.context, both.pooled, both.time_ids, twice(one.image),
                    scale=one.scales[level.index], compute=compute,
                )
                for one in steering
            ]
        )  # fmt: skip

    return denoise
