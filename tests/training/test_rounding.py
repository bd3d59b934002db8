"""Moments in bfloat16, rounded so that they are right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdxl_eqx.config import OptimConfig
from sdxl_eqx.training.optimizer import make_optimizer
from sdxl_eqx.training.rounding import stochastic_round


@pytest.mark.parametrize("value", [1.0, 1.001, -3.3e-5, 1e-30, 0.0])
def test_rounding_gives_one_of_both_neighbours_and_the_value_on_average(value):
    x = jnp.full((64, 1024), value, jnp.float32)
    y = np.asarray(jax.jit(stochastic_round, static_argnums=2)(x, jnp.int32(3), 1).astype(jnp.float32))
    spacing = float(jnp.finfo(jnp.bfloat16).eps) * abs(value)
    assert len(np.unique(y)) <= 2 and np.abs(y - value).max() <= spacing
    assert abs(y.mean() - np.float32(value)) <= spacing / 100


def test_every_update_and_every_array_draws_anew():
    x = jnp.full((4096,), 1.001, jnp.float32)
    draws = [np.asarray(stochastic_round(x, jnp.int32(n), i)) for n in range(2) for i in range(2)]
    for i, one in enumerate(draws):
        assert all((one != other).mean() > 0.1 for other in draws[i + 1 :])


def test_what_is_not_finite_stays_so():
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    y = np.asarray(stochastic_round(x, jnp.int32(0), 0), np.float32)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_moment_reaches_the_square_of_a_steady_gradient(dtype):
    optimizer = make_optimizer(OptimConfig(moments_dtype=dtype), optax.constant_schedule(1e-3))
    params = {"weight": jnp.zeros((64, 64))}
    gradient = {"weight": jnp.full((64, 64), 0.3)}

    def step(_, state):
        return optimizer.update(gradient, state, params)[1]

    state = jax.jit(lambda s: jax.lax.fori_loop(0, 3000, step, s))(optimizer.init(params))
    (adam,) = [s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(s, "nu")]
    assert adam.nu["weight"].dtype == adam.mu["weight"].dtype == jnp.dtype(dtype)
    expected = 0.09 * (1 - 0.999**3000)
    assert abs(float(adam.nu["weight"].astype(jnp.float32).mean()) / expected - 1) < 0.01
    nearest = jnp.bfloat16(0.0)
    for _ in range(3000 if dtype == "bfloat16" else 0):
        nearest = (0.999 * nearest.astype(jnp.float32) + 0.001 * 0.09).astype(jnp.bfloat16)
        if nearest == (0.999 * nearest.astype(jnp.float32) + 0.001 * 0.09).astype(jnp.bfloat16):
            assert float(nearest) < 0.5 * expected  # where rounding to the nearest would have stopped
            break
