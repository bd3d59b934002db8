"""What comes before any computation: the compilers' flags, the other processes, JAX's own settings."""

import logging
from pathlib import Path

import jax

from sdxl_eqx.config import MachineConfig
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.compiler_flags import set_compiler_flags

log = logging.getLogger("sdxl_eqx")


def begin_jax(machine: MachineConfig) -> None:
    """What must come before JAX finds its devices: the compilers' flags, and the other processes of a run.

    Raises:
        ValueError: where other processes are expected and do not come.
    """
    set_compiler_flags(machine.hardware)
    hosts.start(skip=machine.skip_jax_distributed_system, hardware=machine.hardware)
    if not hosts.is_first():
        log.setLevel(logging.WARNING)  # the first process speaks for all


def configure_jax(machine: MachineConfig, precision: str) -> None:
    """JAX's global settings: matrix precision (DEFAULT, HIGH or HIGHEST) and the persistent compile cache.

    Several CPU devices go without the cache: of a program that XLA read from there, the collectives have lost their
    order, and two devices that begin with different ones wait for each other for ever.
    """
    names = {"DEFAULT": None, "HIGH": "high", "HIGHEST": "highest"}
    jax.config.update("jax_default_matmul_precision", names[precision])
    cache = machine.jax_cache_dir or str(Path.home() / ".cache" / "sdxl_eqx" / "jax")
    several = jax.default_backend() == "cpu" and jax.device_count() > 1
    jax.config.update("jax_compilation_cache_dir", None if several or cache == "none" else cache)
