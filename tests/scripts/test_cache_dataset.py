"""scripts/cache_dataset.py in a process of its own: encodes once, and what is wrong is one message."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_run import BROKEN, PICTURES, ROOT, Trainer

Run = Callable[..., tuple[int, str]]
"""Runs the script with these flags; its exit code and all it said."""

SAMPLES = 6
assert BROKEN < SAMPLES < PICTURES


@pytest.fixture(scope="module")
def script(train: Trainer) -> Run:
    """The script on one device."""

    def run(*flags: str) -> tuple[int, str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "HF_", "JAX_"))}
        env |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles twice as fast
            "HF_HUB_OFFLINE": "1",
            "HOME": str(train.home),
        }
        words = [sys.executable, "scripts/cache_dataset.py", "--jax-cache-dir", str(train.cache), *flags]
        ended = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
        return ended.returncode, ended.stdout + ended.stderr

    return run


@pytest.fixture(scope="module")
def flags(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Of a few pictures, one of them broken, into a folder."""
    return (
        "--pretrained-model-name-or-path", str(model), "--train-data-dir", str(pictures), "--resolution", "16",
        "--activations-dtype", "float32", "--random-flip", "--max-train-samples", str(SAMPLES),
        "--dataset-save-location", str(tmp_path_factory.mktemp("cache") / "own"),
    )  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """What the script said of a folder that was empty, and the files that it left there, each with its time."""

    said: str
    files: dict[Path, int]


def files(flags: tuple[str, ...]) -> dict[Path, int]:
    """The files of the cache, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in Path(flags[-1]).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def encoded(script: Run, flags: tuple[str, ...]) -> Encoded:
    """The data set, encoded."""
    code, said = script(*flags)
    assert code == 0, said
    return Encoded(said, files(flags))


def test_what_can_be_used_is_encoded_and_the_last_line_says_how_much_and_where(encoded, flags):
    assert f"encoding {2 * SAMPLES} pictures and {SAMPLES + 1} captions once" in encoded.said
    counts = f"{SAMPLES - 1} samples are encoded, 1 cannot be used. Train on them with the same flags."
    assert f"{flags[-1]}: {counts}" in encoded.said.splitlines()
    skipped = [line for line in encoded.said.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == 1 and f"{BROKEN:02d}.png" in skipped[0]
    assert {path.parent.name for path in encoded.files} == {"pictures", "text"}


def test_a_second_time_nothing_is_encoded(script, flags, encoded):
    code, said = script(*flags)
    assert code == 0, said
    assert f"{SAMPLES - 1} samples are encoded, 1 cannot be used" in said
    assert files(flags) == encoded.files


@pytest.mark.slow
def test_a_run_with_the_same_flags_trains_on_what_is_there(train, flags, encoded):
    more = ("--max-train-steps", "2", "--per-device-batch-size", "2", "--samples-per-grid", "0")
    ended = train(*train.arguments("cached", *flags, *more))
    assert ended.code == 0, ended.output
    assert files(flags) == encoded.files and not (ended.folder / "cache").exists()


def test_a_few_bundled_pictures_are_encoded_with_the_tiny_configuration(script, tmp_path):
    tiny = ("--config", "configs/tiny.yaml", "--max-train-samples", "3")
    code, said = script(*tiny, "--dataset-save-location", str(tmp_path / "cache"))
    assert code == 0, said
    assert "encoding 3 pictures and 4 captions once" in said and "3 samples are encoded, 0 cannot be used" in said


def test_without_a_folder_it_ends_with_one_message(script, flags):
    code, said = script(*flags[:-2])
    assert code == 2
    assert said.splitlines() == [
        "error: --dataset-save-location: name the folder of the cache, and give the same to train.py."
    ]
