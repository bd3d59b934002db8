import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest

from sdxl_eqx.parallel import compiler_flags
from sdxl_eqx.parallel.compiler_flags import set_compiler_flags

GOOD, OTHER = "--xla_gpu_enable_pipelined_all_gather=true", "--xla_gpu_enable_pipelined_all_reduce=true"
MADE_UP = "--xla_gpu_enable_pipelined_all_gathers=true"  # libtpu guesses at names that are near
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", *compiler_flags.MEMORY_FRACTION)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """JAX has not started, its GPU plugin is installed, the environment says nothing, and there is no cache."""
    jax.devices()  # for the other tests, with their flags: here it must not be first without them
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(compiler_flags, "backends_are_initialized", lambda: False)
    gpu = dataclasses.replace(compiler_flags.GPU, packages=("jaxlib",), flags=(GOOD, OTHER))
    monkeypatch.setattr(compiler_flags, "GPU", gpu)


def flags_are(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Put these in the table for GPUs."""
    monkeypatch.setattr(compiler_flags, "GPU", dataclasses.replace(compiler_flags.GPU, flags=flags))


def answer(monkeypatch: pytest.MonkeyPatch, complaint: str = "", *, unless: Sequence[str] = ()) -> list[list[str]]:
    """Stand in for the compiler, which complains of all flags but some; returns what it is asked."""
    asked = []

    def run(_: object, flags: Sequence[str]) -> str | None:
        asked.append(list(flags))
        return None if set(flags) <= set(unless) else complaint

    monkeypatch.setattr(compiler_flags._Questions, "_complaint", run)
    return asked


def test_what_is_only_compiled_for_gets_its_flags_and_no_share_of_memory(monkeypatch):
    answer(monkeypatch, unless=[GOOD, OTHER])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert set_compiler_flags("gpu") == []
    assert set_compiler_flags("gpu", ahead=True) == [GOOD, OTHER]
    assert os.environ["XLA_FLAGS"] == f"{GOOD} {OTHER}"
    assert not any(name in os.environ for name in compiler_flags.MEMORY_FRACTION)


def no_process(*_: object, **__: object) -> None:
    pytest.fail("a process was started")


@pytest.mark.parametrize(
    "theirs", [f"--xla_dump_to=x {GOOD.replace('true', 'false')}", "--noxla_gpu_enable_pipelined_all_gather"]
)
def test_flags_of_the_user_are_left_alone_and_ours_come_after_them(theirs, monkeypatch):
    answer(monkeypatch, unless=[OTHER])
    monkeypatch.setenv("XLA_FLAGS", theirs)
    assert set_compiler_flags("gpu")[:-1] == [OTHER]
    assert os.environ["XLA_FLAGS"] == f"{theirs} {OTHER}"


def test_a_file_of_flags_is_left_alone(monkeypatch):
    asked = answer(monkeypatch)
    monkeypatch.setenv("XLA_FLAGS", "/etc/xla.flags")
    set_compiler_flags("gpu")
    assert os.environ["XLA_FLAGS"] == "/etc/xla.flags" and not asked


@pytest.mark.parametrize("name", compiler_flags.MEMORY_FRACTION)
def test_a_share_of_memory_by_either_name_is_left_alone(name, monkeypatch):
    answer(monkeypatch, unless=[GOOD, OTHER])
    monkeypatch.setenv(name, "0.5")
    assert set_compiler_flags("gpu") == [GOOD, OTHER]
    assert [os.environ.get(name) for name in compiler_flags.MEMORY_FRACTION].count("0.5") == 1
    assert "0.9" not in os.environ.values()


@pytest.mark.parametrize(("hardware", "platforms"), [("cpu", ""), ("auto", "cpu"), ("gpu", "cpu")])
def test_on_a_cpu_nothing_is_set_and_nothing_is_asked(hardware, platforms, monkeypatch):
    monkeypatch.setattr(compiler_flags, "on_gpu_machine", lambda: True)
    monkeypatch.setattr(compiler_flags.subprocess, "run", no_process)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    before = dict(os.environ)
    assert set_compiler_flags(hardware) == [] and dict(os.environ) == before


def test_without_jax_for_the_accelerator_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(compiler_flags, "GPU", dataclasses.replace(compiler_flags.GPU, packages=("no-such-package",)))
    monkeypatch.setattr(compiler_flags.subprocess, "run", no_process)
    assert set_compiler_flags("gpu") == []


@pytest.mark.parametrize(
    ("hardware", "platforms", "gpu", "tpu", "name"),
    [
        ("auto", "", True, True, "GPU"),
        ("auto", "", False, True, "TPU"),
        ("auto", "", False, False, None),
        ("auto", "cuda,cpu", False, False, "GPU"),
        ("auto", "tpu", True, False, "TPU"),
        ("tpu", "", True, False, "TPU"),
        ("gpu", "cpu,cuda", False, False, "GPU"),
        ("gpu", "tpu", True, True, None),
    ],
)
def test_the_accelerator_is_found_as_jax_will_find_it(hardware, platforms, gpu, tpu, name, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(compiler_flags, "on_gpu_machine", lambda: gpu)
    monkeypatch.setattr(compiler_flags, "on_tpu_vm", lambda: tpu)
    assert compiler_flags._compiler(hardware) is (name and getattr(compiler_flags, name))


def test_what_xla_does_not_know_is_left_out_and_it_is_asked_once(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags_are(monkeypatch, GOOD, MADE_UP, OTHER)
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")  # unknown too, and not ours to judge
    assert set_compiler_flags("gpu") == [GOOD, OTHER, "XLA_CLIENT_MEM_FRACTION=0.9"]
    assert os.environ["XLA_FLAGS"] == f"--xla_of_the_user=1 {GOOD} {OTHER}"
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.9"
    unknown, done = caplog.messages
    assert MADE_UP in unknown and GOOD not in unknown and GOOD in done and MADE_UP not in done
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(compiler_flags.subprocess, "run", no_process)
    assert set_compiler_flags("gpu") == [GOOD, OTHER]
    assert [file.name for file in (tmp_path / ".cache" / "sdxl_eqx").iterdir()] == ["compiler_flags.json"]


@pytest.mark.parametrize(
    ("complaint", "questions"),
    [
        (f"ERROR: Unknown command line flag '{MADE_UP[2:-5]}'. Did you mean: {GOOD[2:-5]} ?", 2),  # libtpu's words
        ("something else", 6),  # all, two halves, two quarters of one of them, and none
    ],
)
def test_what_the_compiler_does_not_know_is_found_by_name_or_by_halving(complaint, questions, monkeypatch):
    flags_are(monkeypatch, GOOD, OTHER, "--a=1", MADE_UP)
    asked = answer(monkeypatch, complaint, unless=[GOOD, OTHER, "--a=1"])
    assert set_compiler_flags("gpu")[:-1] == [GOOD, OTHER, "--a=1"]
    assert len(asked) <= questions


@pytest.mark.parametrize("text", ["", "{", "[]", '{"VERSION": 3}', f'{{"VERSION": {{"{GOOD}": "no"}}}}'])
def test_a_damaged_cache_is_asked_for_again(text, monkeypatch):
    file = compiler_flags._cache_file()
    file.parent.mkdir(parents=True)
    file.write_text(text.replace("VERSION", compiler_flags._versions(("jaxlib", *compiler_flags.GPU.packages))))
    asked = answer(monkeypatch, unless=[GOOD, OTHER])
    assert set_compiler_flags("gpu")[:-1] == [GOOD, OTHER] and asked == [[GOOD, OTHER]]
    assert {GOOD: True, OTHER: True} in json.loads(file.read_text()).values()


def test_another_version_is_asked_again(monkeypatch):
    asked = answer(monkeypatch, unless=[GOOD, OTHER])
    for version in ("jaxlib 1", "jaxlib 2", "jaxlib 1"):
        monkeypatch.delenv("XLA_FLAGS", raising=False)
        monkeypatch.setattr(compiler_flags, "_versions", lambda _, version=version: version)
        set_compiler_flags("gpu")
    assert asked == 2 * [[GOOD, OTHER]]


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    answer(monkeypatch, unless=[GOOD, OTHER])
    (tmp_path / ".cache").write_text("in the way")
    assert set_compiler_flags("gpu")[:-1] == [GOOD, OTHER]


@pytest.mark.parametrize(
    ("timeout", "load", "why"), [(0.0, "", "timed out"), (60.0, "raise SystemExit('no driver')", "no driver")]
)
def test_a_compiler_that_does_not_answer_gets_no_flags_and_is_asked_next_time(timeout, load, why, monkeypatch, caplog):
    monkeypatch.setattr(compiler_flags, "TIMEOUT", timeout)
    monkeypatch.setattr(compiler_flags, "GPU", dataclasses.replace(compiler_flags.GPU, load=load))
    set_compiler_flags("gpu")
    assert "XLA_FLAGS" not in os.environ and not compiler_flags._cache_file().exists()
    assert why in caplog.text and "no flags" in caplog.text


def test_jax_that_has_started_is_too_late(monkeypatch):
    monkeypatch.setattr(compiler_flags, "backends_are_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="JAX has started and reads XLA_FLAGS no more"):
        set_compiler_flags("gpu")


def test_jax_knows_whether_it_has_started():
    from jax._src.xla_bridge import backends_are_initialized

    jax.devices()
    assert backends_are_initialized()


@pytest.mark.parametrize(
    "name",
    [
        "GPU",
        pytest.param(
            "TPU",
            marks=pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
        ),
    ],
)
def test_the_versions_of_today_know_every_flag_of_the_table(name, monkeypatch):
    monkeypatch.undo()
    compiler = getattr(compiler_flags, name)
    assert compiler_flags._Questions(compiler).unknown(compiler.flags) == []
