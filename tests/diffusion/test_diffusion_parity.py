"""The schedule, the losses and the bias of timesteps against diffusers and its training scripts' formulas."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import parity_torch as theirs
import pytest

from sdxl_eqx.config import LossConfig, TimestepBiasConfig
from sdxl_eqx.diffusion.loss import min_snr_weights, sample_losses
from sdxl_eqx.diffusion.prediction import to_target
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.diffusion.timesteps import timestep_weights

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_alpha_and_sigma_are_ddpms_at_every_timestep(beta_schedule: Any):
    schedule = Schedule(ScheduleConfig(beta_schedule=beta_schedule))
    ddpm = theirs.scheduler(theirs.DDPMScheduler, beta_schedule=beta_schedule)
    # Theirs in float64 from the same betas: their product in float32 is itself off by 1.1e-6.
    alpha_bar = np.cumprod(1 - ddpm.betas.double().numpy())
    np.testing.assert_allclose(np.asarray(schedule.alpha) ** 2, alpha_bar, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(schedule.sigma) ** 2, 1 - alpha_bar, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(schedule.alpha) ** 2, ddpm.alphas_cumprod, rtol=2e-6)


def test_noised_latents_and_velocity_are_ddpms():
    inputs = tiny.unet_inputs(tiny.UNET, (12, 10))
    schedule = Schedule(ScheduleConfig(prediction_type="v_prediction"))
    ddpm = theirs.scheduler(theirs.DDPMScheduler, prediction_type="v_prediction")
    x0, eps = (jnp.asarray(inputs[name]) for name in ("x", "eps"))
    for pair in ([0, 999], [1, 500], [250, 750]):
        t = jnp.asarray(pair)
        torch_arguments = (theirs.to_torch(x0), theirs.to_torch(eps), theirs.torch.tensor(pair))
        noised = theirs.to_numpy(ddpm.add_noise(*torch_arguments))
        velocity = theirs.to_numpy(ddpm.get_velocity(*torch_arguments))
        tiny.assert_close(schedule.add_noise(x0, eps, t), noised, 1e-5)
        tiny.assert_close(to_target(schedule, x0, eps, t), velocity, 1e-5)


TIMES = [0, 250, 600, 990]
CASES = [
    ("epsilon", False, "l2", -1.0),
    ("epsilon", False, "l2", 5.0),
    ("v_prediction", True, "l2", 5.0),
    ("epsilon", False, "huber", -1.0),
    ("v_prediction", False, "smooth_l1", 5.0),
]


@pytest.mark.parametrize(("prediction_type", "zero", "kind", "gamma"), CASES)
def test_losses_are_those_of_the_training_scripts(prediction_type: Any, zero: bool, kind: Any, gamma: float):
    torch = theirs.torch
    inputs = tiny.unet_inputs(tiny.UNET, (12, 10))
    x0, eps, prediction = (jnp.tile(jnp.asarray(inputs[n]), (2, 1, 1, 1)) for n in ("x", "eps", "x"))
    prediction = prediction[::-1] + 0.1 * eps
    schedule = Schedule(ScheduleConfig(prediction_type=prediction_type, rescale_betas_zero_snr=zero))
    t = jnp.asarray(TIMES)
    config = LossConfig(loss_type=kind, snr_gamma=gamma)
    losses = sample_losses(schedule, config, prediction, to_target(schedule, x0, eps, t), t)
    ours = jnp.mean(losses * (1 if gamma < 0 else min_snr_weights(schedule, gamma, t)))

    ddpm = theirs.scheduler(theirs.DDPMScheduler, prediction_type=prediction_type, rescale_betas_zero_snr=zero)
    times, x0, eps, prediction = torch.tensor(TIMES), *(theirs.to_torch(x) for x in (x0, eps, prediction))
    target = eps if prediction_type == "epsilon" else ddpm.get_velocity(x0, eps, times)
    ratio = ddpm.alphas_cumprod[times]
    # `get_huber_threshold_if_needed` and `conditional_loss` of sd-scripts.
    c = ((1 - 0.1) / (1 + ((1 - ratio) / ratio) ** 0.5) ** 2 + 0.1).view(-1, 1, 1, 1)
    root = torch.sqrt((prediction - target) ** 2 + c**2) - c
    square = torch.nn.functional.mse_loss(prediction, target, reduction="none")
    entries = {"l2": square, "huber": 2 * c * root, "smooth_l1": 2 * root}[kind]
    expected = entries.mean(dim=(1, 2, 3))
    if gamma > 0:
        # `train_text_to_image_sdxl.py`, with `compute_snr` of diffusers' training_utils.
        from diffusers.training_utils import compute_snr

        snr = compute_snr(ddpm, times)
        weights = torch.stack([snr, gamma * torch.ones_like(times)], dim=1).min(dim=1)[0]
        expected = expected * (weights / (snr if prediction_type == "epsilon" else snr + 1))
    assert float(ours) == pytest.approx(float(expected.mean()), rel=2e-5)


def test_biases_are_those_of_the_training_script():
    """`generate_timestep_weights` of train_text_to_image_sdxl.py; its ranges end before their end, ours with it."""
    torch = theirs.torch
    parts: dict[Any, slice] = {"earlier": slice(0, 300), "later": slice(-300, None), "range": slice(200, 501)}
    for strategy, part in parts.items():
        weights = torch.ones(1000)
        weights[part] *= 4.0
        bias = TimestepBiasConfig(strategy=strategy, multiplier=4.0, portion=0.3, begin=200, end=500)
        ours = timestep_weights(bias, 1000)
        assert ours is not None
        np.testing.assert_allclose(ours, (weights / weights.sum()).numpy(), rtol=1e-5)
