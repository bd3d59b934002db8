"""The step on a mesh of devices is the step on one: losses, gradients, states; `pytest -rP` shows the table."""

import dataclasses
from functools import partial

import jax
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import AXES, CASES, REFERENCE, assert_is_that_of_one_device, pairs, product
from tiny_step import FROZEN, QUICK, UNET, begin, function, step_config, words

from sdxl_eqx.config import ModelConfig, ParallelConfig, TrainConfig
from sdxl_eqx.parallel import specs
from sdxl_eqx.parallel.computing import encoding_compute
from sdxl_eqx.parallel.mesh import batch_sharding, make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.computing import unet_compute
from sdxl_eqx.training.step import StepConfig, encode


def on(layout: Layout) -> StepConfig:
    """What the step depends on, on a mesh."""
    config = TrainConfig(model=ModelConfig(activations_dtype="float32"))
    compute, encoding = unet_compute(config, UNET, layout, 8, side=8), encoding_compute(config, layout)
    return dataclasses.replace(step_config(), compute=compute, encoding=encoding, layout=layout)


def test_the_cases_cover_every_pair_of_choices_that_can_occur_together():
    assert len(CASES) <= 24
    assert pairs(CASES) == pairs(case for case in product() if case != REFERENCE)
    assert {str(case) for case in CASES} < {str(case) for case in product()}


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_loss_and_gradients_are_those_of_one_device(case, monkeypatch):
    assert_is_that_of_one_device(case, monkeypatch)


def test_losses_and_states_of_5_steps_on_data_2_by_fsdp_4_are_those_of_one_device(
    unet, latents, schedule, step, monkeypatch
):
    monkeypatch.setattr(specs, "SMALL", 64)
    layout = Layout(make_mesh(ParallelConfig(ici_data_parallelism=2, ici_fsdp_parallelism=4), jax.devices()))
    where = layout.shardings(jax.eval_shape(lambda: begin(unet)))
    assert any(s.spec != P() for s in jax.tree.leaves(where.trained))
    spread = batch_sharding(layout.mesh, AXES, 8)
    sharded = jax.jit(
        function(on(layout)),
        in_shardings=(where, layout.whole, spread, layout.whole),
        out_shardings=(where, layout.whole),
        donate_argnums=0,
        compiler_options=QUICK,
    )
    one, eight = begin(unet), jax.device_put(begin(unet), where)
    batch = jax.device_put(latents, spread)
    for _ in range(5):
        one, of_one = step(one, FROZEN, latents, schedule)
        eight, of_eight = sharded(eight, FROZEN, batch, schedule)
        np.testing.assert_allclose(of_one["learning/loss"], of_eight["learning/loss"], rtol=0, atol=1e-5)
    for x, y in zip(words(one.trained), words(eight.trained), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-4)
    for x, y in zip(words(one.ema), words(eight.ema), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-4)
    for x, sharding in zip(jax.tree.leaves(eight), jax.tree.leaves(where), strict=True):
        assert isinstance(x.sharding, NamedSharding) and x.sharding.is_equivalent_to(sharding, x.ndim)


def test_what_the_encoders_make_of_pictures_is_that_of_one_device(batch, encoders, latents, monkeypatch):
    monkeypatch.setattr(specs, "SMALL", 64)
    config = ParallelConfig(ici_fsdp_parallelism=2, ici_context_parallelism=2, ici_tensor_parallelism=2)
    layout = Layout(make_mesh(config, jax.devices()))
    where = layout.shardings(jax.eval_shape(lambda: encoders))
    assert any(s.spec != P() for s in jax.tree.leaves(where.text_encoder))
    sharded = jax.jit(
        partial(encode, config=on(layout)),
        in_shardings=(where, *[batch_sharding(layout.mesh, AXES, 8)] * 2),
        compiler_options=QUICK,
    )
    noise = jr.normal(jr.key(3), latents.mean.shape)
    wanted = encode(None, latents, noise, config=step_config())
    for x, y in zip(*map(jax.tree.leaves, (sharded(encoders, batch, noise), wanted)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
