"""How fast prompts become pictures on the CPU: this project beside diffusers, each in processes of its own."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sdxl_eqx.benchmarks.config import GenerateBenchmark
from sdxl_eqx.benchmarks.drawing_side import SAID
from sdxl_eqx.benchmarks.figures import Figure
from sdxl_eqx.benchmarks.random_models import HALF, TINY, RandomModel
from sdxl_eqx.benchmarks.results import check_counts, load_average, of_now, publish, results_file
from sdxl_eqx.benchmarks.timing import alternated, cores

log = logging.getLogger("sdxl_eqx")

LIBRARIES = ("jax", "equinox", "torch", "diffusers", "transformers", "numpy")
"""Whose versions the figures depend on."""

BASELINE = ("torch", "diffusers", "transformers")
"""What the other side is made of."""

PROMPT = "a castle in the forest, oil on canvas"

MODELS: Mapping[str, RandomModel] = {"tiny": TINY, "300m": HALF}


def measure(config: GenerateBenchmark) -> list[Figure]:
    """Measure everything, say it, and write it.

    Raises:
        ValueError: a flag is wrong, or PyTorch or diffusers is not there.
        OSError: models cannot be written to the folder for temporary files, or a side failed.
    """
    check_counts(rounds=config.rounds, starts=config.starts, steps=config.steps)
    missing = [name for name in BASELINE if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"generate is measured beside diffusers, and {' and '.join(missing)} cannot be imported: "
            "pip install -e '.[dev]'."
        )
    file, load = results_file(config.json), load_average()
    if load is not None:
        log.info("%d cores; load of the machine before this: %.1f", cores(), load)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as work:
        for name, model in MODELS.items():
            if config.model in ("all", name):
                figures += drawing(name, model, Path(work) / name, config)
    return publish(of_now(figures, load), file, libraries=LIBRARIES, load=load, steps=config.steps)


def drawing(name: str, model: RandomModel, work: Path, config: GenerateBenchmark) -> list[Figure]:
    """Seconds until a new process has a picture, and those that it takes for each after that.

    Raises:
        OSError: where a side failed, with the last of what it said.
    """
    folder = work / "model"
    log.info("%s: writing a model of random weights", name)
    model.write(folder)
    said = f"{name} ({model.parameters:.0f}M), {model.side}x{model.side}, {config.steps} steps"
    asked = {
        "folder": str(folder), "prompt": PROMPT, "steps": config.steps, "guidance_scale": 5.0, "side": model.side
    }  # fmt: skip
    caches = (str(work / f"cache {i}") for i in range(config.starts))

    def begin(side: str, cache: str) -> AbstractContextManager[Side]:
        return Side.begun(command(side, {**asked, "cache": cache}))

    def start(side: str, cache: str) -> float:
        with begin(side, cache) as begun:
            return begun.first

    log.info("%s: starting each side %s", said, "once" if config.starts == 1 else f"{config.starts} times")
    settle(begin)
    cold, theirs = alternated(lambda: start("ours", next(caches)), partial(start, "theirs", ""), config.starts)
    again = tuple(start("ours", str(work / "cache 0")) for _ in range(config.starts - 1))
    log.info("%s: drawing %d pictures a side", said, config.rounds)
    with begin("ours", str(work / "cache 0")) as one, begin("theirs", "") as other:
        again += (one.first,)
        warm = alternated(partial(one.draw, 1), partial(other.draw, 1), config.rounds)
    return [
        Figure(f"{said}: first picture of a new process", "s", cold, theirs),
        Figure("the same, of what was compiled before", "s", again, theirs),
        Figure("each picture after that", "s", *warm),
    ]


def settle(begin: Callable[[str, str], AbstractContextManager["Side"]]) -> None:
    """Have files and libraries lie in memory for both sides, which come one after the other."""
    with begin("theirs", ""):
        pass


def command(side: str, asked: Mapping[str, Any]) -> list[str]:
    """What begins a side."""
    return [sys.executable, "-m", "sdxl_eqx.benchmarks.drawing_side", side, json.dumps(asked)]


class Side:
    """A process that draws."""

    def __init__(self, process: "subprocess.Popen[str]", errors: Path) -> None:
        self.process = process
        self.errors = errors
        began = time.perf_counter()
        self._read()
        self.first = time.perf_counter() - began
        """Seconds from its beginning to its first picture."""

    @classmethod
    @contextmanager
    def begun(cls, words: Sequence[str]) -> Iterator["Side"]:
        """One that has drawn its first picture; at the end it ends.

        Raises:
            ChildProcessError: where it failed, with the last of what it said.
        """
        # Other devices, and settings of a test run, are not what is measured.
        env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
        env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryDirectory() as folder:
            errors = Path(folder) / "errors"
            with (
                errors.open("w", encoding="utf-8") as stderr,
                subprocess.Popen(
                    words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
                ) as process,
            ):
                try:
                    yield cls(process, errors)
                except BaseException:
                    process.kill()
                    raise

    def draw(self, seed: int) -> float:
        """Seconds that a picture takes."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> float:
        """The seconds that it says next."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(SAID):
                return float(line.removeprefix(SAID))
        said = self.errors.read_text("utf-8", "replace").strip().splitlines()
        raise ChildProcessError(
            f"a side of what is measured ended with code {self.process.wait()}: {' | '.join(said[-3:])}"
        )
