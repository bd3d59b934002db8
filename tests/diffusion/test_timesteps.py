"""Which timesteps are drawn, and how often."""

from typing import Any

import jax
import jax.random as jr
import numpy as np
import pytest

from sdxl_eqx.config import TimestepBiasConfig
from sdxl_eqx.diffusion.timesteps import draw_timesteps, timestep_weights


def biased(total: int = 1000, **options: Any) -> np.ndarray:
    """Which timesteps are likelier than the others."""
    weights = timestep_weights(TimestepBiasConfig(multiplier=3.0, **options), total)
    assert weights is not None
    assert weights.sum() == pytest.approx(1)
    low, high = np.unique(weights)
    assert high == pytest.approx(3 * low)
    return np.flatnonzero(weights == high)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"strategy": "earlier"}, range(250)),
        ({"strategy": "later"}, range(750, 1000)),
        ({"strategy": "later", "portion": 0.001}, [999]),
        ({"strategy": "earlier", "portion": 0.25, "total": 10}, [0, 1]),
        ({"strategy": "range", "begin": 10, "end": 20}, range(10, 21)),
        ({"strategy": "range", "begin": 900, "end": 1000}, range(900, 1000)),
        ({"strategy": "range", "begin": 900, "end": 999}, range(900, 1000)),
    ],
    ids=str,
)
def test_a_strategy_makes_its_timesteps_likelier_by_the_multiplier(options, expected):
    np.testing.assert_array_equal(biased(**options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "none", "multiplier": 5.0},
        {"strategy": "later", "multiplier": 1.0},
        {"strategy": "later", "multiplier": 5.0, "portion": 0.0005},
        {"strategy": "earlier", "multiplier": 5.0, "portion": 1.0},
        {"strategy": "range", "multiplier": 5.0},
    ],
    ids=str,
)
def test_a_bias_that_changes_nothing_is_uniform(options):
    assert timestep_weights(TimestepBiasConfig(**options), 1000) is None


def test_a_range_past_the_end_of_the_schedule_is_refused():
    with pytest.raises(ValueError, match=r"--timestep-bias.begin 500 must be below 500"):
        timestep_weights(TimestepBiasConfig(strategy="range", begin=500), 500)


def test_draws_are_as_often_as_their_probabilities():
    weights = timestep_weights(TimestepBiasConfig(strategy="range", multiplier=9.0, begin=0, end=499), 1000)
    t = np.asarray(jax.jit(lambda key: draw_timesteps(weights, 20_000, 1000, key=key))(jr.key(0)))
    assert np.issubdtype(t.dtype, np.integer)
    assert (t.min(), t.max()) == (0, 999)
    assert np.mean(t < 500) == pytest.approx(0.9, abs=0.01)
    counts, _ = np.histogram(t, 5, (0, 500))
    assert counts.min() > 0.17 * len(t)


def test_a_timestep_of_probability_zero_is_never_drawn():
    weights = np.where(np.arange(1000) == 7, 1.0, 0.0)
    assert set(np.asarray(draw_timesteps(weights, 100, 1000, key=jr.key(0))).tolist()) == {7}


def test_without_weights_the_draws_are_those_of_randint():
    drawn = draw_timesteps(None, 64, 1000, key=jr.key(3))
    np.testing.assert_array_equal(drawn, jr.randint(jr.key(3), (64,), 0, 1000))
