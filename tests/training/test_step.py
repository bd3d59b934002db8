import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny_step import FROZEN, QUICK, assert_equal, begin, function, step_config, words

from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.training.step import encode


def test_the_step_is_pure(unet, latents, schedule, step):
    state = begin(unet)
    before = words(state)
    first = step(state, FROZEN, latents, schedule)
    second = step(state, FROZEN, latents, schedule)
    assert_equal(first, second)
    for x, y in zip(before, words(state), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_step_moves_every_array_of_the_unet_and_counts(unet, latents, schedule, step):
    state = begin(unet)
    after, metrics = step(state, FROZEN, latents, schedule)
    assert int(after.step) == 1
    norms = {f"learning/{name}_norm" for name in ("grad", "update", "param")}
    assert metrics.keys() == {"learning/loss", "decile_sums", "decile_counts", *norms}
    same = [np.array_equal(x, y) for x, y in zip(words(unet), words(after.trained), strict=True)]
    assert not any(same)
    assert_equal(state.key, after.key)


def test_the_draws_of_a_step_follow_from_key_and_step_number(unet, latents, schedule, step):
    state = begin(unet)
    _, metrics = step(state, FROZEN, latents, schedule)
    later = eqx.tree_at(lambda s: s.step, state, jnp.int32(1))
    _, of_later = step(later, FROZEN, latents, schedule)
    other = eqx.tree_at(lambda s: s.key, state, jr.key(8))
    _, of_other = step(other, FROZEN, latents, schedule)
    losses = {float(m["learning/loss"]) for m in (metrics, of_later, of_other)}
    assert len(losses) == 3


def test_no_key_is_used_twice(unet, batch, encoders, schedule):
    with jax.debug_key_reuse(True):
        jax.eval_shape(function(), begin(unet), dataclasses.replace(FROZEN, encoders=encoders), batch, schedule)
        jax.make_jaxpr(function())(begin(unet), dataclasses.replace(FROZEN, encoders=encoders), batch, schedule)


def test_the_loss_falls_on_one_batch_with_one_draw(unet, latents, schedule, step):
    state = begin(unet)
    losses = []
    for _ in range(40):
        state, metrics = step(eqx.tree_at(lambda s: s.step, state, jnp.int32(0)), FROZEN, latents, schedule)
        losses.append(float(metrics["learning/loss"]))
    assert min(losses[-5:]) < 0.7 * losses[0]


def test_pictures_and_cached_latents_give_the_same_step(unet, batch, latents, encoders, schedule, step):
    uncached = jax.jit(function(), compiler_options=QUICK)
    one, two = begin(unet), begin(unet)
    for _ in range(2):
        one, of_one = step(one, FROZEN, latents, schedule)
        two, of_two = uncached(two, dataclasses.replace(FROZEN, encoders=encoders), batch, schedule)
        for name in of_one:
            np.testing.assert_allclose(of_one[name], of_two[name], rtol=1e-5, atol=1e-5)


def test_pictures_without_encoders_are_refused(batch):
    with pytest.raises(ValueError, match="needs encoders"):
        encode(None, batch, jnp.zeros((8, 8, 8, 4)), config=step_config())


def test_the_average_follows_its_formula(unet, latents, schedule, step):
    state = begin(unet)
    expected = np.asarray(unet.conv_in.weight, np.float64)
    for n in range(1, 6):
        state, _ = step(state, FROZEN, latents, schedule)
        if n % 2 == 0:
            decay = min(0.9, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * np.asarray(state.trained.unet.conv_in.weight, np.float64)
        np.testing.assert_allclose(state.ema.unet.conv_in.weight, expected, rtol=1e-6, atol=1e-7)
    assert state.best is state.ema


def test_bfloat16_weights_have_moments_and_an_average_in_float32_that_move(unet, latents, schedule):
    coarse = cast(unet, jnp.bfloat16)
    state = begin(coarse)
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype(jnp.float32)}
    after, _ = jax.jit(function(), compiler_options=QUICK)(state, FROZEN, latents, schedule)
    assert {x.dtype for x in jax.tree.leaves(after.trained)} == {jnp.dtype(jnp.bfloat16)}
    floats = [x for x in jax.tree.leaves(after.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(after.trained), jax.tree.leaves(coarse), strict=True))


def test_bfloat16_activations_keep_the_state_in_float32(unet, latents, schedule, step):
    state = begin(unet)
    config = step_config(jnp.bfloat16)
    after, metrics = jax.jit(function(config), compiler_options=QUICK)(state, FROZEN, latents, schedule)
    assert {x.dtype for x in jax.tree.leaves((after.trained, after.ema))} == {jnp.dtype(jnp.float32)}
    floats = [x for x in jax.tree.leaves(after.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    _, exact = step(state, FROZEN, latents, schedule)
    assert metrics["learning/loss"].dtype == jnp.float32
    assert 0 < abs(float(metrics["learning/loss"] - exact["learning/loss"])) < 0.05


def test_a_batch_in_parts_gives_the_update_of_the_whole(unet, latents, schedule, step):
    in_parts = jax.jit(function(dataclasses.replace(step_config(), parts=4)), compiler_options=QUICK)
    one, two = begin(unet), begin(unet)
    for _ in range(2):
        one, whole = step(one, FROZEN, latents, schedule)
        two, parts = in_parts(two, FROZEN, latents, schedule)
        for name in whole:
            np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, atol=1e-5, err_msg=name)
    for x, y in zip(words(one.trained), words(two.trained), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(unet, latents, schedule, step):
    state, _ = step(begin(unet), FROZEN, latents, schedule)
    broken = dataclasses.replace(latents, mean=np.where(np.arange(8)[:, None, None, None] == 3, np.nan, latents.mean))
    after, metrics = step(state, FROZEN, broken, schedule)
    assert not np.isfinite(metrics["learning/loss"]) and int(after.step) == int(state.step) + 1
    assert_equal((after.trained, after.opt_state, after.ema), (state.trained, state.opt_state, state.ema))
    again, metrics = step(after, FROZEN, latents, schedule)
    assert np.isfinite(metrics["learning/loss"])
    assert any((x != y).any() for x, y in zip(words(again.trained), words(after.trained), strict=True))


def test_losses_by_timestep_and_the_norms_are_those_of_the_step(unet, latents, schedule, step):
    state = begin(unet)
    after, metrics = step(state, FROZEN, latents, schedule)
    assert metrics["decile_counts"].sum() == 8
    np.testing.assert_allclose(metrics["decile_sums"].sum() / 8, metrics["learning/loss"], rtol=1e-5)
    changes = [y - x for x, y in zip(words(state.trained), words(after.trained), strict=True)]
    for name, arrays in (("update", changes), ("param", words(after.trained))):
        norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays))
        np.testing.assert_allclose(metrics[f"learning/{name}_norm"], norm, rtol=1e-4)
