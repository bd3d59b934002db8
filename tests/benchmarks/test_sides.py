"""Sides of a comparison are processes that answer once; one that fails is an error with the last of what it said."""

import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from sdxl_eqx.benchmarks import sides
from sdxl_eqx.benchmarks.sides import SAID, ask, command, has_other_side, in_turn


def test_a_side_answers_with_values_among_whatever_libraries_say():
    words = f"print('a library'); print('{SAID} {{\"seconds\": 0.5}}'); print('more')"
    assert ask([sys.executable, "-c", words]) == {"seconds": 0.5}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("raise ValueError('no such model')", r"code 1: .*ValueError: no such model$"),
        ("print('nothing')", r"code 0: nothing$"),
        (f"import sys; print('{SAID} {{}}'); sys.exit(3)", r"code 3: "),
        ("pass", r"code 0: no word$"),
    ],
)
def test_one_that_does_not_answer_is_an_error_with_the_last_of_what_it_said(words: str, says: str):
    with pytest.raises(ChildProcessError, match=says):
        ask([sys.executable, "-c", words])


def test_a_side_is_a_module_that_is_asked_in_json():
    _, *words = command("step_side", "ours", {"batch": 2})
    assert words == ["-m", "sdxl_eqx.benchmarks.step_side", "ours", '{"batch": 2}']


def test_there_is_another_side_where_pytorch_is_and_has_the_device(monkeypatch: pytest.MonkeyPatch, caplog):
    caplog.set_level("INFO", "sdxl_eqx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert has_other_side("gpu", ["torch"]) and has_other_side("cpu", ["torch"])
    assert not has_other_side("tpu", ["torch"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not has_other_side("gpu", ["torch", "diffusers"])
    assert "torch and diffusers cannot be imported (pip install -e '.[dev]')" in caplog.text


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Both sides for three rounds, of which the other one fails when it is asked for the given time."""

    def asked(fails: int) -> list[str]:
        begun: list[str] = []

        def ask(words: list[str]) -> dict[str, Any]:
            begun.append(words[-2])
            if words[-2] == "theirs" and begun.count("theirs") == fails:
                raise ChildProcessError("it ended with code 1: out of memory")
            return {"platform": "gpu", "side": words[-2], "asked": json.loads(words[-1])}

        monkeypatch.setattr(sides, "ask", ask)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        ours, theirs = in_turn(
            "step_side", {"batch": 8}, lambda said: {"beside": said["side"]}, rounds=3, libraries=["torch"],
            remedy=". Take less.",
        )  # fmt: skip
        assert len(ours) == 3 and all(one["asked"] == {"batch": 8} for one in ours)
        assert len(theirs) == (0 if fails else 3) and all(one["asked"] == {"beside": "ours"} for one in theirs)
        return begun

    return asked


def test_sides_take_turns(answers: Callable[[int], list[str]]):
    assert answers(0) == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_ours_is_not_lost_where_the_other_one_fails(fails: int, answers: Callable[[int], list[str]], caplog):
    assert answers(fails).count("theirs") == fails
    assert "PyTorch failed; it ended with code 1: out of memory. Take less." in caplog.text
