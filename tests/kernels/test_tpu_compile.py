"""The kernels compile for real TPUs, by libtpu on any host; `pytest -rP` shows the memory that each would take."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SDXL, both, shapes
from compilers import HAS_LIBTPU, compile_for
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sdxl_eqx.config import FlashBlockSizes
from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.residuals import keep_attention
from sdxl_eqx.kernels.sharded import Sharded

pytestmark = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


def compile_for_tpu(attend, arrays, **options):
    """Both passes, compiled."""
    return compile_for("tpu", both(attend, **options), arrays)


def temporaries(attend, shape, device) -> float:
    """MiB that a chip needs beside arguments and results."""
    memory = compile_for_tpu(attend, shapes(*shape, sharding=SingleDeviceSharding(device))).memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 2**20


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("shape", SDXL, ids=str)
def test_flash_compiles_at_the_shapes_of_sdxl(shape, topology, tpus):
    print(f"{topology} {shape}: flash, {temporaries(Flash('splash'), shape, tpus(topology)[0]):.1f} MiB of temporaries")


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("shape", SDXL, ids=str)
def test_flash_keeps_no_scores_and_for_the_text_xla_needs_no_more(shape, topology, tpus):
    flash, xla = (temporaries(attend, shape, tpus(topology)[0]) for attend in (Flash("splash"), dot_product))
    print(f"{topology} {shape}: flash {flash:.1f} MiB, dot_product {xla:.1f} MiB of temporaries")
    assert xla < flash if shape[2] == 77 else flash < xla / 4


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((1, 3952, 3952, 10, 64), jnp.bfloat16, {}),  # 832 x 1216
        ((1, 4096, 4096, 10, 64), jnp.float32, {}),
        ((1, 16384, 16384, 1, 512), jnp.float32, {}),  # the VAE
        ((1, 77, 77, 12, 64), jnp.bfloat16, {"causal": True}),  # a text encoder
    ],
    ids=str,
)
def test_flash_compiles_for_other_shapes(shape, dtype, options, tpus):
    arrays = shapes(*shape, dtype=dtype, sharding=SingleDeviceSharding(tpus("v5e:2x2")[0]))
    compile_for_tpu(Flash("splash"), arrays, **options)


def test_one_fused_kernel_for_the_backward_pass_compiles(tpus):
    arrays = shapes(*SDXL[0], sharding=SingleDeviceSharding(tpus("v5e:2x2")[0]))
    compile_for_tpu(Flash("splash", FlashBlockSizes(use_fused_bwd_kernel=True)), arrays)


@pytest.mark.parametrize("s", [4096, 77])
def test_flash_compiles_on_a_mesh_and_gathers_keys_over_context(s, tpus):
    devices = np.array(tpus("v5e:2x2")).reshape(2, 2)
    mesh = Mesh(devices, ("data", "context"), axis_types=(AxisType.Auto, AxisType.Auto))
    arrays = shapes(2, 4096, s, 10, 64, sharding=NamedSharding(mesh, P("data")))
    text = compile_for_tpu(Sharded(Flash("splash"), mesh), arrays).as_text()
    assert text is not None and ("reduce-scatter" in text) == (s == 4096)


@pytest.mark.parametrize(("policy", "runs"), [(keep_attention, 1), (None, 2)])
def test_a_policy_that_keeps_attention_runs_the_forward_kernel_once(policy, runs, tpus):
    mesh = Mesh(np.array(tpus("v5e:2x2")), ("data",), axis_types=(AxisType.Auto,))
    attend = jax.checkpoint(Sharded(Flash("splash"), mesh), policy=policy)
    arrays = shapes(4, 2048, 2048, 2, 64, sharding=NamedSharding(mesh, P("data")))
    text = compile_for_tpu(attend, arrays).as_text()
    assert text is not None
    assert len(re.findall(r"%splash_mha_fwd\S* = .*custom-call", text)) == runs
