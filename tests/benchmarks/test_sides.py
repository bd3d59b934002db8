"""Sides of a comparison are processes that answer once; one that fails is an error with the last of what it said."""

import importlib.util
import sys

import pytest

from sdxl_eqx.benchmarks.sides import SAID, ask, command, has_other_side


def test_a_side_answers_with_values_among_whatever_libraries_say():
    words = f"print('a library'); print('{SAID} {{\"seconds\": 0.5}}'); print('more')"
    assert ask([sys.executable, "-c", words]) == {"seconds": 0.5}


@pytest.mark.parametrize("words", ["raise ValueError('no such model')", "print('nothing')", "import sys; sys.exit(3)"])
def test_one_that_does_not_answer_is_an_error_with_the_last_of_what_it_said(words: str):
    with pytest.raises(ChildProcessError, match=r"ended with code [013]: (.*ValueError: no such model|nothing)?$"):
        ask([sys.executable, "-c", words])


def test_a_side_sees_no_settings_of_a_test_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    words = f"import os, json; print('{SAID}', json.dumps(dict(os.environ)))"
    found = ask([sys.executable, "-c", words])
    assert found and "XLA_FLAGS" not in found


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
