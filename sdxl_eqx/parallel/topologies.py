"""Accelerators that are not here: their memory and speed by name, and devices of them to compile for."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jax.experimental import topologies


@dataclass(frozen=True)
class Chip:
    """One accelerator, as its maker describes it."""

    hardware: Literal["tpu", "gpu", "cpu"]
    memory: int
    """Bytes of HBM."""
    usable: float
    """Share of it that a program may fill."""
    tflops: float
    """Peak of dense bfloat16 products, in TFLOP/s."""
    bandwidth: float
    """Of the memory, in GB/s."""
    network: float
    """Of the network to the other chips of a slice or host, in GB/s each way."""

    @property
    def limit(self) -> int:
        """Bytes that a program may fill."""
        return int(self.memory * self.usable)


GPUS_OF_A_HOST = 8

NETWORK_CARD = 50.0
"""GB/s each way of a GPU to those of other hosts (DGX H100: a card of 400 Gbit/s for each)."""

GIB = 2**30
CHIPS = {
    "v4": Chip("tpu", 32 * GIB, 0.97, 275.0, 1228.0, 150.0),
    "v5e": Chip("tpu", 16 * GIB, 0.97, 197.0, 819.0, 100.0),
    "v5p": Chip("tpu", 95 * GIB, 0.97, 459.0, 2765.0, 300.0),
    "v6e": Chip("tpu", 32 * GIB, 0.97, 918.0, 1638.0, 224.0),
    "h100": Chip("gpu", 84978434048, 0.9, 989.0, 3352.0, 450.0),
    "h200": Chip("gpu", 150754820096, 0.9, 989.0, 4917.0, 450.0),
}
"""Google's pages on TPU versions (of the interconnect, half of what is published for both ways) and NVIDIA's data
sheets; the memory of GPUs as their driver reports it. libtpu keeps a few hundred MB for itself, and of a GPU a run may
fill 90% (parallel/compiler_flags.py)."""

AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "h100": 0, "h200": 0}
"""Of the shape of a slice; GPUs are named by their number."""

TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""
"""XLA's GpuTargetConfig of a Hopper card, in text form."""


def chip(name: str) -> Chip:
    """The accelerator of a topology's name.

    Raises:
        ValueError: where the name is of no form that is known here.
    """
    return _read(name)[1]


def devices(name: str, slices: int = 1) -> Sequence[Any]:
    """The devices of `v5p:2x2x1`, `v5e:16x16` or `h100x8`, so many slices of it (TPUs), for compiling alone.

    Raises:
        ValueError: where there is no such topology, or its compiler is not installed.
    """
    kind, found, shape = _read(name)
    try:
        if found.hardware == "gpu":
            if slices > 1:
                raise ValueError(
                    f"--compile-topology-num-slices {slices}: GPUs have none; name all of them, as {kind}x16."
                )
            target = TARGET.format(bandwidth=int(found.bandwidth * 1e9), memory=found.memory, name=kind.upper())
            count = int(shape)
            hosts = -(-count // GPUS_OF_A_HOST)
            if count % hosts:
                raise ValueError(f"--compile-topology {name}: a host has {GPUS_OF_A_HOST} GPUs; use a multiple of it.")
            return topologies.get_topology_desc(
                kind, platform="cuda", topology=f"1x{hosts}x{count // hosts}", target_config=target
            ).devices
        # It describes any TPU on any host, if it is kept from looking for one.
        for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            os.environ.setdefault(variable, "1")
        options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if kind == "v4":
            options["chip_config_name"] = "megacore"  # as a run has it: both cores of a chip are one device
        if set(shape) <= {"1", "x"}:
            options["chips_per_host_bounds"] = [1, 1, 1]
        return topologies.get_topology_desc(name, platform="tpu", **options).devices
    except (RuntimeError, FileNotFoundError) as error:  # no compiler, no libtpu.so, or a shape it does not know
        package, extra, module = (
            ("libtpu", "tpu", "libtpu") if found.hardware == "tpu" else ("JAX's CUDA plugin", "cuda13", "jax_plugins")
        )
        there = importlib.util.find_spec(module) is not None
        remedy = "Name a shape that is sold." if there else f"Install it with pip install -e '.[{extra}]'."
        raise ValueError(
            f"--compile-topology {name}: {package} does not describe it ({str(error).splitlines()[0][:200]}). {remedy}"
        ) from error


def _read(name: str) -> tuple[str, Chip, str]:
    """(kind, its chip, its shape or count) of a name."""
    form = re.fullmatch(r"([a-z0-9]+?)(?::(\d+(?:x\d+)+)|x([1-9]\d*))", name)
    kind = form[1] if form else ""
    axes = form[2].count("x") + 1 if form and form[2] else 0
    if form is None or axes != AXES.get(kind):
        raise ValueError(
            f"--compile-topology {name}: write CHIP:SHAPE for TPUs, as v5p:2x2x1, v5e:4x4 or v6e:16x16, or CARDxCOUNT "
            f"for GPUs, as h100x8; known are {', '.join(CHIPS)}."
        )
    return kind, CHIPS[kind], form[2] or form[3]
