"""The sampler against diffusers' EulerDiscreteScheduler, over the tiny UNet."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import parity_torch as theirs
import pytest

from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.sampling import pipeline
from sdxl_eqx.sampling.sigmas import initial_scale, sigmas, timesteps

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_and_sigmas_are_diffusers_for_1_to_50_steps(spacing: Any):
    config = ScheduleConfig(timestep_spacing=spacing)
    alpha_bar = np.cumprod(1 - theirs.scheduler(theirs.DDPMScheduler).betas.double().numpy())
    for steps, (their_t, their_sigmas, their_scale) in zip(
        tiny.STEPS, theirs.their_levels(timestep_spacing=spacing), strict=True
    ):
        t = timesteps(config, steps)
        levels = sigmas(config, t)
        np.testing.assert_array_equal(t, their_t)
        exact = np.interp(their_t, np.arange(1000), np.sqrt((1 - alpha_bar) / alpha_bar))
        np.testing.assert_allclose(levels[:-1], exact, rtol=1e-6)
        # Theirs come from a float32 product, which is off by 3.5e-6 where little noise is left.
        np.testing.assert_allclose(levels, their_sigmas, rtol=5e-6)
        assert initial_scale(config, levels) == pytest.approx(their_scale, rel=1e-6)


@pytest.mark.parametrize("prediction_type, spacing", [("epsilon", "leading"), ("v_prediction", "trailing")])
def test_twenty_euler_steps_are_diffusers(prediction_type: Any, spacing: Any):
    changes = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    inputs = tiny.unet_inputs(tiny.UNET, (12, 10), seed=2)
    wanted = theirs.their_trajectory(theirs.their_unet(tiny.UNET, salt=1), inputs, None, 20, 1.0, **changes)
    latents = pipeline.denoise(
        tiny.filled(UNet, tiny.UNET, salt=1),
        jnp.asarray(inputs["eps"]),
        tiny.conditioning(inputs),
        None,
        config=tiny.sampler_config(20, 1.0, **changes),
    )
    tiny.assert_close(latents, wanted, 1e-4 * max(1.0, float(np.std(wanted))))
