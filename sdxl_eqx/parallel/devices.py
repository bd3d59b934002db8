"""What JAX found to run on, and what it should have found."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger("sdxl_eqx")


def choose_hardware(hardware: str) -> Sequence[Any]:
    """The devices of that kind (auto: JAX's default), with a loud word where an accelerator lies idle.

    Raises:
        ValueError: where the kind that was asked for is not there.
    """
    if hardware == "auto":
        devices = jax.devices()
        idle = _idle_accelerator() if devices[0].platform == "cpu" else None
        if idle:
            log.warning(
                "THIS MACHINE HAS A %s BUT JAX RUNS ON THE CPU, which is many times slower. Install JAX for it: "
                "pip install -e '.[%s]'. (--hardware cpu says that the CPU is meant.)",
                *idle,
            )
        return devices
    try:
        return jax.devices(hardware)
    except RuntimeError:
        found = ", ".join(sorted({d.platform for d in jax.devices()}))
        extra = {"gpu": "cuda13", "tpu": "tpu"}.get(hardware)
        remedy = f"install JAX for it (pip install -e '.[{extra}]') or " if extra else ""
        raise ValueError(f"--hardware {hardware}: JAX finds only {found}; {remedy}use --hardware auto.") from None


def memory(devices: Sequence[Any]) -> int | None:
    """Bytes that JAX has of each accelerator; None for a CPU, whose memory is shared with everything else."""
    device = next(device for device in devices if device.process_index == jax.process_index())
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def _idle_accelerator() -> tuple[str, str] | None:
    """(name, extra that installs JAX for it) of an accelerator that JAX was not told to ignore."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    if on_gpu_machine():
        return "GPU", "cuda13"
    return ("TPU", "tpu") if on_tpu_vm() else None


def on_gpu_machine() -> bool:
    """Whether this machine seems to have NVIDIA's GPUs, without asking JAX."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def on_tpu_vm() -> bool:
    """Whether this machine says that it has TPUs, without asking JAX."""
    named = any(os.environ.get(name) for name in ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"))
    return named or Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()


def check_dtype(devices: Sequence[Any], dtype: str) -> None:
    """Check that devices compute in a dtype.

    Raises:
        ValueError: where they do not.
    """
    if devices[0].platform == "cpu" and dtype == "float16":
        raise ValueError(
            "--activations-dtype float16: XLA has no such matrix products on CPU; use float32 or bfloat16."
        )
