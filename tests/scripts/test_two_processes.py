"""Two processes that train one run together, on one machine: whatever happens to them, it is what one process does."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny_run import BROKEN, ROOT, Trainer, arrays, checkpoints, last_step, metrics

from sdxl_eqx.training.run_folder import RunFolder

STEPS = 16
FEW = 3
LIMIT = 170.0
"""Seconds that any run may take; one that hangs ends then."""

TOLERANCE = 1e-5
SHOWN = ("--samples-per-grid", "2", "--num-inference-steps", "1", "--do-classifier-free-guidance", "False")


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended."""

    codes: list[int | None]
    """Of a process that had to be killed, None."""
    outputs: list[str]
    folder: Path
    exports: int
    """How often an export appeared."""

    def __str__(self) -> str:
        parts = [f"--- process {i} ended with {code} ---\n{self.outputs[i]}" for i, code in enumerate(self.codes)]
        return "\n".join(parts)


@dataclass(frozen=True)
class Job:
    """The processes of a run that goes on."""

    processes: "list[subprocess.Popen[bytes]]"
    logs: list[Path]
    folder: Path

    def wait(self, *, step: int | None = None) -> Ended:
        """Until all have ended, or the run is past that step."""
        end = time.monotonic() + LIMIT
        exports = set()
        while time.monotonic() < end and any(process.poll() is None for process in self.processes):
            if step is not None and last_step(self.folder) > step:
                break
            export = self.folder / "export"
            if export.exists():
                exports.add(export.stat().st_ino)
            time.sleep(0.005)
        codes = [process.poll() for process in self.processes]
        return Ended(codes, [log.read_text() for log in self.logs], self.folder, len(exports))

    def stop(self) -> Ended:
        """SIGTERM to the last process alone once a few steps are done, and wait."""
        ended = self.wait(step=FEW)
        assert ended.codes == [None, None], ended
        # The first one is held until the last one's service, which looks once a second, has seen the signal.
        self.processes[0].send_signal(signal.SIGSTOP)
        self.processes[-1].send_signal(signal.SIGTERM)
        time.sleep(2)
        self.processes[0].send_signal(signal.SIGCONT)
        return self.wait()


@contextmanager
def begun(train: Trainer, name: str, *arguments: Sequence[str]) -> Iterator[Job]:
    """A run of a process for each list of arguments, on two devices in all; none of them outlives the block."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "HF_", "JAX_"))}
    kept |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 "  # compiles twice as fast
        f"--xla_force_host_platform_device_count={2 // len(arguments)}",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(train.home),
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes, logs = [], []
    try:
        for i, own in enumerate(arguments):
            others = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
            logs.append(train.root / f"{name}-{time.monotonic_ns()}.log")
            with logs[-1].open("wb") as log:
                words = [sys.executable, "scripts/train.py", *train.arguments(name, *own)]
                env = kept | (others if len(arguments) > 1 else {})
                processes.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
        yield Job(processes, logs, train.root / name)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(train: Trainer, name: str, *arguments: Sequence[str]) -> Ended:
    """A run to its end."""
    with begun(train, name, *arguments) as job:
        return job.wait()


def finish(train: Trainer, name: str, *arguments: Sequence[str]) -> Ended:
    """A run that ends well."""
    ended = run(train, name, *arguments)
    assert ended.codes == [0] * len(arguments), ended
    return ended


@pytest.fixture(scope="module")
def flags(model: Path, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A run of few steps on two devices, of a UNet with arrays that are large enough to be shared by them."""
    wider = shutil.copytree(model, tmp_path_factory.mktemp("wider") / "model")
    (wider / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    config = wider / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [8, 64]}))
    return (
        *small, "--pretrained-model-name-or-path", str(wider), "--train-new-unet",
        "--ici-data-parallelism", "1", "--ici-fsdp-parallelism", "2", "--max-train-steps", str(STEPS),
        "--checkpoint-every", "-1", "--log-period", "1", "--export-dtype", "float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(train: Trainer, flags: tuple[str, ...]) -> Ended:
    """The run by one process with two devices, which nothing stopped, with pictures at its end."""
    return finish(train, "alone", (*flags, *SHOWN))


@pytest.fixture(scope="module")
def stopped(train: Trainer, flags: tuple[str, ...]) -> Ended:
    """The run by two processes, of which one was told to stop, as it lay there then."""
    with begun(train, "two", *2 * [(*flags, *SHOWN)]) as job:
        ended = job.stop()
    assert ended.codes == [128 + signal.SIGTERM] * 2, ended
    return dataclasses.replace(ended, folder=shutil.copytree(ended.folder, train.root / "stopped"))


@pytest.fixture(scope="module")
def finished(train: Trainer, flags: tuple[str, ...], stopped: Ended) -> Ended:
    """The same, started again."""
    return finish(train, "two", *2 * [(*flags, *SHOWN)])


def losses(ended: Ended, steps: int = STEPS) -> list[float]:
    """That of every step, each of which must be there once and in order."""
    records = metrics(ended.folder)
    assert [record["step"] for record in records] == list(range(1, steps + 1)), ended
    return [record["learning/loss"] for record in records]


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """That the same arrays are there and as good as equal."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], atol=TOLERANCE, err_msg=name)


def test_one_that_is_told_to_stop_has_both_save_after_the_same_step(stopped: Ended):
    said = re.search(r"saved at step (\d+); continue with:", stopped.outputs[0])
    assert said, stopped
    step = int(said[1])
    assert FEW < step < STEPS
    assert checkpoints(stopped.folder) == [step]
    assert len(losses(stopped, step)) == step
    assert all("SIGTERM" in output and "Traceback" not in output for output in stopped.outputs), stopped


def test_two_processes_that_were_stopped_train_what_one_does(stopped: Ended, finished: Ended, alone: Ended):
    (step,) = checkpoints(stopped.folder)
    assert f"resuming {finished.folder} at step {step} of {STEPS}" in finished.outputs[0], finished
    np.testing.assert_allclose(losses(finished), losses(alone), rtol=TOLERANCE)
    assert_close(arrays(finished.folder, STEPS), arrays(alone.folder, STEPS))


def test_the_first_process_alone_speaks_draws_and_exports_what_one_would(finished: Ended, alone: Ended):
    assert finished.exports == 1
    assert "step" not in finished.outputs[1], finished
    files = [
        {path.relative_to(ended.folder): path for path in ended.folder.glob("export/**/*") if path.is_file()}
        for ended in (finished, alone)
    ]
    assert files[0].keys() == files[1].keys()
    for path, ours in files[0].items():
        if path.suffix == ".safetensors":
            assert_close(load_file(ours), load_file(files[1][path]))
        else:
            assert ours.read_bytes() == files[1][path].read_bytes(), path
    grids = [np.asarray(Image.open(ended.folder / "samples" / f"step_{STEPS:06d}.png")) for ended in (finished, alone)]
    assert grids[0].shape == (16, 32, 3)
    np.testing.assert_allclose(grids[0].astype(int), grids[1].astype(int), atol=1)
    assert not list(finished.folder.glob(".*.part")) + list(finished.folder.glob("cache/.*"))


def test_one_process_goes_on_where_two_stopped_with_the_very_samples_they_would_have_read(
    train: Trainer, flags: tuple[str, ...], stopped: Ended, alone: Ended
):
    shutil.copytree(stopped.folder, train.root / "fewer")
    ended = finish(train, "fewer", flags)
    np.testing.assert_allclose(losses(ended), losses(alone), rtol=TOLERANCE)


@pytest.mark.slow
def test_pictures_that_two_processes_read_are_those_that_one_reads(train: Trainer, flags: tuple[str, ...]):
    fewer = ("--max-train-samples", str(BROKEN), "--max-train-steps", str(FEW))
    uncached = (*flags, "--no-cache-latents-text-encoder-outputs", *fewer)
    two, one = finish(train, "two-uncached", uncached, uncached), finish(train, "one-uncached", uncached)
    np.testing.assert_allclose(losses(two, FEW), losses(one, FEW), rtol=TOLERANCE)


def assert_refused(ended: Ended, culprit: int, *said: str) -> None:
    """That all processes ended with one message: the culprit's own, and whose it is in the others."""
    assert ended.codes == [2, 2], ended
    for i, output in enumerate(ended.outputs):
        assert "Traceback" not in output, ended
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert (f"process {culprit}: " in line) == (i != culprit), ended
        assert all(words in line for words in said), ended


def test_a_run_that_is_going_on_is_refused_to_both(train: Trainer, flags: tuple[str, ...]):
    folder = RunFolder.open(str(train.root), "taken")
    try:
        ended = run(train, "taken", flags, flags)
    finally:
        folder.close()
    assert_refused(ended, 0, "--run-name taken", "another process runs in", "choose another name")


def test_what_one_process_alone_finds_wrong_ends_both(train: Trainer, flags: tuple[str, ...]):
    ended = run(train, "nowhere", flags, (*flags, "--train-data-dir", "nowhere"))
    assert_refused(ended, 1, "nowhere")
    assert not (train.root / "nowhere").exists()


@pytest.mark.slow
def test_one_process_that_runs_out_of_pictures_ends_both(train: Trainer, flags: tuple[str, ...], tmp_path: Path):
    own = shutil.copytree(flags[flags.index("--train-data-dir") + 1], tmp_path / "pictures")
    uncached = (*flags, "--no-cache-latents-text-encoder-outputs", "--max-train-steps", "10000")
    with begun(train, "spoilt", uncached, (*uncached, "--train-data-dir", str(own))) as job:
        assert job.wait(step=FEW).codes == [None, None]
        for picture in own.glob("*.png"):
            picture.write_bytes(b"no picture")
        assert_refused(job.wait(), 1, "cannot be used", "No checkpoint was written")


@pytest.mark.slow
def test_an_export_that_cannot_be_written_ends_both(train: Trainer, flags: tuple[str, ...]):
    name = "blocked"
    (train.root / name / "export").mkdir(parents=True)
    (train.root / name / "export" / "thesis.txt").write_text("not a model")
    ended = run(train, name, *2 * [(*flags, "--max-train-steps", "1")])
    assert_refused(ended, 0, "the export could not be written")
    assert (train.root / name / "export" / "thesis.txt").exists()
