import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdxl_eqx.config import OptimConfig
from sdxl_eqx.training.optimizer import is_decayed, learning_rate, make_optimizer
from sdxl_eqx.weights.names import is_stacked

PEAK = 0.5


def rates(steps, *, total=100, batch=1, **options):
    schedule = learning_rate(OptimConfig(learning_rate=PEAK, **options), total_steps=total, batch_size=batch)
    return [float(np.asarray(schedule(n))) for n in steps]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [PEAK, PEAK, PEAK, PEAK]),
        ({"lr_schedule": "linear"}, [PEAK, 0.75 * PEAK, 0.5 * PEAK, 0.0]),
        ({"lr_schedule": "cosine"}, [PEAK, PEAK * (1 + math.cos(math.pi / 4)) / 2, 0.5 * PEAK, 0.0]),
    ],
)
def test_rates_without_warm_up_are_those_worked_out_by_hand(options, expected):
    np.testing.assert_allclose(rates([0, 25, 50, 100], **options), expected, atol=1e-7)


@pytest.mark.parametrize(("kind", "middle"), [("constant", PEAK), ("linear", PEAK / 2), ("cosine", PEAK / 2)])
def test_warm_up_is_linear_from_zero_and_the_rest_follows(kind, middle):
    found = rates([0, 5, 10, 20, 60], lr_schedule=kind, warmup_steps_fraction=0.2)
    np.testing.assert_allclose(found, [0, PEAK / 4, PEAK / 2, PEAK, middle], atol=1e-7)


def test_a_schedule_may_be_shorter_than_the_run():
    found = rates([0, 20, 40, 90], lr_schedule="linear", learning_rate_schedule_steps=40)
    np.testing.assert_allclose(found, [PEAK, PEAK / 2, 0, 0], atol=1e-7)


def test_scale_lr_multiplies_by_the_global_batch():
    assert rates([3], batch=16, scale_lr=True) == [16 * PEAK]
    assert rates([3], batch=16) == [PEAK]


def test_weight_decay_spares_norms_and_biases_and_only_they(unet):
    for path, decayed in jax.tree_util.tree_leaves_with_path(is_decayed(unet)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert decayed == (name.endswith("weight") and "norm" not in name), name
    paths = (jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(unet))
    assert any(map(is_stacked, paths))


def update(optimizer: optax.GradientTransformation, gradients: Any, params: Any) -> Any:
    """The first updates."""
    return optimizer.update(gradients, optimizer.init(params), params)[0]


@pytest.mark.parametrize("decay_all", [False, True])
def test_without_gradients_only_what_decays_shrinks(decay_all):
    config = OptimConfig(learning_rate=PEAK, adam_weight_decay=0.1, decay_all=decay_all)
    optimizer = make_optimizer(config, optax.constant_schedule(PEAK))
    params = {"weight": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}
    updates = update(optimizer, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["weight"], -PEAK * 0.1 * 2.0)
    np.testing.assert_allclose(updates["bias"], -PEAK * 0.1 * 2.0 if decay_all else 0.0)


def first_moment(gradient, **options):
    """(1 - b1) times the gradient as AdamW sees it."""
    optimizer = make_optimizer(OptimConfig(**options), optax.constant_schedule(PEAK))
    params = {"weight": jnp.zeros((1, 2))}
    _, state = optimizer.update({"weight": jnp.array([gradient])}, optimizer.init(params), params)
    (mu,) = [x for p, x in jax.tree_util.tree_leaves_with_path(state) if ".mu" in jax.tree_util.keystr(p)]
    return np.asarray(mu)[0] / 0.1


def test_gradients_are_clipped_by_value_and_then_by_norm():
    value = {"opt_enable_grad_clipping": True, "max_grad_value": 3.0}
    norm = {"opt_enable_grad_global_norm_clipping": True, "max_grad_norm": 1.0}
    np.testing.assert_allclose(first_moment([30.0, -4.0]), [30, -4], rtol=1e-5)
    np.testing.assert_allclose(first_moment([30.0, -2.0], **value), [3, -2], rtol=1e-5)
    np.testing.assert_allclose(first_moment([30.0, -40.0], **norm), [0.6, -0.8], rtol=1e-5)
    # By norm first, the result would be (0.6, -0.8): nothing of it is above 3.
    np.testing.assert_allclose(first_moment([30.0, -40.0], **value, **norm), [0.5**0.5, -(0.5**0.5)], rtol=1e-5)
    np.testing.assert_allclose(first_moment([0.3, -0.4], **value, **norm), [0.3, -0.4], rtol=1e-5)


def test_the_first_update_is_adamws_by_hand():
    config = OptimConfig(adam_weight_decay=0.0)
    optimizer = make_optimizer(config, optax.constant_schedule(PEAK))
    params = {"weight": jnp.ones((1, 2))}
    updates = update(optimizer, {"weight": jnp.array([[3.0, -1e-8]])}, params)
    np.testing.assert_allclose(updates["weight"], [[-PEAK, PEAK / 2]], rtol=1e-5)
