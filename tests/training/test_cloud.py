"""A run on gs://, against a stand-in for the service; gcsfs, etils, Orbax and TensorStore are the real ones."""

import gc
import json
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from stub_gcs import StubGCS, pointed_at, serve
from test_checkpoint import SAVED, shapes
from tiny_step import assert_equal, begin

from sdxl_eqx.config import MetricsConfig
from sdxl_eqx.training.checkpoint import Checkpoints, NotSaved
from sdxl_eqx.training.metrics import MetricsWriter
from sdxl_eqx.training.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = "gs://bucket/runs"
STEPS = "bucket/runs/run/checkpoints"


@pytest.fixture(scope="module")
def service():
    """The one service of this process, to which every client is pointed."""
    with pytest.MonkeyPatch.context() as patch, serve() as stub, pointed_at(stub, patch):
        yield stub


@pytest.fixture
def stub(service: StubGCS, tmp_path, monkeypatch):
    """The service, empty, and another home for each test."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    service.objects.clear()
    service.written.clear()
    service.refused = ""
    fsspec.filesystem("gs").invalidate_cache()
    yield service
    gc.collect()


@pytest.fixture
def folder(stub):
    """The folder of a run in a bucket."""
    folder = RunFolder.open(ROOT, "run")
    yield folder
    folder.close()


def test_a_checkpoint_comes_back_bit_for_bit_in_another_process_and_older_ones_go(folder, stub, unet):
    state = begin(unet)
    first = Checkpoints(folder.checkpoints, keep=2)
    for step in (2, 4, 6):
        first.save(step, state, SAVED)
    first.wait()
    first.close()
    assert {key.split("/")[4] for key in stub.objects if key.startswith(STEPS)} == {"4", "6"}
    assert not (folder.path / "checkpoints").exists()

    again = Checkpoints(folder.checkpoints, keep=2)
    assert again.latest() == 6 and again.saved(6) == SAVED
    assert_equal(again.restore(6, shapes(state)), state)
    again.close()


def test_a_step_that_was_half_written_is_never_taken(folder, stub, unet):
    state = begin(unet)
    checkpoints = Checkpoints(folder.checkpoints, keep=2)
    for step in (2, 4):
        checkpoints.save(step, state, SAVED)
    checkpoints.wait()
    checkpoints.close()
    last = [key for key in stub.written if key.startswith(f"{STEPS}/4/")][-1]
    assert last == f"{STEPS}/4/commit_success.txt"
    del stub.objects[last]
    again = Checkpoints(folder.checkpoints, keep=2)
    assert again.latest() == 2
    assert_equal(again.restore(2, shapes(state)), state)
    again.save(4, state, SAVED)
    again.wait()
    assert again.latest() == 4
    again.close()


def test_a_step_that_the_bucket_refuses_costs_that_one_alone(folder, stub, unet):
    state = begin(unet)
    checkpoints = Checkpoints(folder.checkpoints, keep=2)
    checkpoints.save(2, state, SAVED)
    checkpoints.wait()
    stub.refused = "checkpoints/4/commit_success"  # what Orbax writes before leaves no threads that fail later
    with pytest.raises(NotSaved, match=r"storage\.objects\.create|403|denied|Forbidden"):
        checkpoints.save(4, state, SAVED)
        checkpoints.wait()
    stub.refused = ""
    checkpoints.save(6, state, SAVED)
    checkpoints.wait()
    checkpoints.close()
    again = Checkpoints(folder.checkpoints, keep=2)
    assert again.latest() == 6
    assert_equal(again.restore(6, shapes(state)), state)
    again.close()


def test_an_end_at_which_the_bucket_refuses_is_said(folder, stub, unet, caplog):
    checkpoints = Checkpoints(folder.checkpoints, keep=2)
    stub.refused = "checkpoints/4/commit_success"  # what Orbax writes before leaves no threads that fail later
    checkpoints.save(4, begin(unet), SAVED)
    checkpoints.close()
    assert [r for r in caplog.records if r.name == "sdxl_eqx" and "could not be written" in r.getMessage()]


def test_what_lies_beside_the_checkpoints_is_sent_and_a_run_is_finished_last(folder, stub):
    for name in ("samples/step_1.png", "export/unet/weights", "export/model_index.json"):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_bytes(b"\n\r\n" + name.encode())
    folder.metrics.write_text('{"step": 1}\n')
    folder.finish(1)
    run = [key.removeprefix("bucket/runs/run/") for key in stub.written]
    assert run[-1] == "finished" and run.index("export/unet/weights") < run.index("export/model_index.json")
    assert stub.objects["bucket/runs/run/samples/step_1.png"].data == b"\n\r\nsamples/step_1.png"
    assert folder.finished_step == 1
    assert json.loads(stub.text("bucket/runs/run/running.json"))["pid"]


def test_the_published_files_of_metrics_and_config_are_sent(folder, stub):
    folder.write_config("seed: 1\n", also=["config.yml"])
    config = MetricsConfig(gcs_metrics=True, log_period=2)
    writer = MetricsWriter(
        config, file=folder.metrics, tensorboard=folder.tensorboard, run_name="run", start=4, periods=folder.periods
    )
    for n in (5, 6, 7):
        writer.write(n, {"learning/loss": float(n)})
    writer.close()
    folder.send()
    assert stub.text("bucket/runs/run/config.yml") == stub.text("bucket/runs/run/config.yaml") == "seed: 1\n"
    lines = folder.metrics.read_text().splitlines(keepends=True)
    assert stub.text("bucket/runs/run/metrics/metrics_step_000005_to_step_000006.txt") == "".join(lines[:2])
    assert stub.text("bucket/runs/run/metrics/metrics_step_000007_to_step_000007.txt") == lines[2]


@pytest.mark.parametrize(("root", "refused"), [("gs://bucket/runs", "runs"), ("gs://nowhere/runs", "")])
def test_a_bucket_that_is_not_ours_is_an_error_with_the_remedy(root, refused, stub):
    stub.refused = refused
    with pytest.raises(ValueError, match=rf"cannot read and write {root}/run.*check the bucket's name and the cred"):
        RunFolder.open(root, "run")


def test_compiled_programs_are_kept_in_a_bucket(stub, monkeypatch):
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    for name, value in zip(names, (f"{ROOT}/cache", 0.0, True), strict=True):
        jax.config.update(name, value)
    try:
        jax.jit(lambda x: x * 3 + jnp.float32(jr.key(0).size))(jnp.ones(7)).block_until_ready()
        assert any(key.startswith("bucket/runs/cache/jit") for key in stub.objects)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
