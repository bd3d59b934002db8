"""Whole runs of scripts/train.py, each in its own process: what they leave, and that stopping changes nothing."""

import json
import random
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_run import BROKEN, PICTURES, Ended, Trainer, arrays, checkpoints, last_step, learning, metrics, position

from sdxl_eqx.data.pictures import read_picture
from sdxl_eqx.data.transforms import draw_crop, resize_and_crop
from sdxl_eqx.training.run_folder import RunFolder

STEPS = 100
FIRST = 25
"""The step of the first checkpoint."""

DRAWN = 8
PUBLISHED = {
    "step",
    "run_name",
    "learning/loss",
    "learning/current_learning_rate",
    "perf/step_time_seconds",
    "perf/per_device_tflops",
    "perf/per_device_tflops_per_sec",
}


@pytest.fixture(scope="module")
def whole(train: Trainer, small: tuple[str, ...]) -> Ended:
    """A run on cached data that nothing stopped, with samples and an evaluation at its end."""
    shown = (
        "--samples-per-grid", "3", "--num-inference-steps", "2", "--caption-retrieval", str(DRAWN),
        "--do-classifier-free-guidance", "False",
    )  # fmt: skip
    ended = train(*train.arguments("whole", *small, *shown))
    assert ended.code == 0, ended.output
    return ended


@pytest.fixture(scope="module")
def whole_uncached(train: Trainer, whole: Ended) -> Ended:
    """The same on pictures, by the config that the other run wrote, under another name."""
    config = str(whole.folder / "config.yaml")
    flags = ("--no-cache-latents-text-encoder-outputs", "--samples-per-grid", "0", "--caption-retrieval", "0")
    ended = train("--config", config, "--run-name", "pictures", *flags)
    assert ended.code == 0, ended.output
    return ended


def resumed_at(ended: Ended) -> int:
    """The step at which a run said that it resumed."""
    found = re.search(rf"resuming {re.escape(str(ended.folder))} at step (\d+) of {STEPS}", ended.output)
    assert found, ended.output
    return int(found[1])


def printed_command(ended: Ended) -> list[str]:
    """The arguments of the command in the last line."""
    words = shlex.split(ended.output.splitlines()[-1])
    assert words[:2] == ["python", "scripts/train.py"]
    return words[2:]


def assert_equal(run: Path, other: Path):
    """That two finished runs have the same state, data position, metrics and export."""
    ours, theirs = arrays(run, STEPS), arrays(other, STEPS)
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[0] for name in ours} == {"loop", "unet", "optimizer", "ema"}
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name, strict=True)
    assert position(run, STEPS) == position(other, STEPS)
    assert [record["step"] for record in learning(run)] == list(range(1, STEPS + 1))
    assert learning(run) == learning(other)
    file = Path("export/unet/diffusion_pytorch_model.safetensors")
    assert (run / file).read_bytes() == (other / file).read_bytes()


def test_a_run_leaves_config_metrics_tensorboard_samples_checkpoints_and_an_export(whole: Ended):
    folder = whole.folder
    assert [r["step"] for r in metrics(folder)] == list(range(1, STEPS + 1))
    for record in metrics(folder):
        assert record.keys() >= PUBLISHED
        assert record["run_name"] == "whole"
        assert record["perf/step_time_seconds"] > 0
    assert list((folder / "tensorboard").glob("events*"))
    with Image.open(folder / "samples" / f"step_{STEPS:06d}.png") as sheet:
        assert sheet.size == (32, 32)
    assert checkpoints(folder) == [75, 100]
    assert (folder / "export" / "model_index.json").is_file()
    said = yaml.safe_load((folder / "config.yaml").read_text())
    assert (said["run_name"], said["max_train_steps"], said["ema_decay"]) == ("whole", STEPS, 0.9)
    assert "Traceback" not in whole.output


def test_a_run_learns_and_says_what_it_skipped_and_where_everything_is(whole: Ended):
    losses = [record["learning/loss"] for record in metrics(whole.folder)]
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    skipped = [line for line in whole.output.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 1 and f"{BROKEN:02d}.png" in skipped[0]
    assert f"{PICTURES - 1} samples are ready" in whole.output
    assert re.findall(r"^step (\d+)/100 ", whole.output, re.MULTILINE) == ["20", "40", "60", "80", "100"]
    for part in ("samples/", "checkpoints/", "export/", "tensorboard"):
        assert part in whole.output.partition("done:")[2]


def test_weights_average_and_optimizer_moved_and_differ(whole: Ended):
    first, last = arrays(whole.folder, 75), arrays(whole.folder, STEPS)
    name = "conv_in.weight"
    assert not np.array_equal(first[f"unet/{name}"], last[f"unet/{name}"])
    assert not np.array_equal(first[f"ema/{name}"], last[f"ema/{name}"])
    assert not np.array_equal(last[f"unet/{name}"], last[f"ema/{name}"])


def test_caption_retrieval_can_be_computed_again_from_the_saved_pictures(whole: Ended, pictures: Path):
    rng = np.random.default_rng(0)
    training = {}
    for i in range(PICTURES):
        if i != BROKEN:
            picture = read_picture((pictures / f"{i:02d}.png").read_bytes(), f"{i:02d}.png", target=(16, 16))
            crop = draw_crop(picture.size, (16, 16), center_crop=True, rng=rng)
            training[i] = resize_and_crop(picture, (16, 16), crop)[0].astype(float)
    hits = 0
    for i in range(DRAWN):
        drawn = np.asarray(Image.open(whole.folder / "eval" / f"{i:02d}.png")).astype(float)
        hits += min(training, key=lambda k: ((training[k] - drawn) ** 2).sum()) == i
    records = map(json.loads, (whole.folder / "metrics.jsonl").read_text().splitlines())
    (record,) = [r for r in records if "eval/caption_retrieval" in r]
    assert record["eval/caption_retrieval"] == hits / DRAWN
    assert record["step"] == STEPS
    assert len(list((whole.folder / "eval").iterdir())) == DRAWN


def test_a_finished_run_says_so_and_changes_nothing(train: Trainer, whole: Ended):
    before = (whole.folder / "metrics.jsonl").read_bytes()
    again = train("--config", str(whole.folder / "config.yaml"))
    assert again.code == 0
    assert f"{whole.folder} is finished (step {STEPS})" in again.output
    assert "--max-train-steps" in again.output
    assert (whole.folder / "metrics.jsonl").read_bytes() == before


def test_cached_and_uncached_runs_of_one_config_draw_other_crops_but_both_learn(whole: Ended, whole_uncached: Ended):
    assert whole_uncached.folder.name == "pictures"
    assert not (whole_uncached.folder / "cache").exists()
    losses = [record["learning/loss"] for record in metrics(whole_uncached.folder)]
    assert len(losses) == STEPS
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    assert learning(whole.folder) != learning(whole_uncached.folder)


def test_a_run_without_a_name_killed_and_interrupted_goes_on_by_its_printed_command_as_if_never_stopped(
    train: Trainer, small: tuple[str, ...], whole: Ended
):
    ended = train.stop(signal.SIGTERM, FIRST + 1, *train.arguments("", *small)[2:])
    assert ended.code == 128 + signal.SIGTERM, ended.output
    name = ended.folder.name
    assert re.fullmatch(r"\d{8}-\d{6}-[a-z]+-[a-z]+", name)
    saved = last_step(ended.folder)
    assert f"saved at step {saved}; continue with:" in ended.output
    command = printed_command(ended)

    ended = train.stop(signal.SIGKILL, saved + 1, *command)
    assert ended.code == -signal.SIGKILL, ended.output
    assert resumed_at(ended) == saved

    ended = train.stop(signal.SIGINT, saved + 1, *command)
    assert ended.code == 128 + signal.SIGINT, ended.output
    assert resumed_at(ended) >= saved
    assert printed_command(ended) == command

    ended = train(*command)
    assert ended.code == 0, ended.output
    assert resumed_at(ended) > saved
    assert ended.folder.name == name
    assert_equal(ended.folder, whole.folder)


@pytest.mark.slow
def test_an_uncached_run_killed_at_random_steps_goes_on_as_if_never_stopped(train: Trainer, whole_uncached: Ended):
    config = str(whole_uncached.folder / "config.yaml")
    arguments = ("--config", config, "--run-name", "killed")
    after = FIRST + random.Random(0).randrange(1, 40)
    ended = train.stop(signal.SIGKILL, after, *arguments)
    assert ended.code == -signal.SIGKILL, ended.output
    file = ended.folder / "metrics.jsonl"
    with file.open("a") as lines:
        lines.write('{"step": 99, "learning/loss": 0.0}\n{"step": 100, "learning/lo')

    ended = train(*arguments)
    assert ended.code == 0, ended.output
    assert resumed_at(ended) >= FIRST
    assert_equal(ended.folder, whole_uncached.folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_several_times_goes_on_as_if_never_stopped(
    train: Trainer, small: tuple[str, ...], whole: Ended, seed: int
):
    arguments = train.arguments(f"killed-{seed}", *small)
    draw = random.Random(seed)
    at = FIRST
    for _ in range(3):
        ended = train.stop(signal.SIGKILL, at + draw.randrange(20), *arguments)
        if ended.code == 0:
            break
        at = max(at, last_step(ended.folder))
    ended = train(*arguments)
    assert ended.code == 0, ended.output
    assert_equal(ended.folder, whole.folder)


def test_a_second_process_on_a_run_folder_ends_with_the_remedy(train: Trainer, small: tuple[str, ...]):
    folder = RunFolder.open(str(train.root), "taken")
    try:
        ended = train(*train.arguments("taken", *small))
    finally:
        folder.close()
    assert ended.code == 2
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    assert "--run-name taken" in line and "choose another name" in line
    assert "Traceback" not in ended.output
