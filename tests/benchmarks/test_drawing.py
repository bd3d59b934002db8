"""Drawing beside diffusers: real processes of a tiny model where PyTorch is there, and others that only say numbers."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_eqx.benchmarks import drawing, results
from sdxl_eqx.benchmarks.config import GenerateBenchmark
from sdxl_eqx.benchmarks.drawing import Side, measure
from sdxl_eqx.benchmarks.drawing_side import SAID
from sdxl_eqx.benchmarks.random_models import HALF, TINY, RandomModel

TINY_NAMES = [
    "tiny (5M), 64x64, 1 steps: first picture of a new process",
    "the same, of what was compiled before",
    "each picture after that",
]

SAYS = f"""
import sys
print("what a library says")
print("{SAID} {{first}}", flush=True)
for seed in sys.stdin:
    print("{SAID} {{later}}", flush=True)
"""
"""A side that draws nothing."""


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Sides that only say how long they took, and no model; which were begun, with what cache."""
    begun: list[tuple[str, str]] = []

    def command(side: str, asked: Any) -> list[str]:
        begun.append((side, Path(asked["cache"]).name))
        later = {"ours": 0.5, "theirs": 2.0}[side]
        return [sys.executable, "-c", SAYS.format(first=9, later=later)]

    monkeypatch.setattr(drawing, "command", command)
    monkeypatch.setattr(RandomModel, "write", lambda self, folder: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(results, "version", lambda name: "1")
    return begun


def test_pictures_of_both_sides_are_compared_in_turn_and_written(numbers: list[tuple[str, str]], tmp_path: Path):
    file = tmp_path / "figures.json"
    measure(GenerateBenchmark(model="tiny", steps=1, starts=2, rounds=3, json=str(file)))
    values = json.loads(file.read_text("utf-8"))
    assert values["machine"]["cores"] >= 1 and values["versions"]["torch"] == "1" and values["steps"] == 1
    assert [one["name"] for one in values["figures"]] == TINY_NAMES
    *_, warm = values["figures"]
    assert (warm["rounds"], warm["baseline_rounds"], warm["ratio"]) == ([0.5] * 3, [2.0] * 3, 4.0)
    assert [len(one["rounds"]) for one in values["figures"]] == [2, 2, 3]
    # Nothing is compiled before the first figure's starts; what the first of them compiled serves the rest.
    assert numbers == [
        ("theirs", ""), ("ours", "cache 0"), ("theirs", ""), ("theirs", ""), ("ours", "cache 1"),
        ("ours", "cache 0"), ("ours", "cache 0"), ("theirs", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(("load", "note"), [(0.1, ""), (1e3, "the machine was busy: load 1000.0")])
def test_figures_of_a_busy_machine_say_so(
    load: float, note: str, numbers: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load), raising=False)
    assert {one.note for one in measure(GenerateBenchmark(model="tiny", starts=1, rounds=1))} == {note}


def test_both_models_are_measured_where_nothing_else_is_asked_for(numbers: list[tuple[str, str]]):
    figures = measure(GenerateBenchmark(starts=1, rounds=1))
    assert [one.name.partition(" ")[0] for one in figures[::3]] == ["tiny", "300m"]
    assert len(figures) == 6


def test_the_time_of_a_start_is_that_of_the_process():
    waits = f"import time; time.sleep(0.3); print('{SAID} 0', flush=True)"
    with Side.begun([sys.executable, "-c", waits]) as side:
        assert 0.3 <= side.first < 30


@pytest.mark.parametrize("fails_at_first", [True, False])
def test_a_side_that_fails_is_an_error_with_the_last_of_what_it_said(fails_at_first: bool):
    first = "" if fails_at_first else f"print('{SAID} 1', flush=True); input(); "
    words = [sys.executable, "-c", f"{first}raise ValueError('no such model')"]
    with pytest.raises(ChildProcessError, match=r"code 1: .*ValueError: no such model"), Side.begun(words) as side:
        side.draw(1)


def test_without_pytorch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(ValueError, match=r"torch cannot be imported: pip install -e '\.\[dev\]'"):
        measure(GenerateBenchmark())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"rounds": 0}, "--rounds 0: must be at least 1"),
        ({"starts": 0}, "--starts 0: must be at least 1"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"json": "/no/such/folder/figures.json"}, "--json /no/such/folder/figures.json: must be a file in a folder"),
    ],
)
def test_a_wrong_flag_is_said_before_anything_is_measured(
    flags: dict[str, Any], says: str, numbers: list[tuple[str, str]]
):
    with pytest.raises(ValueError) as error:
        measure(GenerateBenchmark(**flags))
    assert says in str(error.value) and not numbers


def test_the_models_are_as_large_as_their_names_say():
    assert TINY.side == 64
    assert HALF.side == 256
    assert 4 < TINY.parameters < 6
    assert 290 < HALF.parameters < 330


@pytest.mark.parity
def test_real_sides_draw_a_tiny_model(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(drawing, "settle", lambda begin: None)
    figures = measure(GenerateBenchmark(model="tiny", steps=1, starts=1, rounds=1))
    assert [one.name for one in figures] == TINY_NAMES
    first, again, later = figures
    for one in figures:
        assert 0 < one.ours < 300 and one.baseline is not None and 0 < one.baseline < 300
    assert later.ours < min(first.ours, again.ours)
