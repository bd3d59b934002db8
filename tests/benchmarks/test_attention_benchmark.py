"""Attention beside PyTorch's: a side that only says numbers, and real ones at small shapes."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sdxl_eqx.benchmarks import attention_side, sides
from sdxl_eqx.benchmarks.attention import measure
from sdxl_eqx.benchmarks.attention_side import milliseconds, shapes_of
from sdxl_eqx.benchmarks.config import AttentionBenchmark
from sdxl_eqx.benchmarks.sides import SAID
from sdxl_eqx.kernels.attention import dot_product


def test_the_shapes_are_those_of_both_levels_to_themselves_and_to_the_text():
    assert shapes_of(8, 1024) == [(8, 4096, 4096, 10), (8, 4096, 77, 10), (8, 1024, 1024, 20), (8, 1024, 77, 20)]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sides that say numbers, ours of two implementations; which were begun."""
    shapes = shapes_of(8, 1024)
    begun: list[str] = []

    def ask(words: list[str]) -> dict[str, Any]:
        begun.append(words[-2])
        if words[-2] == "theirs":
            assert json.loads(words[-1]) == {"batch": 8, "side": 1024, "dtype": "bfloat16", "platform": "gpu"}
            found = [{"shape": s, "forward": 2.0 + i, "both": 6.0, "kernel": "FLASH"} for i, s in enumerate(shapes)]
            return {"found": found}
        found = [{"name": n, "shape": s, "forward": 1.0, "both": 4.0} for n in ("dot_product", "cudnn") for s in shapes]
        del found[1]  # refused at one shape
        found[-1]["forward"] = 0.1
        facts = {"device": "NVIDIA H200", "platform": "gpu", "dtype": "bfloat16", "side": 1024}
        return {"found": found, "refused": ["attention cudnn_flash_te: needs it"], **facts}

    monkeypatch.setattr(sides, "ask", ask)
    monkeypatch.setattr(sides, "has_other_side", lambda platform, libraries: True)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    return begun


def test_each_implementation_is_compared_at_each_shape(
    begun: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "sdxl_eqx")
    file = tmp_path / "figures.json"
    figures = measure(AttentionBenchmark(rounds=2, json=str(file)))
    assert begun == ["ours", "theirs", "theirs", "ours"]
    assert len(figures) == 7 * 4 and "left out: attention cudnn_flash_te: needs it" in caplog.text
    forward, rate, both, rate_of_both = figures[:4]
    assert forward.name == ("dot_product, 8 x 4096 to 4096, 10 heads, bfloat16, NVIDIA H200: forward (PyTorch: FLASH)")
    # 4 x 8 x 10 x 4096 x 4096 x 64 operations in a millisecond; three times as many in 4.
    assert (rate.unit, round(rate.ours), round(rate_of_both.ours)) == ("TFLOP/s", 344, 258)
    assert both.ratio == 1.5 and len(both.rounds) == 2
    assert [one.ratio for one in figures[::4]] == [2, 4, 5, 2, 3, 4, 50]
    assert [bool(one.note) for one in figures[::4]] == [False] * 6 + [True]
    assert figures[12].name.startswith("cudnn, 8 x 4096 to 4096")
    assert len(json.loads(file.read_text("utf-8"))["sides"]["ours"]) == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"side": 100}, "--side 100: must be a multiple of 32"),
        ({"rounds": 0}, "--rounds 0"),
        ({"batch": 0}, "--batch 0"),
        ({"json": "/no/such/folder/figures.json"}, "must be a file in a folder"),
    ],
)
def test_a_wrong_flag_is_said_before_anything_is_measured(flags: dict[str, Any], says: str, begun: list[str]):
    with pytest.raises(ValueError) as error:
        measure(AttentionBenchmark(**flags))
    assert says in str(error.value) and not begun


def test_many_calls_are_measured_and_one_is_said(monkeypatch: pytest.MonkeyPatch):
    clock, calls = [0.0], [0]

    def work(x: int) -> int:
        calls[0] += x
        clock[0] += 0.05
        return x

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert milliseconds(lambda x: None, work, 1) == pytest.approx(50)
    assert calls[0] == 3 + 4  # of 0.2 s


def test_a_kernel_that_fails_or_is_wrong_is_left_out_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def wrong(query: Any, key: Any, value: Any) -> Any:
        return 1.1 * dot_product(query, key, value)

    def failing(query: Any, key: Any, value: Any) -> Any:
        raise NotImplementedError("no such shape\nand more")

    kernels = {"dot_product": dot_product, "flash": wrong, "cudnn": failing}

    def choose(name: str, *_: Any, **__: Any) -> Any:
        if name not in kernels:
            raise ValueError(f"attention {name}: needs it")
        return kernels[name], ""

    monkeypatch.setattr("sdxl_eqx.kernels.choose.choose", choose)
    monkeypatch.setattr(attention_side, "LEAST", 1e-4)
    attention_side.ours({"batch": 1, "side": 64, "dtype": "float32"})
    found = json.loads(capsys.readouterr().out.partition(SAID)[2])
    assert [one["name"] for one in found["found"]] == 4 * ["dot_product"]
    assert all(one["forward"] > 0 and one["both"] > 0 for one in found["found"])
    *of_kernels, missing = found["refused"]
    assert missing == "attention cudnn_flash_te: needs it"
    assert of_kernels[0] == (
        "attention flash at (1, 16, 16, 10): differs from dot_product by 0.1 of its largest, so its speed means nothing"
    )
    assert [one.partition(" at ")[0] for one in of_kernels] == 4 * ["attention flash"] + 4 * ["attention cudnn"]
    assert of_kernels[-1].endswith(": no such shape")


@pytest.mark.parity
def test_real_sides_attend_at_small_shapes(caplog: pytest.LogCaptureFixture):
    pytest.importorskip("torch")
    caplog.set_level("INFO", "sdxl_eqx")
    figures = measure(AttentionBenchmark(batch=1, side=64, rounds=1))
    assert [one.name.partition(",")[0] for one in figures[::4]] == 4 * ["dot_product"]
    assert all(one.ours > 0 and one.baseline is not None and one.baseline > 0 for one in figures[::2])
    assert "left out: attention flash: has no kernel for a CPU" in caplog.text
