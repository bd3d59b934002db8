"""The step on a mesh of devices is the step on one."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_step import QUICK, begin, function, words

from sdxl_eqx.config import ParallelConfig
from sdxl_eqx.parallel import specs
from sdxl_eqx.parallel.mesh import batch_sharding, make_mesh
from sdxl_eqx.parallel.specs import replicated, shardings


def test_losses_and_states_of_5_steps_on_data_2_by_fsdp_4_are_those_of_one_device(
    unet, latents, schedule, step, monkeypatch
):
    monkeypatch.setattr(specs, "SMALL", 64)
    mesh = make_mesh(ParallelConfig(ici_data_parallelism=2, ici_fsdp_parallelism=4), jax.devices())
    layout = shardings(jax.eval_shape(lambda: begin(unet)), mesh)
    assert any(s.spec != P() for s in jax.tree.leaves(layout.unet))
    whole = replicated(mesh)
    sharded = jax.jit(
        function(),
        in_shardings=(layout, None, batch_sharding(mesh), whole),
        out_shardings=(layout, whole),
        donate_argnums=0,
        compiler_options=QUICK,
    )
    one, eight = begin(unet), jax.device_put(begin(unet), layout)
    spread = jax.device_put(latents, batch_sharding(mesh))
    for _ in range(5):
        one, of_one = step(one, None, latents, schedule)
        eight, of_eight = sharded(eight, None, spread, schedule)
        np.testing.assert_allclose(of_one["learning/loss"], of_eight["learning/loss"], rtol=0, atol=1e-5)
    for x, y in zip(words(one.unet), words(eight.unet), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-4)
    for x, y in zip(words(one.ema), words(eight.ema), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-4)
    for x, sharding in zip(jax.tree.leaves(eight), jax.tree.leaves(layout), strict=True):
        assert isinstance(x.sharding, NamedSharding) and x.sharding.is_equivalent_to(sharding, x.ndim)
