import math

import equinox as eqx
import jax
import jax.random as jr
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from sdxl_eqx.config import ParallelConfig
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import SMALL, shardings, spec
from sdxl_eqx.training.state import new_state
from sdxl_eqx.weights.names import is_stacked

MESHES = {n: make_mesh(ParallelConfig(ici_fsdp_parallelism=n), jax.devices()) for n in (1, 2, 4, 8)}
PATHS = ("conv_in.weight", "mid_block.attentions.0.transformer_blocks.attn1.to_q.weight", "encoder.layers.mlp.fc1.bias")


@given(
    path=st.sampled_from(PATHS),
    shape=st.lists(st.sampled_from([1, 3, 5, 8, 10, 77, 128, 320, 1280]), max_size=5).map(tuple),
    fsdp=st.sampled_from(list(MESHES)),
)
def test_a_spec_names_fsdp_at_most_once_on_an_axis_that_it_divides_and_never_on_the_depth(path, shape, fsdp):
    found = spec(path, shape, MESHES[fsdp])
    named = [i for i, name in enumerate(found) if name is not None]
    assert len(named) <= 1 and len(found) <= len(shape)
    first = 1 if is_stacked(path) else 0
    divided = [n for n in shape[first:] if n % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < SMALL or not divided:
        assert not named
        return
    (axis,) = named
    assert found[axis] == "fsdp"
    assert axis >= first
    assert shape[axis] == max(divided)


def test_by_far_most_of_sdxl_is_shared_by_fsdp():
    unet = eqx.filter_eval_shape(UNet, UNetConfig.sdxl_base(), key=jr.key(0))
    layout = shardings(unet, MESHES[8])
    pairs = list(zip(jax.tree.leaves(unet), jax.tree.leaves(layout), strict=True))
    whole = sum(x.size for x, s in pairs if s.spec == P())
    assert whole / sum(x.size for x, _ in pairs) < 0.005
    for x, s in pairs:
        assert s.shard_shape(x.shape) is not None


@pytest.mark.parametrize("fsdp", [1, 4])
def test_moments_and_average_lie_as_their_parameter(fsdp):
    def make():
        unet = UNet(UNetConfig.tiny(), key=jr.key(0))
        return new_state(unet, optax.chain(optax.clip(1.0), optax.adamw(1e-3)), ema=True, key=jr.key(1))

    layout = shardings(jax.eval_shape(make), MESHES[fsdp])
    parameters = [s.spec for s in jax.tree.leaves(layout.unet)]
    assert any(s != P() for s in parameters) == (fsdp > 1)
    assert [s.spec for s in jax.tree.leaves(layout.ema)] == parameters
    (adam,) = [s for s in jax.tree.leaves(layout.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")]
    for moment in (adam.mu, adam.nu):
        assert [s.spec for s in jax.tree.leaves(moment)] == parameters
    assert layout.step.spec == layout.key.spec == P()
