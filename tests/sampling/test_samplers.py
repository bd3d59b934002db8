"""Euler's method and guidance: diffusers' latents from the golden file, and cases with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import pytest
from parity_models import assert_close

from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.sampling import pipeline
from sdxl_eqx.sampling.samplers import euler
from sdxl_eqx.sampling.sigmas import sigmas, timesteps


def test_a_guided_trajectory_is_diffusers():
    inputs, other = (tiny.unet_inputs(tiny.UNET, (12, 10), seed=seed) for seed in (0, 1))
    latents = pipeline.denoise(
        tiny.filled(UNet, tiny.UNET),
        jnp.asarray(inputs["eps"]),
        tiny.conditioning(inputs),
        tiny.conditioning(other),
        config=tiny.sampler_config(**tiny.GUIDED),
    )
    wanted = tiny.read_golden("trajectory")["latents"]
    assert_close(latents / np.std(wanted), wanted / np.std(wanted), 1e-4)


def test_euler_reaches_a_picture_that_the_denoiser_knows():
    config = ScheduleConfig()
    t = timesteps(config, 7)
    x0 = jnp.asarray(tiny.latents())
    noise = jnp.asarray(tiny.generator("noise").standard_normal(x0.shape), jnp.float32)
    levels = sigmas(config, t)
    ours = euler(lambda x, sigma, t: x0, x0 + levels[0] * noise, jnp.asarray(levels), jnp.asarray(t))
    np.testing.assert_allclose(ours, x0, rtol=0, atol=1e-5)


def test_euler_shrinks_gaussian_data_as_the_exact_flow_does():
    # For data N(0, 1) the denoiser is x / (1 + sigma^2) and the flow scales x by sqrt((1 + s^2) / (1 + S^2)).
    levels = jnp.linspace(10.0, 0.0, 4001) ** 2 / 10
    x = jnp.ones((1, 1, 1, 1))
    ours = euler(lambda x, sigma, t: x / (1 + sigma**2), x, levels, levels[:-1])
    assert float(ours[0, 0, 0, 0]) == pytest.approx(float(1 / np.sqrt(101)), rel=5e-3)


def test_a_seeds_noise_is_the_same_in_whatever_batch_it_stands():
    alone = pipeline.initial_noise([7], (4, 6, 4))
    among = pipeline.initial_noise([3, 7, 11], (4, 6, 4))
    np.testing.assert_array_equal(alone[0], among[1])
    assert not np.array_equal(jax.device_get(among)[0], jax.device_get(among)[1])
