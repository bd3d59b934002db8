"""Attention beside PyTorch's: a side that only says numbers, and real ones at small shapes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sdxl_eqx.benchmarks import sides
from sdxl_eqx.benchmarks.attention import measure
from sdxl_eqx.benchmarks.attention_side import shapes_of
from sdxl_eqx.benchmarks.config import AttentionBenchmark


def test_the_shapes_are_those_of_both_levels_to_themselves_and_to_the_text():
    assert shapes_of(8, 1024) == [(8, 4096, 4096, 10), (8, 4096, 77, 10), (8, 1024, 1024, 20), (8, 1024, 77, 20)]


def test_each_implementation_is_compared_at_each_shape(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "sdxl_eqx")
    shapes = shapes_of(8, 1024)
    begun: list[str] = []

    def ask(words: list[str]) -> dict[str, Any]:
        begun.append(words[-2])
        if words[-2] == "theirs":
            assert json.loads(words[-1]) == {"batch": 8, "side": 1024, "dtype": "bfloat16", "platform": "gpu"}
            return {"found": [{"shape": s, "forward": 2.0 + i, "both": 6.0} for i, s in enumerate(shapes)]}
        found = [{"name": n, "shape": s, "forward": 1.0, "both": 4.0} for n in ("dot_product", "cudnn") for s in shapes]
        facts = {"device": "NVIDIA H200", "platform": "gpu", "dtype": "bfloat16", "side": 1024}
        return {"found": found, "refused": {"cudnn_flash_te": "attention cudnn_flash_te: needs it"}, **facts}

    monkeypatch.setattr(sides, "ask", ask)
    monkeypatch.setattr(sides, "has_other_side", lambda platform, libraries: True)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    file = tmp_path / "figures.json"
    figures = measure(AttentionBenchmark(rounds=2, json=str(file)))
    assert begun == ["ours", "theirs", "theirs", "ours"]
    assert len(figures) == 2 * 4 * 2 and "left out: attention cudnn_flash_te: needs it" in caplog.text
    # 4 x 8 x 10 x 4096 x 4096 x 64 operations in a millisecond; three times as many in 4.
    assert figures[0].name.endswith("4096 to 4096, 10 heads, bfloat16, NVIDIA H200: forward (3.4e+02 TFLOP/s)")
    assert figures[1].name.endswith("both passes (2.6e+02 TFLOP/s)") and figures[1].ratio == 1.5
    assert [one.ratio for one in figures[::2]] == [2, 3, 4, 5, 2, 3, 4, 5]
    assert figures[8].name.startswith("cudnn, 8 x 4096 to 4096")
    assert len(json.loads(file.read_text("utf-8"))["sides"]["ours"]) == 2


@pytest.mark.parametrize(
    ("flags", "says"), [({"side": 100}, "--side 100: must be a multiple of 32"), ({"rounds": 0}, "--rounds 0")]
)
def test_a_wrong_flag_is_said_before_anything_is_measured(flags: dict[str, Any], says: str):
    with pytest.raises(ValueError) as error:
        measure(AttentionBenchmark(**flags))
    assert says in str(error.value)


@pytest.mark.parity
def test_real_sides_attend_at_small_shapes(caplog: pytest.LogCaptureFixture):
    pytest.importorskip("torch")
    caplog.set_level("INFO", "sdxl_eqx")
    figures = measure(AttentionBenchmark(batch=1, side=64, rounds=1))
    assert [one.name.partition(",")[0] for one in figures] == 8 * ["dot_product"]
    assert all(one.ours > 0 and one.baseline is not None and one.baseline > 0 for one in figures)
    assert "left out: attention flash: has no kernel for a CPU" in caplog.text
