"""What is compared, each side in processes of its own: neither takes memory, threads or a device from the other."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

log = logging.getLogger("sdxl_eqx")

SAID = "sdxl_eqx says:"


def command(module: str, side: str, asked: Mapping[str, Any]) -> list[str]:
    """What begins a side."""
    return [sys.executable, "-m", f"sdxl_eqx.benchmarks.{module}", side, json.dumps(asked)]


def ask(words: list[str]) -> dict[str, Any]:
    """What a side says, once it has ended.

    Raises:
        ChildProcessError: where it failed, with the last of what it said.
    """
    # A test run's settings are not what is measured.
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, errors="replace", check=False)
    for line in ended.stdout.splitlines():
        if line.startswith(SAID):
            return json.loads(line.removeprefix(SAID))
    said = (ended.stderr or ended.stdout).strip().splitlines()
    raise ChildProcessError(f"a side of what is measured ended with code {ended.returncode}: {' | '.join(said[-3:])}")


def in_turn(
    module: str,
    asked: Mapping[str, Any],
    beside: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    rounds: int,
    libraries: Sequence[str],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What both sides of a module say, begun anew in each round; what ours says tells what the other is asked.

    Of the other side there is nothing where PyTorch, with these `libraries`, has not the same device.

    Raises:
        ChildProcessError: where a side failed.
    """
    ours, theirs = [ask(command(module, "ours", asked))], []
    other = beside(ours[0])
    sides = [(ours, "ours", asked)]
    if has_other_side(ours[0]["platform"], libraries):
        sides.append((theirs, "theirs", other))
        theirs.append(ask(command(module, "theirs", other)))
    for i in range(1, rounds):
        for found, side, words in reversed(sides) if i % 2 else sides:
            found.append(ask(command(module, side, words)))
    return ours, theirs


def has_other_side(platform: str, libraries: Sequence[str]) -> bool:
    """Whether PyTorch is there for the same device; a line where it is not."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if platform == "tpu":
        log.info("nothing to compare with: PyTorch is measured on CPUs and NVIDIA GPUs")
    elif missing:
        log.info("nothing to compare with: %s cannot be imported (pip install -e '.[dev]')", " and ".join(missing))
    return platform != "tpu" and not missing


def say(**values: Any) -> None:
    """Answer, from within a side."""
    sys.stdout.write(f"{SAID} {json.dumps(values)}\n")
    sys.stdout.flush()
