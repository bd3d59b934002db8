"""The step beside PyTorch: sides that only say numbers, and real ones of a tiny model."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sdxl_eqx.benchmarks import sides
from sdxl_eqx.benchmarks.config import StepBenchmark
from sdxl_eqx.benchmarks.step import measure
from sdxl_eqx.benchmarks.step_side import measure as measure_side
from sdxl_eqx.benchmarks.step_side import model_of

SAID = {
    "seconds": 0.5, "first": 9.0, "memory": 2e9, "model": "sdxl", "dtype": "bfloat16", "side": 1024, "downscale": 8,
    "device": "NVIDIA H100 80GB HBM3", "platform": "gpu", "remat_policy": "dots", "tflop": 160.0,
    "peak_tflops": 989.0, "unet": {},
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Sides that say numbers; what they are asked."""
    questions: list[list[Any]] = []

    def ask(words: list[str]) -> dict[str, Any]:
        questions.append([words[-2], json.loads(words[-1])])
        return SAID if words[-2] == "ours" else {"seconds": 1.0, "first": 60.0, "memory": 4e9, "loss": 1.0}

    monkeypatch.setattr(sides, "ask", ask)
    monkeypatch.setattr(sides, "has_other_side", lambda platform, libraries: platform != "tpu")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    return questions


def test_both_sides_are_asked_and_compared_by_the_image(asked: list[list[Any]], tmp_path: Path):
    file = tmp_path / "figures.json"
    flags = StepBenchmark(batch=8, their_batch=4, rounds=3, steps=10, their_checkpointing=True, json=str(file))
    each, images, mfu, memory, first = measure(flags)
    assert (each.ours, each.baseline, each.ratio) == (0.5 / 8, 1.0 / 4, 4.0) and len(each.rounds) == 3
    assert each.name == (
        "sdxl, 1024x1024, bfloat16, NVIDIA H100 80GB HBM3, 8 images a step, remat dots (PyTorch: 4 images, compiled, "
        "gradient checkpointing): each image"
    )
    assert images.ours == 16 and mfu.ours == pytest.approx(100 * 160 / 989 / 0.5)
    # Memory of other batches is not compared.
    assert (memory.ours, memory.baseline, first.ratio) == (2.0, None, pytest.approx(60 / 9))
    # The other side has what ours found the device to be for.
    ours, theirs = asked[0][1], asked[1][1]
    assert ours["model"] == ours["dtype"] == "auto" and ours["batch"] == 8
    assert theirs == {
        "platform": "gpu", "dtype": "bfloat16", "unet": {}, "downscale": 8, "side": 1024, "batch": 4, "steps": 10,
        "checkpointing": True, "compile": True,
    }  # fmt: skip
    values = json.loads(file.read_text("utf-8"))
    assert len(values["figures"]) == 5 and len(values["sides"]["theirs"]) == 3 and values["versions"]["jax"]
    assert values["flags"]["their_batch"] == 4


def test_memory_of_equal_batches_is_compared(asked: list[list[Any]]):
    *_, memory, _ = measure(StepBenchmark(rounds=1))
    assert memory.ratio == 2.0


def test_where_pytorch_is_not_our_side_is_measured_alone(asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sides, "has_other_side", lambda platform, libraries: False)
    each, *_ = measure(StepBenchmark(rounds=2))
    assert [side for side, _ in asked] == ["ours", "ours"]
    assert each.ratio is None and len(each.rounds) == 2 and "PyTorch" not in each.name


def test_what_a_device_does_not_say_is_left_out(asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SAID, "peak_tflops", None)
    monkeypatch.setitem(SAID, "memory", None)
    assert [one.unit for one in measure(StepBenchmark(rounds=1))] == ["s", "", "s"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"batch": 0}, "--batch 0: must be at least 1"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"their_batch": -1}, "--their-batch -1"),
        ({"side": 100}, "--side 100: must be a multiple of 32"),
        ({"json": "/no/such/folder/figures.json"}, "must be a file in a folder"),
    ],
)
def test_a_wrong_flag_is_said_before_anything_is_measured(flags: dict[str, Any], says: str, asked: list[list[Any]]):
    with pytest.raises(ValueError) as error:
        measure(StepBenchmark(**flags))
    assert says in str(error.value) and not asked


def test_auto_is_sdxl_in_bfloat16_on_accelerators_and_tiny_in_float32_on_a_cpu():
    question: dict[str, Any] = {"model": "auto", "dtype": "auto", "side": 0}
    _, here = model_of(question, "cpu")
    shapes, there = model_of(question, "gpu")
    assert here == {"model": "tiny", "dtype": "float32", "side": 64, "downscale": 8}
    assert there == {"model": "sdxl", "dtype": "bfloat16", "side": 1024, "downscale": 8}
    assert shapes.unet.block_out_channels == (320, 640, 1280)


def test_the_first_steps_are_not_counted_among_the_others(monkeypatch: pytest.MonkeyPatch):
    clock, taken = [0.0], iter((60.0, 5.0, 20.0))
    trained: list[int] = []

    def train(steps: int) -> float:
        trained.append(steps)
        clock[0] += next(taken)
        return 1.5

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert measure_side(train, 10) == {"seconds": 2.0, "first": 60.0, "loss": 1.5}
    assert trained == [1, 1, 10]


@pytest.mark.parametrize("loss", [float("nan"), 0.0, 1e9])
def test_a_loss_that_is_none_is_no_measurement(loss: float):
    with pytest.raises(ValueError, match="this is no training"):
        measure_side(lambda steps: loss, 1)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    "flags", [{}, {"dtype": "bfloat16", "their_checkpointing": True}, {"their_compile": False}], ids=str
)
def test_real_sides_train_a_tiny_model(flags: dict[str, Any], tmp_path: Path):
    pytest.importorskip("torch")
    file = tmp_path / "figures.json"
    each, _, memory, first = measure(StepBenchmark(batch=2, steps=1, rounds=1, json=str(file), **flags))
    for one in (each, memory, first):
        assert one.ours > 0 and one.baseline is not None and one.baseline > 0
    assert each.ours < first.ours
    (ours,), (theirs,) = json.loads(file.read_text("utf-8"))["sides"].values()
    assert theirs["parameters"] > 4e6 and ours["sentences"][0].startswith("attention auto: dot_product")
