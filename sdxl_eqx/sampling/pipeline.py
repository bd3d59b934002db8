"""From prompts to pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, UInt8

from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.sdxl import Conditioning, Encoders, cast
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.sampling import samplers, sigmas
from sdxl_eqx.sampling.guidance import denoiser

Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Prompts to the ids of both tokenizers, each `[b, 77]`."""


@dataclass(frozen=True)
class SamplerConfig:
    """How pictures are drawn."""

    schedule: ScheduleConfig
    steps: int
    guidance_scale: float
    """1 or less draws without guidance."""
    dtype: Any
    compute: Compute = Compute()


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
    """Unit noise of each seed, the same in whatever batch it stands."""
    return jnp.stack([jr.normal(jr.key(seed), shape, jnp.float32) for seed in seeds])


@partial(jax.jit, static_argnames="config")
def denoise(
    unet: UNet,
    noise: Float[Array, "b h w c"],
    cond: Conditioning,
    uncond: Conditioning | None,
    *,
    config: SamplerConfig,
) -> Float[Array, "b h w c"]:
    """Latents (still scaled by scaling_factor) drawn from unit noise by Euler's method, in one compiled loop."""
    t = sigmas.timesteps(config.schedule, config.steps)
    levels = sigmas.sigmas(config.schedule, t)
    x = noise * sigmas.initial_scale(config.schedule, levels)
    model = denoiser(
        cast(unet, config.dtype),
        config.schedule,
        cond,
        uncond if config.guidance_scale > 1 else None,
        guidance_scale=config.guidance_scale,
        dtype=config.dtype,
        compute=config.compute,
    )
    return samplers.euler(model, x, jnp.asarray(levels), jnp.asarray(t))


@partial(jax.jit, static_argnames="compute")
def decode(vae: VAE, latents: Float[Array, "b h w c"], *, compute: Compute = Compute()) -> UInt8[Array, "b H W 3"]:
    """Pixels from 0 to 255 of scaled latents, decoded in float32."""
    pixels = cast(vae, jnp.float32).decode(latents.astype(jnp.float32) / vae.config.scaling_factor, compute=compute)
    return jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


@jax.jit
def encode_text(encoders: Encoders, ids: Array, ids_2: Array) -> tuple[Float[Array, "b s e"], Float[Array, "b p"]]:
    """(context, pooled) of tokenized prompts."""
    return encoders.encode_text(ids, ids_2)


def condition(encoders: Encoders, tokenize: Tokenize, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
    """What prompts say of pictures of (height, width) `size`: whole, not cropped, not enlarged."""
    context, pooled = encode_text(encoders, *tokenize(prompts))
    time_ids = jnp.tile(jnp.array([[*size, 0, 0, *size]], jnp.float32), (len(prompts), 1))
    return Conditioning(context, pooled, time_ids)


def generate(
    unet: UNet,
    encoders: Encoders,
    tokenize: Tokenize,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    config: SamplerConfig,
    negative_prompt: str = "",
) -> np.ndarray:
    """Pictures `[b, H, W, 3]` from 0 to 255, one a prompt and seed.

    Raises:
        ValueError: where the sampler ran out of the finite numbers, so that there is no picture to show.
    """
    scale = encoders.vae.config.downscale
    noise = initial_noise(seeds, (size[0] // scale, size[1] // scale, encoders.vae.config.latent_channels))
    cond = condition(encoders, tokenize, prompts, size)
    uncond = None
    if config.guidance_scale > 1:
        uncond = condition(encoders, tokenize, [negative_prompt] * len(prompts), size)
    latents = denoise(unet, noise, cond, uncond, config=config)
    if not bool(jnp.isfinite(latents).all()):
        raise ValueError(
            "sampling gave latents that are not finite; the UNet's weights are broken, or float16 overflowed."
        )
    return np.asarray(decode(encoders.vae, latents, compute=config.compute))
