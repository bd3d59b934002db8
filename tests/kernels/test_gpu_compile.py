"""The kernels compile for an H100, by JAX's CUDA plugin on any host; `pytest -rP` shows the memory of each."""

import jax
import numpy as np
import pytest
from attention_cases import SDXL, both, shapes
from compilers import HAS_CUDA, compile_for
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.cudnn import cudnn
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.residuals import keep_attention
from sdxl_eqx.kernels.sharded import Sharded

pytestmark = pytest.mark.skipif(not HAS_CUDA, reason="JAX's CUDA plugin is not installed")


def compile_for_h100(attend, arrays):
    """Both passes, compiled."""
    return compile_for("cuda", both(attend), arrays)


@pytest.mark.parametrize("shape", [*SDXL, (1, 3952, 3952, 10, 64)], ids=str)
@pytest.mark.parametrize("attend", [cudnn, Flash("triton")], ids=["cudnn", "flash"])
def test_it_compiles_forward_and_backward(attend, shape, h100s):
    memory = compile_for_h100(attend, shapes(*shape, sharding=SingleDeviceSharding(h100s(1)[0]))).memory_analysis()
    assert memory is not None
    print(f"{shape}: {memory.temp_size_in_bytes / 2**20:.1f} MiB of temporaries")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SDXL, ids=str)
def test_dot_product_beside_them(shape, h100s):
    test_it_compiles_forward_and_backward(dot_product, shape, h100s)


@pytest.mark.parametrize("s", [4096, 77])
@pytest.mark.parametrize("attend", [cudnn, Flash("triton")], ids=["cudnn", "flash"])
def test_it_compiles_on_a_mesh_and_gathers_keys_over_context(attend, s, h100s):
    mesh = Mesh(np.array(h100s(4)).reshape(2, 2), ("data", "context"), axis_types=(AxisType.Auto, AxisType.Auto))
    arrays = shapes(2, 4096, s, 10, 64, sharding=NamedSharding(mesh, P("data")))
    text = compile_for_h100(Sharded(attend, mesh), arrays).as_text()
    assert text is not None and ("reduce-scatter" in text) == (s == 4096)


@pytest.mark.parametrize(("policy", "runs"), [(keep_attention, 1), (None, 2)])
def test_a_policy_that_keeps_attention_runs_the_forward_kernel_once(policy, runs, h100s):
    mesh = Mesh(np.array(h100s(4)), ("data",), axis_types=(AxisType.Auto,))
    attend = jax.checkpoint(Sharded(cudnn, mesh), policy=policy)
    text = compile_for_h100(attend, shapes(4, 2048, 2048, 2, 64, sharding=NamedSharding(mesh, P("data")))).as_text()
    assert text is not None and text.count('custom_call_target="__cudnn$fmhaSoftmax"') == runs
