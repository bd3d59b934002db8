"""One noise level, and the callables that the loop is given."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdxl_eqx.arrays import Scalar

Latents = Float[Array, "b h w c"]


class Level(eqx.Module):
    """The noise level of one evaluation of the model, `x = alpha x0 + sigma eps`.

    alpha is 1 in the coordinates of Karras et al. 2022 (Euler, Heun, LMS), and `alpha^2 + sigma^2 = 1` in the
    variance-preserving ones (DDIM, DDPM, DPM-Solver++, PNDM, UniPC, LCM).
    """

    alpha: Scalar
    sigma: Scalar
    t: Scalar
    """The timestep that the UNet is told."""
    index: Int[Array, ""]
    """Which evaluation of the loop this is, from 0."""

    def noised(self, x0: Latents, eps: Latents) -> Latents:
        """Latents at this level."""
        return self.alpha * x0 + self.sigma * eps

    def model_input(self, x: Latents) -> Latents:
        """What the UNet sees of x: of variance one, in either coordinates."""
        return x / jnp.sqrt(self.alpha**2 + self.sigma**2)

    def to_x0(self, x: Latents, output: Latents, prediction_type: str) -> Latents:
        """The picture that the UNet's output implies."""
        if prediction_type == "sample":
            return output
        if prediction_type == "epsilon":
            return (x - self.sigma * output) / self.alpha
        variance = self.alpha**2 + self.sigma**2
        return self.alpha * x / variance - self.sigma * output / jnp.sqrt(variance)


@runtime_checkable  # for beartype, which tests switch on
class Denoise(Protocol):
    """The picture x0 that is expected under the noise, at one level for the whole batch."""

    def __call__(self, x: Latents, level: Level) -> Latents: ...


@runtime_checkable
class Noise(Protocol):
    """Unit noise for the step of an evaluation."""

    def __call__(self, index: Int[Array, ""]) -> Latents: ...


@runtime_checkable
class After(Protocol):
    """What is done to x after the step of an evaluation; x is then at the level `following`."""

    def __call__(self, x: Latents, index: Int[Array, ""], following: Level) -> Latents: ...
