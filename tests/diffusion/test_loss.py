"""The denoising loss: PyTorch's gradients from the golden file, its formulas, and the draws it is taken at."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_models as tiny
import pytest

from sdxl_eqx.config import LossConfig
from sdxl_eqx.diffusion.loss import Draws, decile_sums, huber_c, min_snr_weights, sample_losses, training_loss
from sdxl_eqx.diffusion.prediction import to_target
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig, alphas_cumprod
from sdxl_eqx.models.sdxl import Conditioning
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.compute import Compute

PREDICTIONS: list[Any] = ["epsilon", "v_prediction"]
KINDS: list[Any] = ["l2", "huber", "smooth_l1"]
SHAPE = (4000, 2, 2, 4)


def new_schedule(prediction_type: Any = "epsilon", *, zero: bool = False) -> Schedule:
    """SDXL's, or that with zero terminal SNR."""
    return Schedule(ScheduleConfig(prediction_type=prediction_type, rescale_betas_zero_snr=zero))


def test_loss_and_every_gradient_are_those_of_pytorch():
    golden = tiny.read_golden("gradient")
    loss, gradient = tiny.unet_gradient(
        tiny.filled(UNet, tiny.UNET), tiny.unet_inputs(tiny.UNET, (12, 10)), "epsilon", tiny.PLAIN
    )
    assert loss == pytest.approx(float(golden.pop("loss")[0]), rel=1e-5)
    ours = tiny.file_tensors(gradient)
    assert ours.keys() == golden.keys()
    floor = 1e-3 * np.sqrt(np.mean([norm**2 for norm, _ in golden.values()]))
    for key, sketch in golden.items():
        difference = np.abs(np.array(tiny.sketch(key, ours[key])) - sketch).max()
        assert difference <= 1e-4 * max(sketch[0], floor), f"{key}: {tiny.sketch(key, ours[key])}, not {sketch}"


def test_draws_are_unit_noise_and_every_timestep_alike_and_follow_from_the_key():
    draws = Draws.draw(new_schedule(), LossConfig(), None, SHAPE, key=jr.key(0))
    assert np.asarray(draws.eps).std() == pytest.approx(1, abs=0.01)
    assert np.asarray(draws.eps).mean() == pytest.approx(0, abs=0.01)
    t = np.asarray(draws.t)
    assert t.min() >= 0 and 990 <= t.max() <= 999
    counts, _ = np.histogram(t, 10, (0, 1000))
    assert counts.min() > 300 and counts.max() < 500
    other = Draws.draw(new_schedule(), LossConfig(), None, SHAPE, key=jr.key(1))
    assert not np.array_equal(t, other.t)


def test_plain_draws_are_those_of_runs_before_there_was_a_choice():
    draws = Draws.draw(new_schedule(), LossConfig(), None, (3, 4, 2, 4), key=jr.key(5))
    noise_key, time_key = jr.split(jr.key(5))
    np.testing.assert_array_equal(draws.eps, jr.normal(noise_key, (3, 4, 2, 4), jnp.float32))
    np.testing.assert_array_equal(draws.input_eps, draws.eps)
    np.testing.assert_array_equal(draws.t, jr.randint(time_key, (3,), 0, 1000))


def drawn(**options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(noise without options, noise of the target, noise of the input) of one key."""
    plain = Draws.draw(new_schedule(), LossConfig(), None, SHAPE, key=jr.key(0))
    draws = Draws.draw(new_schedule(), LossConfig(**options), None, SHAPE, key=jr.key(0))
    np.testing.assert_array_equal(draws.t, plain.t)
    return np.asarray(plain.eps), np.asarray(draws.eps), np.asarray(draws.input_eps)


def test_an_offset_is_one_number_for_each_channel_of_each_sample_in_target_and_input():
    plain, eps, input_eps = drawn(noise_offset=0.5)
    np.testing.assert_array_equal(eps, input_eps)
    offset = eps - plain
    np.testing.assert_allclose(offset, np.broadcast_to(offset[:, :1, :1], offset.shape), atol=1e-6)
    assert offset[:, 0, 0].std() == pytest.approx(0.5, abs=0.01)
    assert np.abs(np.corrcoef(offset[:, 0, 0].T) - np.eye(4)).max() < 0.1
    assert abs(np.corrcoef(offset[:, 0, 0, 0], plain[:, 0, 0, 0])[0, 1]) < 0.1


def test_a_perturbed_input_has_noise_that_the_target_does_not():
    plain, eps, input_eps = drawn(input_perturbation=0.1)
    np.testing.assert_array_equal(eps, plain)
    more = (input_eps - eps).ravel()
    assert more.std() == pytest.approx(0.1, abs=0.002)
    assert abs(np.corrcoef(more, eps.ravel())[0, 1]) < 0.03


def test_offset_and_perturbation_are_drawn_apart():
    plain, eps, input_eps = drawn(noise_offset=0.3, input_perturbation=0.3)
    _, alone, _ = drawn(noise_offset=0.3)
    np.testing.assert_array_equal(eps, alone)
    assert abs(np.corrcoef((eps - plain)[:, 0, 0, 0], (input_eps - eps)[:, 0, 0, 0])[0, 1]) < 0.1


def arrays() -> tuple[jax.Array, jax.Array]:
    """A prediction and a target, of which one entry is far off."""
    prediction, target = np.random.default_rng(0).standard_normal((2, 4, 3, 2, 4)).astype(np.float32)
    prediction[1, 0, 0, 0] += 30
    return jnp.asarray(prediction), jnp.asarray(target)


T = jnp.array([0, 100, 200, 999])


@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_worked_out_in_float64(kind: Any, schedule: Any):
    config = LossConfig(loss_type=kind, huber_schedule=schedule, huber_c=0.2)
    prediction, target = arrays()
    found = sample_losses(new_schedule(), config, prediction, target, T)
    ratio = alphas_cumprod(ScheduleConfig())[T]
    c = {
        "snr": (1 - 0.2) / (1 + np.sqrt((1 - ratio) / ratio)) ** 2 + 0.2,
        "exponential": 0.2 ** (np.asarray(T) / 1000),
        "constant": np.full(4, 0.2),
    }[schedule][:, None, None, None]
    d = np.asarray(prediction, np.float64) - np.asarray(target, np.float64)
    root = np.sqrt(d**2 + c**2) - c
    expected = {"l2": d**2, "huber": 2 * c * root, "smooth_l1": 2 * root}[kind].mean((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_outlier_weighs_less_in_huber_than_in_the_square():
    prediction, target = arrays()
    square, huber = (sample_losses(new_schedule(), LossConfig(loss_type=k), prediction, target, T) for k in KINDS[:2])
    assert square[1] > 10 * square[0]
    assert huber[1] < 4 * huber[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_finite_and_zero_where_nothing_differs_even_at_zero_terminal_snr(kind: Any):
    config = LossConfig(loss_type=kind)
    zeros = jnp.zeros((4, 1, 1, 4))
    gradient = jax.grad(lambda x: sample_losses(new_schedule(zero=True), config, x, zeros, T).sum())(zeros)
    np.testing.assert_array_equal(gradient, zeros)


@pytest.mark.parametrize("schedule", ["snr", "exponential"])
def test_the_place_of_huber_goes_from_1_without_noise_to_c(schedule: Any):
    c = np.asarray(huber_c(new_schedule(zero=True), LossConfig(huber_schedule=schedule), jnp.arange(1000)))
    assert (np.diff(c) < 0).all()
    assert c[0] > 0.9
    assert c[-1] == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("zero", [False, True])
def test_min_snr_weights_are_the_formulas(zero: bool):
    t = np.arange(0, 999, 37)
    ratio = alphas_cumprod(ScheduleConfig(rescale_betas_zero_snr=zero))[t]
    snr = ratio / (1 - ratio)
    for prediction_type, below in zip(PREDICTIONS, (snr, snr + 1), strict=True):
        found = min_snr_weights(new_schedule(prediction_type, zero=zero), 5.0, jnp.asarray(t))
        np.testing.assert_allclose(found, np.minimum(snr, 5) / below, rtol=1e-4)


@pytest.mark.parametrize(("prediction_type", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weights_have_their_limits_at_snr_0_and_at_infinity(prediction_type: Any, last: float):
    schedule = new_schedule(prediction_type, zero=True)
    # As it is, but without any noise at first.
    ends = [schedule.alpha.at[0].set(1.0), schedule.sigma.at[0].set(0.0)]
    schedule = jax.tree.unflatten(jax.tree.structure(schedule), ends)
    np.testing.assert_array_equal(min_snr_weights(schedule, 5.0, jnp.array([0, 999])), [0.0, last])


class Echo(UNet):
    """Says what it is given."""

    def __call__(self, x, *_, **__):
        return x


def echoed(schedule: Schedule, config: LossConfig, t: jax.Array, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """(loss, losses, x0, eps) of a UNet that takes the noised latents for the target."""
    shape = (len(t), 3, 2, 4)
    x0 = jr.normal(jr.key(1), shape)
    draws = Draws.draw(schedule, config, None, shape, key=jr.key(2))
    draws = Draws(draws.eps, draws.input_eps, t)
    cond = Conditioning(jnp.zeros((len(t), 77, 8)), jnp.zeros((len(t), 8)), jnp.zeros((len(t), 6)))
    loss, losses = training_loss(
        object.__new__(Echo), schedule, config, x0, draws, cond, dtype=dtype, compute=Compute()
    )
    assert loss.dtype == losses.dtype == jnp.float32
    return loss, losses, x0, draws


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_loss_is_the_mean_of_the_samples_losses_by_their_weights(prediction_type: Any):
    schedule = new_schedule(prediction_type)
    plain, losses, x0, draws = echoed(schedule, LossConfig(), T)
    x_t = schedule.add_noise(x0, draws.eps, T)
    square = np.square(x_t - to_target(schedule, x0, draws.eps, T)).mean((1, 2, 3))
    np.testing.assert_allclose(losses, square, rtol=1e-5)
    assert float(plain) == pytest.approx(square.mean(), rel=1e-5)
    weighted, same, *_ = echoed(schedule, LossConfig(snr_gamma=5.0), T)
    np.testing.assert_array_equal(same, losses)
    weights = np.asarray(min_snr_weights(schedule, 5.0, T))
    assert len(np.unique(weights)) > 2
    assert float(weighted) == pytest.approx((weights * square).mean(), rel=1e-5)


def test_a_perturbed_input_is_noised_with_more_than_the_target():
    schedule = new_schedule()
    _, losses, x0, draws = echoed(schedule, LossConfig(input_perturbation=0.5), T)
    x_t = schedule.add_noise(x0, draws.input_eps, T)
    np.testing.assert_allclose(losses, np.square(x_t - draws.eps).mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_losses_are_finite_at_the_last_timestep_of_zero_terminal_snr(kind: Any, prediction_type: Any):
    schedule = new_schedule(prediction_type, zero=True)
    config = LossConfig(loss_type=kind, snr_gamma=5.0)
    loss, losses, *_ = echoed(schedule, config, jnp.array([999, 0]), jnp.bfloat16)
    assert np.isfinite([loss, *losses]).all()


def test_losses_are_summed_by_tenths_of_the_timesteps():
    t = jnp.array([0, 99, 100, 550, 999, 999])
    sums, counts = decile_sums(t, jnp.array([1.0, 2, 3, 4, 5, jnp.nan]), 1000)
    np.testing.assert_array_equal(counts, [2, 1, 0, 0, 0, 1, 0, 0, 0, 2])
    np.testing.assert_array_equal(sums, [3, 3, 0, 0, 0, 4, 0, 0, 0, np.nan])
    _, counts = decile_sums(jnp.arange(25), jnp.ones(25), 25)
    np.testing.assert_array_equal(counts, [3, 2, 3, 2, 3, 2, 3, 2, 3, 2])
