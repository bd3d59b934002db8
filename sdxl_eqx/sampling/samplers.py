"""Samplers over one callable `(x, sigma, t) -> denoised`."""

from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from sdxl_eqx.arrays import Scalar

Latents = Float[Array, "b h w c"]


@runtime_checkable
class Denoise(Protocol):
    """The picture that is expected under the noise, `x = x0 + sigma eps`, at one level for the whole batch."""

    def __call__(self, x: Latents, sigma: Scalar, t: Scalar) -> Latents: ...


def euler(denoise: Denoise, x: Latents, sigmas: Float[Array, " n1"], t: Float[Array, " n"]) -> Latents:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn), one compiled loop."""

    def step(x: Latents, level: tuple[Scalar, Scalar, Scalar]) -> tuple[Latents, None]:
        sigma, following, time = level
        slope = (x - denoise(x, sigma, time)) / sigma
        return x + slope * (following - sigma), None

    x, _ = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:], t))
    return x
