"""The noise schedule: DDPM's numbers, and what must hold of any schedule."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_eqx.diffusion.prediction import to_target, to_x0
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig, alphas_cumprod

PREDICTIONS: list[Any] = ["epsilon", "v_prediction"]


def test_alphas_cumprod_are_diffusers():
    golden = tiny.read_golden("schedule")["alphas_cumprod"]
    np.testing.assert_allclose(alphas_cumprod(ScheduleConfig()), golden, rtol=2e-6)


def test_alpha_and_sigma_keep_the_variance_and_the_signal_only_falls():
    schedule = Schedule(ScheduleConfig())
    assert schedule.alpha.dtype == schedule.sigma.dtype == jnp.float32
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha**2, alphas_cumprod(ScheduleConfig()), rtol=1e-6)
    snr = np.asarray(schedule.alpha / schedule.sigma) ** 2
    assert (np.diff(snr) < 0).all()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@given(t=st.integers(0, 999), seed=st.integers(0, 99))
def test_the_target_and_the_noised_latents_give_x0_back(prediction_type: Any, t: int, seed: int):
    schedule = Schedule(ScheduleConfig(prediction_type=prediction_type))
    rng = np.random.default_rng(seed)
    x0, eps = (jnp.asarray(rng.standard_normal((2, 3, 2, 4)), jnp.float32) for _ in range(2))
    times = jnp.asarray([t, 999 - t])
    x_t = schedule.add_noise(x0, eps, times)
    recovered = to_x0(schedule, to_target(schedule, x0, eps, times), x_t, times)
    # At t = 999 epsilon divides by alpha = 0.068, so float32's rounding grows about fifteenfold.
    np.testing.assert_allclose(recovered, x0, rtol=0, atol=2e-5 if prediction_type == "epsilon" else 2e-6)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
def test_the_config_goes_to_json_and_back(prediction_type: Any, beta_schedule: Any, timestep_spacing: Any):
    config = ScheduleConfig(
        prediction_type=prediction_type, beta_schedule=beta_schedule, timestep_spacing=timestep_spacing
    )
    assert ScheduleConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "key, value",
    [
        ("beta_schedule", "squaredcos_cap_v2"),
        ("prediction_type", "sample"),
        ("timestep_spacing", "linspace"),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [0.1]),
    ],
)
def test_a_schedule_that_is_not_supported_is_refused_by_name(key: str, value: Any):
    with pytest.raises(ValueError, match=key):
        ScheduleConfig.from_json({**ScheduleConfig().to_json(), key: value})
