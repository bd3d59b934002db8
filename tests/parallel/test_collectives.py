"""What goes over a TPU's network in a step of FSDP, compiled by libtpu on any host; `pytest -rP` shows the table."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from compilers import HAS_LIBTPU, compile_for

from sdxl_eqx.config import AttentionConfig, OptimConfig, ParallelConfig, TrainConfig
from sdxl_eqx.data.batch import LatentBatch
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.parallel.mesh import batch_sharding, make_mesh
from sdxl_eqx.parallel.specs import SMALL, Layout
from sdxl_eqx.training.computing import unet_compute
from sdxl_eqx.training.networks import Networks, split
from sdxl_eqx.training.optimizer import learning_rate, make_optimizer
from sdxl_eqx.training.state import new_state
from sdxl_eqx.training.step import StepConfig, train_step
from sdxl_eqx.weights.names import is_stacked

pytestmark = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")

NARROW = dataclasses.replace(
    UNetConfig.sdxl_base(),
    block_out_channels=(256, 256),
    attention_levels=(False, True),
    layers_per_block=1,
    transformer_layers=(1, 2),
    heads=(4, 4),
    cross_attention_dim=256,
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=320,
)
BATCH, SIDE = 12, 32  # no weight has such dimensions
CHIPS = 4
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
SCATTERED = "all-reduce-scatter"
"""How libtpu writes most reduce-scatters: an all-reduce in a computation of this name, each device keeping its part."""


@dataclass(frozen=True)
class Operand:
    """One array of a collective."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    """Its dimensions but for those of 1."""

    @property
    def size(self) -> int:
        """Its entries."""
        return math.prod(self.shape)


def collectives(text: str) -> list[Operand]:
    """All results of the collectives of a compiled program."""
    found, computation = [], ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?(\S+) \(.*\{$", line):
            computation = head[1]
        one = re.match(rf"\s*(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(?:-done)?\(", line)
        if one:
            kind = SCATTERED if computation.startswith(SCATTERED) else one[2]
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", one[1]):
                found.append(Operand(kind, dtype, drop_ones(int(n) for n in dims.split(",") if n)))
    return found


def drop_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without its dimensions of 1."""
    return tuple(n for n in shape if n != 1)


@pytest.fixture(scope="module")
def layout(tpus) -> Layout:
    """Four chips that share weights and batch."""
    return Layout(make_mesh(ParallelConfig(ici_data_parallelism=1, ici_fsdp_parallelism=-1), tpus("v5e:2x2")))


@pytest.fixture(scope="module")
def shared(layout: Layout) -> Counter[tuple[int, ...]]:
    """How many weights of each shape are shared out, a stack as one of its slices."""
    found = Counter()
    for path, x in jax.tree_util.tree_leaves_with_path(eqx.filter_eval_shape(UNet, NARROW, key=jr.key(0))):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if any(layout.spec(name, x.shape)):
            found[drop_ones(x.shape[is_stacked(name) :])] += 1
    return found


@pytest.fixture(scope="module")
def found(layout: Layout) -> list[Operand]:
    """The collectives of a step with clipping, an average, and blocks computed twice."""
    config = TrainConfig(attention=AttentionConfig(remat_policy="full"))
    optim = OptimConfig(opt_enable_grad_global_norm_clipping=True, ema_decay=0.9)
    compute = unet_compute(config, NARROW, layout, BATCH, side=SIDE)
    optimizer = make_optimizer(optim, learning_rate(optim, total_steps=10, batch_size=BATCH))
    step = StepConfig(0.13, jnp.dtype(jnp.bfloat16), compute, compute, optim.ema_decay, 1, layout)
    unet = eqx.filter_eval_shape(lambda: UNet(NARROW, key=jr.key(0)))
    trained, frozen = split(Networks(unet, None), config)
    state = eqx.filter_eval_shape(lambda shapes: new_state(shapes, optimizer, ema=True, key=jr.key(0)), trained)
    where = layout.shardings(state)

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((BATCH, *shape), jnp.float32)

    pooled = NARROW.projection_class_embeddings_input_dim - 6 * NARROW.addition_time_embed_dim
    context = array(77, NARROW.cross_attention_dim)
    batch = jax.eval_shape(LatentBatch, array(SIDE, SIDE, 4), array(SIDE, SIDE, 4), context, array(pooled), array(6))
    compiled = compile_for(
        "tpu",
        partial(train_step, config=step, optimizer=optimizer),
        (state, frozen, batch, jax.eval_shape(lambda: Schedule(ScheduleConfig()))),
        options={"exec_time_optimization_effort": -1.0},
        in_shardings=(where, layout.whole, batch_sharding(layout.mesh, layout.mesh.axis_names, BATCH), layout.whole),
        out_shardings=(where, layout.whole),
        donate_argnums=0,
    )
    operands = collectives(compiled.as_text())
    for one, count in sorted(Counter(operands).items(), key=str):
        print(f"{count:3} {one.kind} of {one.dtype}{list(one.shape)}")
    return operands


def of(found: list[Operand], *kinds: str) -> Counter[tuple[int, ...]]:
    """How often each shape is in collectives of these kinds."""
    return Counter(one.shape for one in found if one.kind in kinds)


def test_there_is_enough_to_see(shared):
    assert sum(shared.values()) > 80
    assert max(map(math.prod, shared)) * 4 > 2**20


def test_each_gradient_is_scattered_once_as_it_is_summed(found, shared):
    scattered = of(found, SCATTERED, "reduce-scatter")
    assert scattered <= shared
    # The others are scattered by a ring: a share goes from chip to chip, and each adds its part.
    by_ring, sent = Counter(), Counter()
    for shape, count in (shared - scattered).items():
        by_ring[math.prod(shape) // CHIPS] += count
    for one in found:
        if one.kind == "collective-permute":
            sent[one.size] += 1
    assert sent.keys() == by_ring.keys()
    assert all((CHIPS - 1) * count <= sent[size] <= CHIPS * count for size, count in by_ring.items())


def test_what_is_summed_whole_is_small(found):
    assert not [one for one in found if one.kind == "all-reduce" and one.size >= SMALL]


def test_each_weight_is_gathered_once_a_pass_and_nothing_else_is(found, shared):
    assert of(found, "all-gather") == shared + shared


def test_weights_are_gathered_in_bfloat16(found):
    assert {one.dtype for one in found if one.kind == "all-gather"} == {"bf16"}


def test_nothing_is_sent_in_another_way(found):
    assert not [one for one in found if one.kind in ("all-to-all", "collective-broadcast")]
