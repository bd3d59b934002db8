"""The schedule against diffusers' DDPMScheduler."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import parity_torch as theirs
import pytest

from sdxl_eqx.diffusion.prediction import to_target
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig

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
