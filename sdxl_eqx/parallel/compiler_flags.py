"""Flags of XLA and libtpu for training, set before JAX starts; what the installed version does not know is left out."""

import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jax._src.xla_bridge import backends_are_initialized  # what is public would start them

from sdxl_eqx.parallel.devices import on_gpu_machine, on_tpu_vm

log = logging.getLogger("sdxl_eqx")

TIMEOUT = 60.0
"""Seconds for all that a compiler is asked; one question takes about one."""

ALONE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""Keeps a process that only asks off accelerators, metadata servers and the lock of libtpu."""

MEMORY_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The share of a GPU's memory that JAX takes, by its name and the older one; both at once are an error to JAX."""


@dataclass(frozen=True)
class Compiler:
    """A compiler that reads flags from an environment variable, and ends the process at one that it does not know.

    One of `packages` brings it. `load` is a program that makes it read them without an accelerator.
    """

    variable: str
    packages: tuple[str, ...]
    load: str
    flags: tuple[str, ...]


GPU = Compiler(
    "XLA_FLAGS",
    packages=("jax-cuda13-pjrt", "jax-cuda12-pjrt"),
    load="import jax; jax.devices()",  # XLA for CPUs has the flags of the plugin of its version
    # From NVIDIA's list for FSDP (JAX-Toolbox, docs/GPU_performance.md), compiled into SDXL's step for 8 H100, 4 images
    # each (jaxlib 0.10.2). By XLA's estimate it waits 1 instead of 30 of its 595 ms for the network, and takes 0.1 GiB
    # more. Not from that list: the latency hiding scheduler and pipelined reduce-scatters, which are on already;
    # combine thresholds, which hide no more than XLA's own; double buffering of loops, 0.5 ms for 1.1 GiB.
    flags=(
        # A scan gathers the weights of its next block while it computes this one.
        "--xla_gpu_enable_pipelined_all_gather=true",
        # And sums the gradients of its last one. They are all-reduces here: XLA makes reduce-scatters of them later.
        "--xla_gpu_enable_pipelined_all_reduce=true",
    ),
)

TPU = Compiler(
    "LIBTPU_INIT_ARGS",
    packages=("libtpu",),
    load="from jax.experimental import topologies; topologies.get_topology_desc('v5e:2x2', platform='tpu')",
    # From MaxDiffusion's list for v5p (MLPerf 4.1) and MaxText's for v6e (benchmarks/xla_flags_library.py), compiled
    # into a scanned stage with FSDP (libtpu 0.0.42): those that hide more of the network. Not a larger
    # xla_tpu_scoped_vmem_limit_kib: our kernels need none, and XLA has that much less for its own arrays.
    flags=(
        # Of a block's 11 gatherings of weights, 9 go on while others are multiplied; v5p and v6e would wait for each.
        # Either does nothing without the other. On v5e both are on already.
        "--xla_enable_async_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    ),
)


def set_compiler_flags(hardware: str, *, ahead: bool = False) -> list[str]:
    """Set what suits this `--hardware` and the environment does not say yet; returns what was set.

    `ahead` is for compiling alone, for devices that are not here.

    Raises:
        RuntimeError: where JAX has started, for it reads the environment only then.
    """
    compiler = _named(hardware) if ahead else _compiler(hardware)
    if compiler is None or not _versions(compiler.packages):
        return []
    if backends_are_initialized():
        raise RuntimeError(
            f"set_compiler_flags: JAX has started and reads {compiler.variable} no more; call it before anything asks "
            "for devices or makes an array."
        )
    text = os.environ.get(compiler.variable, "").strip()
    done = _known(compiler, _unsaid(compiler.flags, text))
    if done:
        os.environ[compiler.variable] = " ".join([text, *done]).strip()
    if compiler is GPU and not ahead and not any(name in os.environ for name in MEMORY_FRACTION):
        # Of JAX's own 0.75 a training step would leave the rest idle; 0.9 is what that page takes.
        os.environ[MEMORY_FRACTION[0]] = "0.9"
        done.append(f"{MEMORY_FRACTION[0]}=0.9")
    if done:
        log.info("set for the compiler: %s", " ".join(done))
    return done


def _compiler(hardware: str) -> Compiler | None:
    """That of the accelerator which this process will use; None for a CPU, or where it cannot be told."""
    platforms = [name.replace("cuda", "gpu") for name in os.environ.get("JAX_PLATFORMS", "").split(",") if name]
    if hardware == "auto":
        hardware = platforms[0] if platforms else "gpu" if on_gpu_machine() else "tpu" if on_tpu_vm() else "cpu"
    elif platforms and hardware not in platforms:
        return None
    return _named(hardware)


def _named(hardware: str) -> Compiler | None:
    return {"gpu": GPU, "tpu": TPU}.get(hardware)


def _versions(packages: Sequence[str]) -> str:
    """Those of the packages that are installed, with their versions."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _unsaid(flags: Sequence[str], text: str) -> list[str]:
    """The flags that the user's text does not have with any value."""
    if text and not text.startswith("-"):
        return []  # XLA reads it as the name of a file of flags
    said = {_name(word) for word in text.split()}
    return [flag for flag in flags if not {_name(flag), f"no{_name(flag)}"} & said]


def _name(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0]


def _known(compiler: Compiler, flags: Sequence[str]) -> list[str]:
    """The flags that the installed version knows, as it was asked now or before."""
    version = _versions(("jaxlib", *compiler.packages))
    cache = _read_cache()
    known = cache.setdefault(version, {})
    new = [flag for flag in flags if flag not in known]
    if new:
        try:
            unknown = _Questions(compiler).unknown(new)
        except (subprocess.TimeoutExpired, OSError) as error:
            log.warning("no flags are set for the compiler: %s did not say which it knows (%s)", version, error)
            return []
        known.update((flag, flag not in unknown) for flag in new)
        _write_cache(cache)
    unknown = [flag for flag in flags if not known[flag]]
    if unknown:
        log.info("not set, since %s does not know it: %s", version, " ".join(unknown))
    return [flag for flag in flags if known[flag]]


class _Questions:
    """What a compiler says to flags, asked in processes of their own within `TIMEOUT`.

    Raises:
        TimeoutExpired: where it takes longer.
        OSError: where it cannot be loaded with no flags either.
    """

    def __init__(self, compiler: Compiler):
        self.compiler = compiler
        self.end = time.monotonic() + TIMEOUT

    def unknown(self, flags: Sequence[str]) -> list[str]:
        """The flags that it does not load with."""
        unknown = self._search(flags)
        if len(unknown) == len(flags) and (complaint := self._complaint([])) is not None:
            raise OSError((complaint.strip().splitlines() or ["no message"])[-1])
        return unknown

    def _search(self, flags: Sequence[str]) -> list[str]:
        complaint = self._complaint(flags) if flags else None
        if complaint is None:
            return []
        # "Unknown command line flag 'a'. Did you mean: b ?"; and XLA lists all its flags after a value it cannot read.
        about = re.findall(r"(?:unknown|illegal|couldn't interpret).*?(?=did you mean|$)", complaint, re.I | re.M)
        words = set(re.findall(r"\w+", " ".join(about)))
        named = [flag for flag in flags if _name(flag) in words]
        if named:
            return named + self._search([flag for flag in flags if flag not in named])
        if len(flags) == 1:
            return list(flags)
        half = len(flags) // 2
        return self._search(flags[:half]) + self._search(flags[half:])

    def _complaint(self, flags: Sequence[str]) -> str | None:
        """What it writes where it does not load with these flags alone."""
        environment = {name: value for name, value in os.environ.items() if name not in (GPU.variable, TPU.variable)}
        ended = subprocess.run(
            [sys.executable, "-c", self.compiler.load],
            env=environment | ALONE | {self.compiler.variable: " ".join(flags)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=max(self.end - time.monotonic(), 0),
            text=True,
            errors="replace",
        )
        return ended.stderr if ended.returncode else None


def _cache_file() -> Path:
    return Path.home() / ".cache" / "sdxl_eqx" / "compiler_flags.json"


def _read_cache() -> dict[str, dict[str, bool]]:
    """Whether each version knows each flag, as far as it was asked; nothing where the file is damaged."""
    try:
        cache = json.loads(_cache_file().read_text(encoding="utf-8"))
        return {
            version: {flag: known for flag, known in flags.items() if isinstance(known, bool)}
            for version, flags in cache.items()
        }
    except (OSError, RuntimeError, ValueError, AttributeError):  # RuntimeError: of Path.home()
        return {}


def _write_cache(cache: dict[str, dict[str, bool]]) -> None:
    """In one step, so that no process reads half of it."""
    try:
        file = _cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        building = file.with_name(f".{file.name}.{os.getpid()}")
        building.write_text(json.dumps(cache, indent=1), encoding="utf-8")
        os.replace(building, file)
    except (OSError, RuntimeError) as error:
        log.info("compiler_flags.json: not written, so the compiler is asked again next time (%s)", error)
