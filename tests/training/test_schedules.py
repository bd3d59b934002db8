"""The learning rate at each update."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_eqx.config import OptimConfig
from sdxl_eqx.training.optimizer import learning_rate

PEAK = 0.5


def rates(steps: Any, *, total: int = 100, batch: int = 1, **options: Any) -> list[float]:
    """The rates at those updates, as the compiled step finds them."""
    schedule = learning_rate(OptimConfig(learning_rate=PEAK, **options), total_steps=total, batch_size=batch)
    return [float(x) for x in jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32))]


def bump(progress: float) -> float:
    """A cosine from the peak to 0."""
    return PEAK * (1 + math.cos(math.pi * progress)) / 2


RULES: dict[str, Any] = {"lr_schedule": "piecewise", "lr_step_rules": "2:25,0.5:50,0"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [PEAK, PEAK, PEAK, PEAK, PEAK]),
        ({"lr_schedule": "linear"}, [PEAK, 0.76 * PEAK, 0.75 * PEAK, 0.5 * PEAK, 0.0]),
        ({"lr_schedule": "cosine"}, [PEAK, bump(0.24), bump(0.25), bump(0.5), 0.0]),
        ({"lr_schedule": "cosine_with_restarts"}, [PEAK, bump(0.24), bump(0.25), bump(0.5), 0.0]),
        ({"lr_schedule": "cosine_with_restarts", "lr_num_cycles": 4}, [PEAK, bump(0.96), PEAK, PEAK, 0.0]),
        ({"lr_schedule": "rex"}, [PEAK, PEAK * 0.76 / 0.88, PEAK * 0.75 / 0.875, PEAK * 0.5 / 0.75, 0.0]),
        (RULES, [2 * PEAK, 2 * PEAK, 0.5 * PEAK, 0.0, 0.0]),
    ],
    ids=str,
)
def test_rates_without_warm_up_are_those_worked_out_by_hand(options, expected):
    np.testing.assert_allclose(rates([0, 24, 25, 50, 100], **options), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "middle"),
    [
        ({"lr_schedule": "constant"}, PEAK),
        ({"lr_schedule": "linear"}, PEAK / 2),
        ({"lr_schedule": "cosine"}, PEAK / 2),
        ({"lr_schedule": "cosine_with_restarts"}, PEAK / 2),
        ({"lr_schedule": "cosine_with_restarts", "lr_num_cycles": 2}, PEAK),
        ({"lr_schedule": "rex"}, PEAK * 2 / 3),
        ({"lr_schedule": "piecewise", "lr_step_rules": "1:60,0.1"}, 0.1 * PEAK),
    ],
    ids=str,
)
def test_warm_up_is_linear_from_zero_and_the_rest_follows(options, middle):
    found = rates([0, 5, 10, 20, 60], **options, warmup_steps_fraction=0.2)
    np.testing.assert_allclose(found, [0, PEAK / 4, PEAK / 2, PEAK, middle], atol=1e-7)


def test_rules_count_updates_from_the_first_and_warm_up_leads_to_the_rule_that_then_holds():
    found = rates([0, 5, 10, 24, 25, 49, 50], **RULES, warmup_steps_fraction=0.1)
    np.testing.assert_allclose(found, [0, PEAK, 2 * PEAK, 2 * PEAK, PEAK / 2, PEAK / 2, 0], atol=1e-7)


def test_every_restart_of_many_begins_at_the_peak():
    options = {"lr_schedule": "cosine_with_restarts", "lr_num_cycles": 7, "total": 7 * 30}
    np.testing.assert_allclose(rates(np.arange(0, 210, 30), **options), PEAK, rtol=1e-6)
    assert max(rates(np.arange(29, 210, 30), **options)) < 0.01 * PEAK


def test_a_long_run_keeps_its_restarts_apart():
    options = {"lr_schedule": "cosine_with_restarts", "lr_num_cycles": 1000, "total": 1_000_000}
    np.testing.assert_allclose(rates([999_000, 999_500, 1_000_000], **options), [PEAK, PEAK / 2, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine_with_restarts", "rex"])
def test_a_schedule_may_be_shorter_than_the_run_and_stays_at_zero(kind):
    found = rates([0, 40, 41, 90], lr_schedule=kind, learning_rate_schedule_steps=40)
    np.testing.assert_allclose(found, [PEAK, 0, 0, 0], atol=1e-7)


def test_scale_lr_multiplies_by_the_samples_of_an_update():
    assert rates([3], batch=16, scale_lr=True) == [16 * PEAK]
    assert rates([3], batch=16) == [PEAK]


def test_rules_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="--lr-step-rules '1:x,2'"):
        rates([0], lr_schedule="piecewise", lr_step_rules="1:x,2")
