"""AdamW's moments in 8 bits: what a code can say, and that training goes as with float32."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sdxl_eqx.config import OptimConfig, ParallelConfig
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.eightbit import Block, block_of, dequantise, quantise
from sdxl_eqx.training.optimizer import make_optimizer


def dynamic_code(*, signed: bool) -> np.ndarray:
    """The magnitudes of Dettmers' dynamic code, as its paper says it: ever fewer bits for ever smaller decades."""
    found = [0.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        found += list(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    return np.array([*found[:-1], 1.0] if signed else [*found, 1.0])


WHOLE = Block(0, 256)
quantised = jax.jit(quantise, static_argnames=("block", "stream", "signed"))
dequantised = jax.jit(dequantise, static_argnames=("block", "signed"))


def decoded(codes: Any, *, signed: bool) -> np.ndarray:
    """What codes stand for at a scale of 1."""
    return np.asarray(dequantised(jnp.asarray(codes, jnp.uint8), jnp.ones(len(codes) // 256), WHOLE, signed=signed))


def test_codes_are_those_of_the_paper_on_either_side_of_zero():
    magnitudes = dynamic_code(signed=True)
    values = decoded(np.arange(256), signed=True)
    np.testing.assert_allclose(values[:128], magnitudes, rtol=1e-6)
    np.testing.assert_allclose(values[128:], -magnitudes, rtol=1e-6)
    np.testing.assert_allclose(decoded(np.arange(256), signed=False), dynamic_code(signed=False), rtol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_what_a_code_says_comes_back_as_that_code(signed: bool):
    codes = np.arange(256)
    values = decoded(codes, signed=signed)
    again, scale = quantised(jnp.asarray(values), WHOLE, jnp.int32(0), 0, signed=signed)
    assert float(scale[0]) == 1.0
    expected = np.where(codes == 128, 0, codes) if signed else codes
    # A value and its code may differ by float32's rounding, so that now and then a neighbour is drawn.
    off = np.asarray(again, np.int32) != expected
    assert off.sum() <= 2
    np.testing.assert_allclose(decoded(again, signed=signed)[~off], values[~off], rtol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_a_round_trip_gives_one_of_the_neighbours(signed: bool):
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(-7, 0, 2**14)
    x[::256] = 1.0  # so that every scale is 1
    signs = rng.choice([-1, 1], 2**14) if signed else 1
    codes, scales = quantised(jnp.asarray(signs * x, jnp.float32), WHOLE, jnp.int32(0), 0, signed=signed)
    assert codes.dtype == jnp.uint8 and (np.asarray(scales) == 1).all()
    y = signs * np.asarray(dequantised(codes, scales, WHOLE, signed=signed))
    values = dynamic_code(signed=signed)
    above = np.searchsorted(values, x)
    low, high = values[np.maximum(above - 1, 0)], values[above]
    # Second moments are never rounded to 0.
    low = low if signed else np.maximum(low, values[1])
    off = np.minimum(np.abs(y - low), np.abs(y - high))
    assert (off <= 1e-6 * x).all()
    # The bound of the docstring, in the middle of a decade.
    for decade in range(6):
        here = (x < 0.5 * 10.0**-decade) & (x > 0.2 * 10.0**-decade)
        assert np.abs(y - x)[here].max() <= (0.9 / 64 if signed else 0.9 / 128) * 5.0**-decade * 1.001


@pytest.mark.parametrize("value", [0.5, 0.997, -0.997, 3e-5, -2e-7])
def test_the_rounding_is_right_on_average(value: float):
    x = jnp.full((256 * 400,), value).at[::256].set(1.0)
    codes, scales = quantised(x, WHOLE, jnp.int32(3), 1, signed=True)
    y = np.delete(np.asarray(dequantised(codes, scales, WHOLE, signed=True)), np.s_[::256])
    assert len(np.unique(y)) == 2
    assert y.mean() == pytest.approx(value, abs=0.02 * float(np.ptp(y)))


def test_a_second_moment_that_is_not_zero_never_becomes_zero():
    x = jnp.array([1.0, 1e-12, 0.0] + [0.5] * 253)
    codes, scales = quantised(x, WHOLE, jnp.int32(0), 0, signed=False)
    y = dequantised(codes, scales, WHOLE, signed=False)
    assert y[0] == 1 and 0 < y[1] < 1e-6 and y[2] == 0


def test_a_block_of_zeros_stays_so():
    codes, scales = quantised(jnp.zeros(256), WHOLE, jnp.int32(0), 0, signed=True)
    np.testing.assert_array_equal(dequantised(codes, scales, WHOLE, signed=True), np.zeros(256))


def test_every_update_and_every_array_draws_anew():
    x = jnp.linspace(0.1, 1, 4096)
    codes = [np.asarray(quantised(x, WHOLE, jnp.int32(n), i, signed=False)[0]) for n in range(2) for i in range(2)]
    for i, one in enumerate(codes):
        assert all((one != other).mean() > 0.1 for other in codes[i + 1 :])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scales_are_of_neighbours_along_the_axis(axis: int):
    x = np.random.default_rng(0).standard_normal((8, 12, 16)).astype(np.float32)
    block = Block(axis, 4)
    codes, scales = quantised(jnp.asarray(x), block, jnp.int32(0), 0, signed=True)
    assert codes.shape == x.shape and scales.shape == block.scales(x.shape)
    parts = np.stack(np.split(x, x.shape[axis] // 4, axis), axis)
    np.testing.assert_array_equal(scales, np.abs(parts).max(axis + 1))
    y = np.asarray(dequantised(codes, scales, block, signed=True))
    assert np.abs(y - x).max() <= 1.5 * 0.9 / 64 * np.abs(x).max()


NAMES = {
    "conv_in.weight": ((3, 3, 4, 320), Block(3, 160)),
    "conv.weight": ((3, 3, 640, 320), Block(2, 160)),
    "time_emb_proj.weight": ((1280, 1280), Block(0, 256)),
    "transformer_blocks.attn1.to_q.weight": ((10, 1280, 1280), Block(1, 256)),
    "transformer_blocks.attn1.to_out.0.weight": ((10, 1280, 1280), Block(2, 256)),
    "transformer_blocks.ff.net.2.weight": ((2, 640, 2560), Block(2, 256)),
    "transformer_blocks.ff.net.0.proj.bias": ((10, 10240), Block(1, 256)),
    "transformer_blocks.norm1.weight": ((2, 1280), None),
    "to_q.lora_A.weight": ((4, 1280), Block(1, 256)),
    "odd.weight": ((6007, 1), None),
}


@pytest.mark.parametrize("name", NAMES)
def test_blocks_lie_along_an_axis_that_fsdp_does_not_share_where_it_is_long_enough(name: str):
    shape, block = NAMES[name]
    ((path, _),) = jax.tree_util.tree_leaves_with_path(nested(name, 0))
    assert block_of(path, shape) == block


def nested(name: str, leaf: Any) -> Any:
    """A tree with one leaf at that path."""
    for part in reversed(name.split(".")):
        leaf = {part: leaf}
    return leaf


def optimizer(kind: Any = "adamw8bit", rate: float = 1e-2, **options: Any) -> optax.GradientTransformation:
    """One without weight decay."""
    config = OptimConfig(optimizer=kind, adam_weight_decay=0.0, **options)
    return make_optimizer(config, optax.constant_schedule(rate))


def weights(rows: int = 64) -> Any:
    """A large matrix, and a small one."""
    return {"large": {"weight": jnp.ones((rows, 128))}, "small": {"weight": jnp.ones((8, 8))}}


def state_of(state: Any) -> Any:
    """That with codes, in an optimizer's state."""
    (found,) = [s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu_scale")) if hasattr(s, "mu_scale")]
    return found


def test_the_state_has_codes_in_the_parameters_shape_and_small_arrays_in_float32():
    state = optimizer().init(weights())
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    adam = state_of(state)
    for moment, scale in ((adam.mu, adam.mu_scale), (adam.nu, adam.nu_scale)):
        assert (moment["large"]["weight"].shape, moment["large"]["weight"].dtype) == ((64, 128), jnp.uint8)
        assert (scale["large"]["weight"].shape, scale["large"]["weight"].dtype) == ((1, 128), jnp.float32)
        assert moment["small"]["weight"].dtype == jnp.float32 and scale["small"]["weight"] is None
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_an_update_keeps_the_structure_and_gives_float32():
    transform = optimizer()
    state = transform.init(weights())
    gradient = jax.tree.map(lambda x: 0.1 * x, weights())
    updates, after = jax.jit(transform.update)(gradient, state, weights())
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    # The first update is computed before anything is rounded.
    exact, _ = optimizer("adamw").update(gradient, optimizer("adamw").init(weights()), weights())
    for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def trained(kind: Any, steps: int) -> tuple[np.ndarray, Any]:
    """(losses, weights) of noisy gradients of a quadratic, some of whose directions are 1000 times as steep."""
    transform = optimizer(kind)
    steep = 10 ** jax.random.uniform(jax.random.key(0), (64, 128), minval=-3, maxval=0)
    params = {"weight": jnp.ones((64, 128))}

    def loss(params: Any) -> jax.Array:
        return jnp.sum(steep * jnp.square(params["weight"]))

    def step(carry: Any, key: Any) -> Any:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        noise = 0.5 * steep * jax.random.normal(key, steep.shape)
        updates, state = transform.update({"weight": gradient["weight"] + noise}, state, params)
        return (optax.apply_updates(params, updates), state), value

    begin = (params, transform.init(params))
    keys = jax.random.split(jax.random.key(1), steps)
    (params, _), losses = jax.jit(lambda begin: jax.lax.scan(step, begin, keys))(begin)
    return np.asarray(losses), params["weight"]


def test_training_goes_as_with_float32():
    ours, w = trained("adamw8bit", 300)
    exact, w_exact = trained("adamw", 300)
    assert exact[100] < 0.5 * exact[0]
    np.testing.assert_allclose(ours[:150], exact[:150], rtol=0.05)
    assert ours[-1] < 2 * exact[-1] + 1e-4 * exact[0]
    assert np.linalg.norm(w - w_exact) < 0.1 * np.linalg.norm(w_exact - 1)


def test_second_moments_follow_gradients_that_become_small():
    transform = optimizer()
    params = {"weight": jnp.zeros((64, 128))}
    # In every block, so that the scale, which follows the largest, does not help.
    large = jnp.broadcast_to(jnp.arange(64)[:, None] % 2 == 0, (64, 128))

    def step(n: Any, state: Any) -> Any:
        small = jnp.where(n < 500, 0.3, 0.03)
        return transform.update({"weight": jnp.where(large, 0.3, small)}, state, params)[1]

    state = state_of(jax.jit(lambda s: jax.lax.fori_loop(0, 3000, step, s))(transform.init(params)))
    block = Block(0, 64)
    nu = np.asarray(dequantised(state.nu["weight"], state.nu_scale["weight"], block, signed=False))
    found = nu[~np.asarray(large)].mean()
    before = 0.09 * (1 - 0.999**500) * 0.999**2500
    assert found == pytest.approx(before + 0.0009 * (1 - 0.999**2500), rel=0.02)


def test_codes_and_scales_lie_as_their_parameter():
    params = {
        "resnets": {"conv": {"weight": jnp.zeros((3, 3, 64, 64))}},
        "transformer_blocks": {"attn1": {"to_out": {"0": {"weight": jnp.zeros((2, 128, 256))}}}},
    }
    layout = Layout(make_mesh(ParallelConfig(ici_fsdp_parallelism=4, ici_data_parallelism=2), jax.devices()))
    where = layout.shardings(jax.eval_shape(optimizer().init, params))
    specs = [s.spec for s in jax.tree.leaves(layout.shardings(params))]
    assert specs == [P(None, None, None, "fsdp"), P(None, "fsdp")]
    adam = state_of(where)
    for moment in (adam.mu, adam.nu):
        assert [s.spec for s in jax.tree.leaves(moment)] == specs


def test_an_update_of_shared_weights_sends_nothing_but_scales():
    # 1280 inputs would be 5 blocks, which 8 devices do not share evenly.
    params = {"attn1": {"to_q": {"weight": jnp.zeros((512, 96))}, "to_out": {"0": {"weight": jnp.zeros((1280, 64))}}}}
    layout = Layout(make_mesh(ParallelConfig(ici_fsdp_parallelism=8), jax.devices()))
    transform = optimizer()
    state = transform.init(params)
    args = jax.tree.map(jax.device_put, (params, state, params), layout.shardings((params, state, params)))
    out = layout.shardings((params, state))
    text = jax.jit(transform.update, out_shardings=out).lower(*args).compile().as_text()
    assert text is not None
    found = re.findall(r"= \(?\w+\[([\d,]*)\].* (all-gather|all-to-all|all-reduce|collective-permute)", text)
    sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims, _ in found]
    scales = sum(x.size for x in jax.tree.leaves((state_of(state).mu_scale, state_of(state).nu_scale)))
    assert sum(sizes) <= scales, found


def test_bfloat16_moments_are_refused():
    with pytest.raises(ValueError, match="--moments-dtype bfloat16 has no meaning with --optimizer adamw8bit"):
        optimizer(moments_dtype="bfloat16")
