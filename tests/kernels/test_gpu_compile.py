"""The kernels compile for an H100, by JAX's CUDA plugin on any host; `pytest -rP` shows the memory of each."""

import importlib.util

import jax
import numpy as np
import pytest
from attention_cases import SDXL, both, shapes
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.cudnn import cudnn
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.residuals import keep_attention
from sdxl_eqx.kernels.sharded import Sharded

HAS_PLUGIN = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")
pytestmark = pytest.mark.skipif(not HAS_PLUGIN, reason="JAX's CUDA plugin is not installed")

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def h100s():
    """So many H100s that are not here."""
    jax.devices()  # finds the plugin

    def of(count: int):
        return topologies.get_topology_desc(
            "h100", platform="cuda", topology=f"1x{count}x1", target_config=H100
        ).devices

    return of


def compile_for_h100(attend, arrays):
    """Both passes, compiled."""
    return jax.jit(both(attend)).trace(*arrays).lower(lowering_platforms=("cuda",)).compile()


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
