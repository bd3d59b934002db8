"""scripts/compile.py and --compile-topology, as a user calls them; libtpu compiles where it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import HAS_LIBTPU

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--pretrained-model-name-or-path", "asset:tiny-sdxl", "--train-new-unet", "--new-text-encoders",
    "--resolution", "64", "--cache-latents-text-encoder-outputs", "--per-device-batch-size", "1",
)  # fmt: skip


def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A script with these arguments."""
    words = [sys.executable, f"scripts/{script}.py", *arguments]
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("compile", (*TINY, "--train-data-dir", "x"), "--compile-topology: name the devices, as v5p:2x2x1"),
        ("compile", ("--compile-topology", "b200x8"), "--compile-topology b200x8: write CHIP:SHAPE for TPUs"),
        ("compile", ("--compile-topology", "h100x1", "--no-such"), "--no-such: no such flag"),
        ("train", ("--compile-topology", "v5e"), "--compile-topology v5e: write CHIP:SHAPE for TPUs"),
    ],
)
def test_wrong_input_is_one_message(script, arguments, says):
    ended = run(script, *arguments)
    assert ended.returncode == 2
    (line,) = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("error: ")]
    assert says in line
    assert "Traceback" not in ended.stderr


def test_help_says_that_all_flags_of_training_are_taken():
    ended = run("compile", "--help")
    assert ended.returncode == 0
    assert "--effort" in ended.stdout and "scripts/train.py" in ended.stdout


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
def test_a_mesh_of_tpus_is_reported_by_both_scripts(tmp_path: Path):
    flags = (*TINY, "--compile-topology", "v5e:2x2", "--ici-data-parallelism", "1", "--ici-fsdp-parallelism", "-1")
    file = tmp_path / "report.json"
    ended = run("compile", *flags, "--effort", "-1.0", "--json", str(file))
    assert ended.returncode == 0, ended
    found = json.loads(file.read_text())
    assert (found["devices"], found["mesh"], found["effort"]) == (4, {"fsdp": 4}, -1.0)
    assert found["fits"] and found["collectives"]["all-gather"]["count"] > 0
    ended = run("train", *flags)
    assert ended.returncode == 0 and "| v5e:2x2 | fsdp 4 " in ended.stdout + ended.stderr, ended


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
def test_a_batch_that_devices_cannot_share_is_one_message():
    ended = run("compile", *TINY, "--compile-topology", "v5e:2x2", "--effort=-1", "--per-device-batch-size", "0.3")
    assert ended.returncode == 2
    (line,) = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("error: ")]
    assert "--per-device-batch-size 0.3: makes 1.2 samples a step on 4 devices" in line
