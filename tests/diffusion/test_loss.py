"""The denoising loss: PyTorch's gradients from the golden file, and the draws it is taken at."""

import jax.random as jr
import numpy as np
import parity_models as tiny
import pytest

from sdxl_eqx.diffusion.loss import draw
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.models.unet import UNet


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
    schedule = Schedule(ScheduleConfig())
    eps, t = draw(schedule, (4000, 2, 2, 4), key=jr.key(0))
    assert np.std(eps) == pytest.approx(1, abs=0.01)
    assert np.mean(eps) == pytest.approx(0, abs=0.01)
    assert (np.min(t), np.max(t)) >= (0, 990)
    assert np.max(t) <= 999
    counts, _ = np.histogram(t, 10, (0, 1000))
    assert counts.min() > 300 and counts.max() < 500
    again = draw(schedule, (4000, 2, 2, 4), key=jr.key(0))
    np.testing.assert_array_equal(eps, again[0])
    other = draw(schedule, (4000, 2, 2, 4), key=jr.key(1))
    assert not np.array_equal(t, other[1])
