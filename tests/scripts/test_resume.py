"""Runs killed at random steps, by signal 9, end bit for bit as those that nothing stopped, whatever they train with."""

import dataclasses
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny_run import UNET, VAE_CONFIG, Ended, Trainer, arrays, checkpoints, last_step, learning, position, write_model

STEPS = 20
EVERY = 5
"""Steps between two checkpoints."""

SAMPLES = 2
"""Of an update."""

EMA = ("--ema-decay", "0.9", "--ema-every", "2")
ACCUMULATION = ("--per-device-batch-size", "1", "--gradient-accumulation-steps", str(SAMPLES))
BUCKETS = ("--resolution", "128", "--aspect-ratio-buckets", "--bucket-upscale", "--bucket-count", "2")
UNCACHED = ("--no-cache-latents-text-encoder-outputs",)
CASES = {
    "plain": UNCACHED,
    "EMA": (*UNCACHED, *EMA),
    "accumulation": (*UNCACHED, *ACCUMULATION),
    "buckets": (*UNCACHED, *BUCKETS),
    "cached-latents": (),
    "cached-latents-and-new-captions": ("--caption-shuffle",),
    "text-encoders": ("--train-text-encoder", "--text-encoder-learning-rate", "1e-4"),
    "LoRA": ("--lora-rank", "2", "--lora-dropout", "0.3", "--use-dora", "--int8-base", "--train-text-encoder", *EMA),
    "ControlNet": (
        "--train-controlnet",
        "--conditioning-image-column",
        "mask",
        "--controlnet-conditioning-dropout",
        "0.3",
    ),
}
ALL = (*EMA, *ACCUMULATION, *BUCKETS)
"""At once, on cached latents: in the default tests there is no time for each."""


@pytest.fixture(scope="module")
def flags(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Those of a short run with every random draw of the data; latents are small even of the smallest buckets,
    and the UNet compiles in seconds."""
    coarse = dataclasses.replace(VAE_CONFIG, block_out_channels=(8, 8, 8, 8), sample_size=64)
    flat = dataclasses.replace(
        UNET, block_out_channels=(8,), attention_levels=(True,), transformer_layers=(2,), heads=(2,)
    )
    model = write_model(tmp_path_factory.mktemp("models") / "coarse", unet=flat, vae=coarse)
    return (
        "--pretrained-model-name-or-path", str(model), "--train-data-dir", str(pictures), "--resolution", "64",
        "--max-train-steps", str(STEPS), "--per-device-batch-size", str(SAMPLES), "--log-period", "10",
        "--checkpoint-every", str(EVERY * SAMPLES), "--learning-rate", "1e-3", "--lr-schedule", "cosine",
        "--opt-enable-grad-global-norm-clipping", "--random-flip", "--caption-dropout", "0.3",
        "--activations-dtype", "float32", "--samples-per-grid", "0",
    )  # fmt: skip


def killed(train: Trainer, arguments: list[str], at: int) -> Ended:
    """The run, killed after a step and begun again."""
    ended = train.stop(signal.SIGKILL, at, *arguments)
    assert ended.code == -signal.SIGKILL, ended.output
    there = checkpoints(ended.folder)
    assert there and last_step(ended.folder) > at
    ended = train(*arguments)
    assert ended.code == 0, ended.output
    found = re.search(rf"resuming {re.escape(str(ended.folder))} at step (\d+) of {STEPS}", ended.output)
    assert found and int(found[1]) == there[-1], ended.output
    return ended


def assert_same(run: Path, other: Path) -> None:
    """That two runs ended with the same state, position in the data and metrics."""
    ours, theirs = arrays(run, STEPS), arrays(other, STEPS)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name, strict=True)
    assert position(run, STEPS) == position(other, STEPS)
    assert [record["step"] for record in learning(run)] == list(range(1, STEPS + 1))
    assert learning(run) == learning(other)


@pytest.mark.slow
def test_a_killed_run_with_an_average_accumulation_buckets_and_cached_latents_ends_as_one_never_stopped(
    train: Trainer, flags: tuple[str, ...]
):
    whole = train(*train.arguments("all", *flags, *ALL))
    assert whole.code == 0, whole.output
    assert re.search(r"2 shapes of batches", whole.output)
    assert {name.partition("/")[0] for name in arrays(whole.folder, STEPS)} >= {"unet", "optimizer", "ema"}
    at = random.Random(1).randrange(EVERY, STEPS - EVERY)
    again = killed(train, train.arguments("all-killed", *flags, *ALL), at)
    assert_same(again.folder, whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_one_never_stopped(train: Trainer, flags: tuple[str, ...], case: str):
    whole = train(*train.arguments(case, *flags, *CASES[case]))
    assert whole.code == 0, whole.output
    at = random.Random(case).randrange(EVERY, STEPS - EVERY)
    again = killed(train, train.arguments(f"{case}-killed", *flags, *CASES[case]), at)
    assert_same(again.folder, whole.folder)
