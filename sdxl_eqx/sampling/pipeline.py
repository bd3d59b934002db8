"""From prompts to pictures."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.sdxl import Conditioning, Encoders, cast
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel.specs import Layout, put
from sdxl_eqx.sampling import samplers, sigmas
from sdxl_eqx.sampling.guidance import denoiser

T = TypeVar("T")

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
    """Of the UNet."""
    decoding: Compute = Compute()
    """Of VAE and text encoders."""
    layout: Layout | None = None
    """Where arrays lie, on more than one device; pictures must then divide over those that share a batch."""

    def put(self, tree: T) -> T:
        """Arrays that every process has, on the devices."""
        layout = self.layout
        return tree if layout is None else jax.tree.map(lambda x: put(x, layout.whole), tree)

    def place(self, tree: T) -> T:
        """Activations on the devices that compute them."""
        return tree if self.layout is None else self.layout.enter(tree)


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
    noise, cond, uncond = config.place((noise, cond, uncond))
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


@partial(jax.jit, static_argnames="config")
def decode(
    vae: VAE, latents: Float[Array, "b h w c"], *, config: SamplerConfig
) -> tuple[UInt8[Array, "b H W 3"], Bool[Array, ""]]:
    """(pixels from 0 to 255 of scaled latents, decoded in float32; whether all latents are finite)."""
    vae = cast(vae if config.decoding.gather is None else config.decoding.gather(vae), jnp.float32)
    compute = dataclasses.replace(config.decoding, gather=None)
    pixels = vae.decode(latents.astype(jnp.float32) / vae.config.scaling_factor, compute=compute)
    pixels = jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
    finite = jnp.isfinite(latents).all()
    if config.layout is not None:  # whole, so that each process can read them
        pixels, finite = jax.lax.with_sharding_constraint((pixels, finite), config.layout.whole)
    return pixels, finite


@partial(jax.jit, static_argnames="config")
def encode_text(
    encoders: Encoders, ids: Array, ids_2: Array, *, config: SamplerConfig
) -> tuple[Float[Array, "b s e"], Float[Array, "b p"]]:
    """(context, pooled) of tokenized prompts."""
    ids, ids_2 = config.place((ids, ids_2))
    return encoders.encode_text(ids, ids_2, compute=config.decoding)


def condition(
    encoders: Encoders, tokenize: Tokenize, prompts: Sequence[str], size: tuple[int, int], config: SamplerConfig
) -> Conditioning:
    """What prompts say of pictures of (height, width) `size`: whole, not cropped, not enlarged."""
    context, pooled = encode_text(encoders, *config.put(tokenize(prompts)), config=config)
    time_ids = np.tile(np.array([[*size, 0, 0, *size]], np.float32), (len(prompts), 1))
    return Conditioning(context, pooled, jnp.asarray(config.put(time_ids)))


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
    cond = condition(encoders, tokenize, prompts, size, config)
    uncond = None
    if config.guidance_scale > 1:
        uncond = condition(encoders, tokenize, [negative_prompt] * len(prompts), size, config)
    latents = denoise(unet, config.put(noise), cond, uncond, config=config)
    pictures, finite = decode(encoders.vae, latents, config=config)
    if not bool(finite):
        raise ValueError(
            "sampling gave latents that are not finite; the UNet's weights are broken, or float16 overflowed."
        )
    return np.asarray(pictures)
