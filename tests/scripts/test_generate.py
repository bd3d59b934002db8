"""Whole runs of scripts/generate.py, each in its own process: pictures that say how they were made, or one error."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_run import ROOT

from sdxl_eqx.generation import pipeline
from sdxl_eqx.parallel import begin
from sdxl_eqx.sampling.parameters import parse_parameters
from sdxl_eqx.sampling.png import PARAMETERS, SETTINGS

TOKEN = "hf_topsecret"


@dataclass(frozen=True)
class Drawer:
    """Runs scripts/generate.py on one device; what one run compiled serves the next."""

    home: Path
    cache: Path

    def __call__(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run to the end."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "HF_", "JAX_"))}
        env |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles twice as fast
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": TOKEN,
            "HOME": str(self.home),
        }
        words = [sys.executable, "scripts/generate.py", *arguments]
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)

    def flags(self, model: Path, folder: Path) -> list[str]:
        """Those of a small model, drawn with in seconds."""
        return [
            "--pretrained-model-name-or-path", str(model), "--images-dir", str(folder), "--jax-cache-dir",
            str(self.cache), "--activations-dtype", "float32", "--num-inference-steps", "2",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Drawer:
    """Runs the script."""
    return Drawer(*(tmp_path_factory.mktemp(name) for name in ("home", "compiled")))


@dataclass(frozen=True)
class Drawn:
    """What a run left and said."""

    folder: Path
    output: str

    @property
    def pictures(self) -> list[Path]:
        """Its pictures in their order, without the sheet."""
        return sorted(file for file in self.folder.glob("*.png") if not file.name.startswith("grid"))


@pytest.fixture(scope="module")
def drawn(draw: Drawer, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Two prompts, two seeds each, 32 wide and 16 high, two at once, with a sheet of all."""
    folder = tmp_path_factory.mktemp("drawn")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red fox --n blurry\na castle, in the forest --d 7\n")
    ended = draw(
        *draw.flags(model, folder), "--prompts-file", str(prompts), "--num-images-per-prompt", "2", "--width", "32",
        "--height", "16", "--batch-size", "2", "--seed", "3", "--grid", "--hf-access-token", TOKEN,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Drawn(folder, ended.stdout + ended.stderr)


def texts(file: Path) -> dict[str, str]:
    """The texts of a PNG."""
    with Image.open(file) as picture:
        return {str(key): text for key, text in picture.info.items() if isinstance(text, str)}


def pixels(file: Path) -> np.ndarray:
    """The pixels of a PNG."""
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


def test_every_prompt_and_seed_is_a_picture_that_says_how_it_was_made(drawn: Drawn):
    assert [file.name for file in drawn.pictures] == ["00000-3.png", "00001-4.png", "00002-7.png", "00003-8.png"]
    for i, file in enumerate(drawn.pictures):
        assert pixels(file).shape == (16, 32, 3)
        assert pixels(file).std() > 10
        said = parse_parameters(texts(file)[PARAMETERS])
        assert said.prompt == ("a red fox" if i < 2 else "a castle, in the forest")
        assert said.negative_prompt == ("blurry" if i < 2 else "")
        assert (said.seed, said.steps, said.width, said.height) == ([3, 4, 7, 8][i], 2, 32, 16)
        assert said.model == "small"
    assert len({file.read_bytes() for file in drawn.pictures}) == 4


def test_the_sheet_holds_all_pictures(drawn: Drawn):
    (sheet,) = drawn.folder.glob("grid-*.png")
    whole = pixels(sheet)
    assert whole.shape == (32, 64, 3)
    for i, file in enumerate(drawn.pictures):
        y, x = i // 2 * 16, i % 2 * 32
        np.testing.assert_array_equal(whole[y : y + 16, x : x + 32], pixels(file))


def test_the_run_says_each_file_and_no_token(drawn: Drawn):
    for file in drawn.pictures:
        assert str(file) in drawn.output
    assert drawn.output.splitlines()[-1] == f"5 files in {drawn.folder}"
    assert "Traceback" not in drawn.output
    assert TOKEN not in drawn.output
    assert not [file for file in drawn.folder.iterdir() if TOKEN.encode() in file.read_bytes()]


def test_a_pictures_settings_given_back_draw_it_again_under_the_next_number(draw: Drawer, drawn: Drawn, tmp_path: Path):
    old = drawn.pictures[2]
    file = tmp_path / "settings.json"
    file.write_text(texts(old)[SETTINGS])
    ended = draw("--config", str(file), "--images-dir", str(tmp_path), "--batch-size", "2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (again,) = tmp_path.glob("*.png")
    assert again.name == "00000-7.png"
    assert np.abs(pixels(again) - pixels(old)).max() <= 2
    same, before = json.loads(texts(again)[SETTINGS]), json.loads(texts(old)[SETTINGS])
    assert {key for key in same if same[key] != before[key]} <= {"images_dir"}


def test_help_lists_the_flags(draw: Drawer):
    ended = draw("--help")
    assert ended.returncode == 0
    assert "--num-images-per-prompt" in ended.stdout and "Draw pictures with Stable Diffusion XL." in ended.stdout
    assert ended.stderr == ""


def assert_refused(ended: "subprocess.CompletedProcess[str]", parts: Sequence[str]) -> None:
    """That a run ended with exit code 2 and one line of error, which says all of that."""
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert all(part in ended.stderr for part in parts), ended.stderr
    assert "Traceback" not in ended.stdout and TOKEN not in ended.stdout + ended.stderr


def test_a_wrong_flag_is_one_line(draw: Drawer):
    assert_refused(draw("--width", "12", "--hf-access-token", TOKEN), ["--width 12", "a multiple of 8"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--pretrained-model-name-or-path", "./nothing"], ["./nothing", "no such file or folder"]),
        (["--image", "LICENSE"], ["--image LICENSE", "is no picture that can be read"]),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    words: list[str], parts: list[str], draw: Drawer, model: Path, tmp_path: Path
):
    folder = tmp_path / "out"
    assert_refused(draw(*draw.flags(model, folder), *words), parts)
    assert not folder.exists()


def test_what_does_not_fit_is_one_line_with_what_would(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    def full(config: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    spec = importlib.util.spec_from_file_location("generate_script", ROOT / "scripts" / "generate.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr("sys.argv", ["scripts/generate.py", "--activations-dtype", "float32"])
    monkeypatch.setattr(script, "talk", lambda: logging.getLogger("sdxl_eqx"))
    monkeypatch.setattr(begin, "begin_jax", lambda machine: None)
    monkeypatch.setattr(begin, "configure_jax", lambda machine, precision: None)
    monkeypatch.setattr(pipeline, "read_parts", full)
    assert script.main() == 2
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert said.startswith("error: out of memory: the model does not fit; use --activations-dtype bfloat16, or more")
    assert "\n" not in said
