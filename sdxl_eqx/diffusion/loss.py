"""The denoising loss, and the draws it is taken at."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sdxl_eqx.arrays import Scalar
from sdxl_eqx.config import LossConfig
from sdxl_eqx.diffusion.prediction import to_target
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.diffusion.timesteps import draw_timesteps
from sdxl_eqx.models.sdxl import Conditioning
from sdxl_eqx.nn.compute import Compute

DECILES = 10


class Draws(eqx.Module):
    """What chance decides of a step's loss."""

    eps: Float[Array, "b h w c"]
    """The noise that the target is made of."""
    input_eps: Float[Array, "b h w c"]
    """The noise in the input: eps, and more where the input is perturbed."""
    t: Int[Array, " b"]

    @classmethod
    def draw(
        cls,
        schedule: Schedule,
        config: LossConfig,
        weights: np.ndarray | None,
        shape: tuple[int, int, int, int],
        *,
        key: PRNGKeyArray,
    ) -> "Draws":
        """Draws for latents of that shape; `weights` are the timesteps' probabilities, None is uniform.

        The offset is one number for each channel of a sample (diffusers `train_text_to_image_sdxl.py`); the perturbed
        input has noise that the target says nothing of (Ning et al. 2023; diffusers `train_text_to_image.py`).
        """
        b, _, _, c = shape
        noise_key, time_key = jr.split(key)
        eps = jr.normal(noise_key, shape, jnp.float32)
        if config.noise_offset > 0:
            # Keys of their own, so that a switch leaves all other draws as they are.
            offset_key = jr.fold_in(key, 1)
            eps = eps + config.noise_offset * jr.normal(offset_key, (b, 1, 1, c), jnp.float32)
        input_eps = eps
        if config.input_perturbation > 0:
            perturbation_key = jr.fold_in(key, 2)
            input_eps = eps + config.input_perturbation * jr.normal(perturbation_key, shape, jnp.float32)
        t = draw_timesteps(weights, b, schedule.config.num_train_timesteps, key=time_key)
        return cls(eps, input_eps, t)


def training_loss(
    unet: Callable[..., Float[Array, "b h w c"]],
    schedule: Schedule,
    config: LossConfig,
    x0: Float[Array, "b h w c"],
    draws: Draws,
    cond: Conditioning,
    weights: Float[Array | np.ndarray, " b"] | None = None,
    *,
    dtype: Any,
    compute: Compute,
) -> tuple[Scalar, Float[Array, " b"]]:
    """(mean of the weighted losses, each sample's loss without its weight), in float32.

    `x0` are latents already scaled, in float32; the UNet, cast already, runs in `dtype`; `weights` are of the samples,
    by default 1.
    """
    x_t = schedule.add_noise(x0, draws.input_eps, draws.t).astype(dtype)
    time = draws.t.astype(jnp.float32)
    prediction = unet(x_t, time, cond.context, cond.pooled, cond.time_ids, compute=compute)
    losses = sample_losses(schedule, config, prediction, to_target(schedule, x0, draws.eps, draws.t), draws.t)
    weighted = losses if weights is None else losses * jnp.asarray(weights)
    if config.snr_gamma != -1:
        weighted = weighted * min_snr_weights(schedule, config.snr_gamma, draws.t)
    return jnp.mean(weighted), losses


def sample_losses(
    schedule: Schedule,
    config: LossConfig,
    prediction: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    t: Int[Array, " b"],
) -> Float[Array, " b"]:
    """The mean loss of each sample, in float32.

    huber and smooth_l1 are the pseudo-Huber losses 2c (sqrt(d² + c²) - c) and 2 (sqrt(d² + c²) - c) of kohya's
    `sd-scripts` (`conditional_loss`) and of diffusers' scripts.
    """
    square = jnp.square(prediction.astype(jnp.float32) - target)
    if config.loss_type == "l2":
        return jnp.mean(square, axis=(1, 2, 3))
    c = huber_c(schedule, config, t)[:, None, None, None]
    # sqrt(d² + c²) - c, but small differences do not cancel.
    beyond = square / (jnp.sqrt(square + jnp.square(c)) + c)
    return jnp.mean(2 * beyond * (c if config.loss_type == "huber" else 1), axis=(1, 2, 3))


def huber_c(schedule: Schedule, config: LossConfig, t: Int[Array, " b"]) -> Float[Array, " b"]:
    """Where the loss turns from a square into a line (`get_huber_threshold_if_needed` of kohya's `sd-scripts`).

    snr: (1 - c) / (1 + sigma/alpha)² + c; exponential: c^(t/T). Either goes from 1 without noise to c.
    """
    if config.huber_schedule == "snr":
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        return (1 - config.huber_c) * jnp.square(alpha / (alpha + sigma)) + config.huber_c
    if config.huber_schedule == "exponential":
        return jnp.exp(math.log(config.huber_c) * t.astype(jnp.float32) / schedule.config.num_train_timesteps)
    return jnp.full(t.shape, config.huber_c, jnp.float32)


def min_snr_weights(schedule: Schedule, gamma: float, t: Int[Array, " b"]) -> Float[Array, " b"]:
    """min(snr, gamma) / snr for noise, / (snr + 1) for velocities (Hang et al. 2023, section 3.4; diffusers' scripts).

    The limits hold where snr is 0 (zero terminal SNR: 1 for noise, 0 for velocities) or infinite (0).
    """
    signal, noise = jnp.square(schedule.alpha[t]), jnp.square(schedule.sigma[t])
    if schedule.config.prediction_type == "epsilon":
        # min(snr, gamma) / snr, with snr = signal / noise.
        return jnp.minimum(1.0, gamma * noise / jnp.maximum(signal, jnp.finfo(jnp.float32).tiny))
    return jnp.minimum(signal, gamma * noise) / (signal + noise)


def decile_sums(
    t: Int[Array, " b"], losses: Float[Array, " b"], total: int
) -> tuple[Float[Array, " ten"], Float[Array, " ten"]]:
    """(sum of the losses, how many) in each tenth of the `total` timesteps, least noise first."""
    is_in = (t * DECILES // total)[:, None] == jnp.arange(DECILES)[None]
    # Not a product with zeros: one loss that is not finite would be in all of the sums.
    return jnp.sum(jnp.where(is_in, losses[:, None], 0.0), axis=0), jnp.sum(is_in, axis=0, dtype=jnp.float32)
