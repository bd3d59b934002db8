"""The sampler's timesteps and noise levels: diffusers' tables from the golden file."""

from typing import Any

import numpy as np
import parity_models as tiny
import pytest

from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.sampling.sigmas import initial_scale, sigmas, timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_sigmas_and_initial_scale_are_diffusers_for_1_to_50_steps(spacing: Any):
    golden = tiny.read_golden("schedule")
    config = ScheduleConfig(timestep_spacing=spacing)
    t = [timesteps(config, steps) for steps in tiny.STEPS]
    levels = [sigmas(config, one) for one in t]
    np.testing.assert_array_equal(np.concatenate(t), golden[f"{spacing}.timesteps"])
    np.testing.assert_allclose(np.concatenate(levels), golden[f"{spacing}.sigmas"], rtol=5e-6)
    scales = [initial_scale(config, one) for one in levels]
    np.testing.assert_allclose(scales, golden[f"{spacing}.initial"], rtol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 20, 50, 1000])
def test_levels_fall_to_zero_and_there_are_as_many_as_steps(spacing: Any, steps: int):
    config = ScheduleConfig(timestep_spacing=spacing, steps_offset=0)
    t = timesteps(config, steps)
    levels = sigmas(config, t)
    assert (len(t), len(levels)) == (steps, steps + 1)
    assert (np.diff(levels) < 0).all()
    assert levels[-1] == 0


def test_trailing_starts_at_the_very_last_timestep():
    assert timesteps(ScheduleConfig(timestep_spacing="trailing"), 8)[0] == 999
