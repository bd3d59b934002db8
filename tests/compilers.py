"""Compilers for devices that are not here: libtpu for TPUs, JAX's CUDA plugin for an H100."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental import topologies

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
HAS_CUDA = bool(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13"))

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
def tpus():
    """The devices of a topology, asked for once."""
    known = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

        def of(name: str) -> Any:
            if name not in known:
                known[name] = topologies.get_topology_desc(name, platform="tpu").devices
            return known[name]

        yield of


@pytest.fixture(scope="module")
def h100s() -> Callable[[int], Any]:
    """So many H100s."""
    jax.devices()  # finds the plugin

    def of(count: int) -> Any:
        return topologies.get_topology_desc(
            "h100", platform="cuda", topology=f"1x{count}x1", target_config=H100
        ).devices

    return of


def compile_for(
    platform: str, function: Callable[..., Any], arrays: Any, *, options: dict[str, Any] | None = None, **jit: Any
) -> Any:
    """The function, compiled for tpu or cuda with these options of the compiler."""
    traced = jax.jit(function, **jit).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).compile(compiler_options=options)
