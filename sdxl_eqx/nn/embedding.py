"""Embeddings of scalars: the diffusion timestep and SDXL's sizes and crops."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from sdxl_eqx.nn.linear import Linear


def sinusoid(
    x: Float[Array, " b"], width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Float[Array, "b t"]:
    """Sinusoidal features of `x` in float32 (diffusers `get_timestep_embedding`): `width // 2` cosines, then sines.

    Frequencies are `10000^(-i / (width/2 - freq_shift))`; without `flip_sin_to_cos` the sines come first.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32))
    angles = x.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts, axis=-1)


class TimestepEmbedding(eqx.Module):
    """Two dense layers with SiLU between them (diffusers `TimestepEmbedding`)."""

    linear_1: Linear
    linear_2: Linear

    def __init__(self, c_in: int, c_out: int, *, key: PRNGKeyArray):
        first_key, second_key = jr.split(key)
        self.linear_1 = Linear(c_in, c_out, key=first_key)
        self.linear_2 = Linear(c_out, c_out, key=second_key)

    def __call__(self, x: Float[Array, "b c_in"]) -> Float[Array, "b t"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))
