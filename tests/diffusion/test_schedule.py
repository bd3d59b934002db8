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
@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero", [False, True])
def test_the_config_goes_to_json_and_back(prediction_type: Any, beta_schedule: Any, timestep_spacing: Any, zero: bool):
    config = ScheduleConfig(
        prediction_type=prediction_type,
        beta_schedule=beta_schedule,
        timestep_spacing=timestep_spacing,
        rescale_betas_zero_snr=zero,
    )
    assert ScheduleConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "key, value",
    [
        ("beta_schedule", "squaredcos_cap_v2"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "even"),
        ("trained_betas", [0.1]),
    ],
)
def test_a_schedule_that_is_not_supported_is_refused_by_name(key: str, value: Any):
    with pytest.raises(ValueError, match=key):
        ScheduleConfig.from_json({**ScheduleConfig().to_json(), key: value})


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_zero_terminal_snr_ends_in_noise_alone_and_begins_as_before(beta_schedule: Any):
    config = ScheduleConfig(beta_schedule=beta_schedule, rescale_betas_zero_snr=True)
    alpha_bar = alphas_cumprod(config)
    usual = alphas_cumprod(ScheduleConfig(beta_schedule=beta_schedule))
    assert alpha_bar[-1] == 0
    assert alpha_bar[0] == pytest.approx(usual[0], rel=1e-12)
    assert (np.diff(alpha_bar) < 0).all()
    # Lin et al. 2023, algorithm 1: what is lost grows with the noise.
    assert (np.diff(np.sqrt(usual) - np.sqrt(alpha_bar)) > -1e-12).all()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_targets_at_zero_terminal_snr_are_finite_and_v_is_minus_the_picture(prediction_type: Any):
    schedule = Schedule(ScheduleConfig(prediction_type=prediction_type, rescale_betas_zero_snr=True))
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.standard_normal((2, 3, 2, 4)), jnp.float32) for _ in range(2))
    last = jnp.asarray([999, 999])
    np.testing.assert_array_equal(schedule.add_noise(x0, eps, last), eps)
    target = to_target(schedule, x0, eps, last)
    np.testing.assert_array_equal(target, eps if prediction_type == "epsilon" else -x0)
    if prediction_type == "v_prediction":
        np.testing.assert_array_equal(to_x0(schedule, target, eps, last), x0)


def test_a_model_that_predicts_x0_is_read_but_not_trained():
    config = ScheduleConfig.from_json({**ScheduleConfig().to_json(), "prediction_type": "sample"})
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        Schedule(config)


@pytest.mark.parametrize(
    "name, spacing, beta_end",
    [
        ("DDIMScheduler", "leading", 0.02),
        ("FlaxDDIMScheduler", "leading", 0.02),
        ("DPMSolverMultistepScheduler", "linspace", 0.02),
        ("HeunDiscreteScheduler", "linspace", 0.012),
        ("", "leading", 0.012),
    ],
)
def test_a_missing_key_is_that_of_the_files_class(name: str, spacing: str, beta_end: float):
    config = ScheduleConfig.from_json({"_class_name": name} if name else {})
    assert (config.timestep_spacing, config.beta_end) == (spacing, beta_end)


def test_what_only_a_sampler_heeds_does_not_stop_training():
    sampling = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "interpolation_type": "log_linear"}
    assert ScheduleConfig.from_json({**ScheduleConfig().to_json(), **sampling}) == ScheduleConfig()
