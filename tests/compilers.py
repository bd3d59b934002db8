"""Compilers for devices that are not here: libtpu for TPUs, JAX's CUDA plugin for an H100."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import pytest

from sdxl_eqx.parallel import topologies

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
HAS_CUDA = bool(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13"))


@pytest.fixture(scope="module")
def tpus():
    """The devices of a topology, asked for once."""
    known = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            patch.setenv(name, "1")  # or what is set for libtpu would outlive the module

        def of(name: str) -> Any:
            if name not in known:
                known[name] = topologies.devices(name)
            return known[name]

        yield of


@pytest.fixture(scope="module")
def h100s() -> Callable[[int], Any]:
    """So many H100s."""
    return lambda count: topologies.devices(f"h100x{count}")


def compile_for(
    platform: str, function: Callable[..., Any], arrays: Any, *, options: dict[str, Any] | None = None, **jit: Any
) -> Any:
    """The function, compiled for tpu or cuda with these options of the compiler."""
    traced = jax.jit(function, **jit).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).compile(compiler_options=options)
