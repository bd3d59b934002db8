"""What is compared, each side in processes of its own: neither takes memory, threads or a device from the other."""

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

log = logging.getLogger("sdxl_eqx")

SAID = "sdxl_eqx says:"

LINES = 8
"""Of what a side that fails said last: JAX ends with some that say little."""


def command(module: str, side: str, asked: Mapping[str, Any]) -> list[str]:
    """What begins a side."""
    return [sys.executable, "-m", f"sdxl_eqx.benchmarks.{module}", side, json.dumps(asked)]


def ask(words: list[str]) -> dict[str, Any]:
    """What a side says, once it has ended.

    Raises:
        ChildProcessError: where it failed, with the last of what it said.
    """
    ended = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    answers = [line.removeprefix(SAID) for line in ended.stdout.splitlines() if line.startswith(SAID)]
    if ended.returncode == 0 and answers:
        return json.loads(answers[0])
    said = (ended.stderr or ended.stdout).strip().splitlines()
    raise ChildProcessError(f"it ended with code {ended.returncode}: {' | '.join(said[-LINES:]) or 'no word'}")


def in_turn(
    module: str,
    asked: Mapping[str, Any],
    beside: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    rounds: int,
    libraries: Sequence[str],
    remedy: str = "",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What both sides of a module say, begun anew in each round; what ours says tells what the other is asked.

    Of the other side there is nothing on a TPU, without one of its `libraries`, or where it fails, which is said with
    a `remedy`: ours took its time, and is not lost.

    Raises:
        ChildProcessError: where ours failed.
    """
    ours, theirs = [ask(command(module, "ours", asked))], []
    other = beside(ours[0])
    compared = has_other_side(ours[0]["platform"], libraries)
    for i in range(rounds):
        for side in ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours"):
            if side == "ours" and i > 0:
                ours.append(ask(command(module, side, asked)))
            elif side == "theirs" and compared:
                try:
                    theirs.append(ask(command(module, side, other)))
                except ChildProcessError as error:
                    log.warning("nothing to compare with: PyTorch failed; %s%s", error, remedy)
                    compared, theirs = False, []
    return ours, theirs


def has_other_side(platform: str, libraries: Sequence[str]) -> bool:
    """Whether there may be another side: not on a TPU, or where one of its libraries is missing, which is said."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if platform == "tpu":
        log.info("nothing to compare with: PyTorch is measured on CPUs and NVIDIA GPUs")
    elif missing:
        log.info("nothing to compare with: %s cannot be imported (pip install -e '.[dev]')", " and ".join(missing))
    return platform != "tpu" and not missing


def say(**values: Any) -> None:
    """Answer, from within a side."""
    sys.stdout.write(f"\n{SAID} {json.dumps(values)}\n")
    sys.stdout.flush()
