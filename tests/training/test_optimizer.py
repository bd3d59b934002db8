import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdxl_eqx.config import OptimConfig
from sdxl_eqx.training.optimizer import is_decayed, learning_rate, make_optimizer
from sdxl_eqx.training.rounding import is_moment
from sdxl_eqx.weights.names import is_stacked

PEAK = 0.5
KINDS: list[Any] = ["adamw", "adafactor", "lion", "prodigy", "adamw8bit"]
NARROWED = KINDS[:-1]


def test_weight_decay_spares_norms_and_biases_and_only_they(unet):
    for path, decayed in jax.tree_util.tree_leaves_with_path(is_decayed(unet)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert decayed == (name.endswith("weight") and "norm" not in name), name
    paths = (jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(unet))
    assert any(map(is_stacked, paths))


def update(optimizer: optax.GradientTransformation, gradients: Any, params: Any) -> Any:
    """The first updates."""
    return optimizer.update(gradients, optimizer.init(params), params)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay_all", [False, True])
def test_without_gradients_only_what_decays_shrinks(kind: Any, decay_all: bool):
    config = OptimConfig(optimizer=kind, learning_rate=PEAK, adam_weight_decay=0.1, decay_all=decay_all)
    optimizer = make_optimizer(config, optax.constant_schedule(PEAK))
    params = {"weight": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}
    updates = update(optimizer, jax.tree.map(jnp.zeros_like, params), params)
    # Prodigy's rate is in parts of its estimate; the correction of its biases is that of the first update.
    rate = PEAK * (1e-6 * np.sqrt(1 - 0.999) / (1 - 0.9) if kind == "prodigy" else 1)
    np.testing.assert_allclose(updates["weight"], -rate * 0.1 * 2.0, rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], -rate * 0.1 * 2.0 if decay_all else 0.0, rtol=1e-5)


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


@functools.cache
def gradients() -> Any:
    """Of twenty updates, for a matrix that Adafactor factors and 8 bits hold, two blocks in a stack, and a bias."""
    rng = np.random.default_rng(0)
    shapes = {"weight": (20, 128, 160), "bias": (20, 6), "transformer_blocks": (20, 2, 128, 4)}
    found = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found["transformer_blocks"][10:, 1] *= 5  # beyond Adafactor's limit, in one block
    return jax.tree.map(jnp.asarray, found)


def plain(kind: Any, **options: Any) -> OptimConfig:
    """Of one optimizer; Prodigy, whose estimate random gradients leave at 1e-6, gets a rate to move at."""
    return OptimConfig(optimizer=kind, learning_rate=1e4 if kind == "prodigy" else 0.01, **options)


@functools.cache
def run(config: OptimConfig) -> tuple[Any, Any]:
    """(weights, state) after these updates from weights of 1."""
    optimizer = make_optimizer(config, learning_rate(config, total_steps=20, batch_size=1))
    params = jax.tree.map(lambda g: jnp.ones(g.shape[1:]), gradients())

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, gradients())[0])((params, optimizer.init(params)))


def lion(g: np.ndarray, rate: float, decay: float) -> np.ndarray:
    """Lion as its paper's algorithm 2 says it."""
    x, m = np.ones(g.shape[1:]), np.zeros(g.shape[1:])
    for one in g:
        x = x - rate * (np.sign(0.9 * m + 0.1 * one) + decay * x)
        m = 0.999 * m + 0.001 * one
    return x


def adamw(g: np.ndarray, rate: float, decay: float) -> np.ndarray:
    """AdamW as its paper's algorithm 2 says it."""
    x, m, v = np.ones(g.shape[1:]), np.zeros(g.shape[1:]), np.zeros(g.shape[1:])
    for t, one in enumerate(g, 1):
        m, v = 0.9 * m + 0.1 * one, 0.999 * v + 0.001 * one**2
        x = x - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * x)
    return x


def adafactor(g: np.ndarray, rate: float, decay: float) -> np.ndarray:
    """Adafactor as its paper's algorithm 4 says it, for one matrix (factored) or vector, with steps of the rate."""
    x, v, row, column = np.ones(g.shape[1:]), 0.0, 0.0, 0.0
    for t, one in enumerate(g, 1):
        square, b2 = one**2 + 1e-30, 1 - t**-0.8
        if x.ndim == 2 and min(x.shape) >= 128:
            row = b2 * row + (1 - b2) * square.mean(1)
            column = b2 * column + (1 - b2) * square.mean(0)
            u = one / np.sqrt(np.outer(row, column) / np.mean(row))
        else:
            v = b2 * v + (1 - b2) * square
            u = one / np.sqrt(v)
        x = x - rate * (u / max(1, np.sqrt(np.mean(u**2))) + decay * x)
    return x


@pytest.mark.parametrize(("kind", "reference"), [("adamw", adamw), ("lion", lion), ("adafactor", adafactor)])
def test_updates_are_those_of_the_paper(kind: Any, reference: Any):
    params, _ = run(plain(kind, adam_weight_decay=0.1))
    wide = {name: np.asarray(g, np.float64) for name, g in gradients().items()}
    np.testing.assert_allclose(params["weight"], reference(wide["weight"], 0.01, 0.1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(params["bias"], reference(wide["bias"], 0.01, 0.0), rtol=1e-3, atol=1e-4)
    # A stack is so many matrices.
    for i in range(2):
        expected = reference(wide["transformer_blocks"][:, i], 0.01, 0.1)
        np.testing.assert_allclose(params["transformer_blocks"][i], expected, rtol=1e-3, atol=1e-4)


def test_adafactor_keeps_rows_and_columns_alone():
    _, state = run(plain("adafactor"))
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert sum(sizes) < 2000 and sizes[-3:] == [128, 160, 2 * 128 * 4]


def test_prodigy_finds_a_rate_from_which_its_weights_move():
    config = OptimConfig(optimizer="prodigy", learning_rate=1.0, adam_weight_decay=0.0)
    optimizer = make_optimizer(config, optax.constant_schedule(1.0))
    params = {"weight": jnp.full((4, 4), 3.0)}

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        gradient = jax.tree.map(lambda x: 2 * x, params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    params, state = jax.jit(lambda c: jax.lax.scan(step, c, length=400)[0])((params, optimizer.init(params)))
    assert np.abs(params["weight"]).max() < 0.3
    assert 0.05 < float(state[-1].estim_lr) < 10


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_prodigy_survives_a_first_rate_or_gradient_of_zero(warmup: float):
    config = OptimConfig(optimizer="prodigy", learning_rate=1.0, warmup_steps_fraction=warmup)
    params, state = run(config)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    assert np.mean(params["weight"] != 1) > 0.9
    optimizer = make_optimizer(config, optax.constant_schedule(1.0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = optimizer.update(zeros, optimizer.init(params), params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert all(np.isfinite(x).all() and (x != 0).all() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_arrays_alone_and_none_of_them_is_a_weights(kind: Any):
    optimizer = make_optimizer(OptimConfig(optimizer=kind), optax.constant_schedule(PEAK))
    params = jax.tree.map(lambda g: jnp.ones(g.shape[1:]), gradients())
    state = optimizer.init(params)
    leaves = jax.tree.leaves((params, state))
    assert all(isinstance(x, jax.Array) for x in leaves)
    # Both are donated: one array twice would be an error.
    pointers = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(pointers)) == len(pointers)
    shapes = jax.eval_shape(optimizer.init, params)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]
    _, after = run(plain(kind))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("kind", NARROWED)
def test_moments_in_bfloat16_lead_where_those_in_float32_do(kind: Any):
    params, _ = run(plain(kind))
    narrow, state = run(plain(kind, moments_dtype="bfloat16"))
    for path, x in jax.tree_util.tree_leaves_with_path(state.inner):
        is_exact = x.ndim == 0 or ".params0" in jax.tree_util.keystr(path)
        assert is_moment(path, x) != is_exact or x.dtype == jnp.int32
        assert x.dtype == jnp.int32 or x.dtype == (jnp.float32 if is_exact else jnp.bfloat16)
    assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state))
    moved, off = (np.linalg.norm(params["weight"] - other) for other in (1, narrow["weight"]))
    # Where the parts of Lion's sign cancel to about 0, it may turn.
    assert 0 < off < (0.3 if kind == "lion" else 0.02) * moved


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_is_clipped_first(kind: Any):
    clipped, _ = run(plain(kind, opt_enable_grad_clipping=True, max_grad_value=1e-30))
    free, _ = run(plain(kind))
    assert all((x != y).any() for x, y in zip(jax.tree.leaves(clipped), jax.tree.leaves(free), strict=True))
