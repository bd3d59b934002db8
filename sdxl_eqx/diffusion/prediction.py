"""What the UNet predicts: the noise, or the velocity `v = alpha eps - sigma x0` (Salimans and Ho 2022)."""

from jaxtyping import Array, Float, Int

from sdxl_eqx.diffusion.schedule import Schedule

Latents = Float[Array, "b h w c"]


def to_target(schedule: Schedule, x0: Latents, eps: Latents, t: Int[Array, " b"]) -> Latents:
    """What the UNet should say of `x_t`."""
    if schedule.config.prediction_type == "epsilon":
        return eps
    alpha, sigma = schedule.at(t)
    return alpha * eps - sigma * x0


def to_x0(schedule: Schedule, prediction: Latents, x_t: Latents, t: Int[Array, " b"]) -> Latents:
    """The picture that a prediction implies: `to_x0(to_target(x0, eps), x_t) == x0`.

    Of noise it is not finite where alpha is 0 (zero terminal SNR): x_t is noise alone, and tells nothing of x0.
    """
    alpha, sigma = schedule.at(t)
    if schedule.config.prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha
    return alpha * x_t - sigma * prediction
