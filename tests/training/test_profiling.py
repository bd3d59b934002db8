import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from sdxl_eqx.config import MetricsConfig
from sdxl_eqx.training.profiling import Profiler


@jax.jit
def step(x):
    return x @ x / 100


def run(folder: Path, *, start: int, stop: int, error: Exception | None = None, **options) -> Profiler:
    """A loop of tiny steps, from the one after `start` to `stop`."""
    x = jnp.ones((64, 64))
    with Profiler(MetricsConfig(enable_profiler=True, **options), folder, start) as profiler:
        for n in range(start + 1, stop + 1):
            with profiler.at(n) as keep:
                x = keep(step(x))
        if error is not None:
            raise error
    return profiler


def recorded(folder: Path) -> list[int]:
    """The steps in the only profile in a folder."""
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    events = [e for plane in ProfileData.from_file(str(file)).planes for line in plane.lines for e in line.events]
    return sorted({int(dict(e.stats)["step_num"]) for e in events if e.name == "train"})  # pyright: ignore


def test_the_steps_after_the_skipped_ones_are_recorded(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(tmp_path, start=0, stop=9, skip_first_n_steps_for_profiler=2, profiler_steps=3)
    assert recorded(tmp_path) == [3, 4, 5]
    assert f"tensorboard --logdir {tmp_path}" in caplog.text


def test_they_are_counted_from_where_the_run_resumes(tmp_path):
    run(tmp_path, start=40, stop=45, skip_first_n_steps_for_profiler=1, profiler_steps=2)
    assert recorded(tmp_path) == [42, 43]


def test_a_run_that_ends_before_leaves_what_it_has(tmp_path):
    run(tmp_path, start=0, stop=3, skip_first_n_steps_for_profiler=1, profiler_steps=10)
    assert recorded(tmp_path) == [2, 3]


def test_a_run_that_fails_leaves_what_it_has_and_its_error(tmp_path):
    with pytest.raises(ValueError, match="broken"):
        run(tmp_path, start=0, stop=2, error=ValueError("broken"), skip_first_n_steps_for_profiler=1)
    assert recorded(tmp_path) == [2]


def test_a_run_that_ends_before_the_first_is_said(tmp_path, caplog):
    run(tmp_path, start=0, stop=2)
    assert [record.getMessage() for record in caplog.records] == [
        "no profile: the run ended before step 6, the first to be recorded"
    ]
    assert not list(tmp_path.iterdir())


def test_nothing_is_recorded_unasked_and_no_result_is_kept(tmp_path):
    with Profiler(MetricsConfig(skip_first_n_steps_for_profiler=0), tmp_path, 0) as profiler, profiler.at(1) as keep:
        assert keep("x") == "x"
    assert profiler._results is None and not list(tmp_path.iterdir())


def test_the_last_step_is_computed_when_the_recording_ends(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    with Profiler(
        MetricsConfig(enable_profiler=True, skip_first_n_steps_for_profiler=0, profiler_steps=2), tmp_path, 0
    ) as p:
        for n in (1, 2, 3):
            with p.at(n) as keep:
                keep(n)
    assert waited == [None, 2] and not p.is_on


def test_a_profile_that_somebody_else_is_taking_is_said_and_training_goes_on(tmp_path, caplog):
    jax.profiler.start_trace(str(tmp_path / "other"))
    try:
        run(tmp_path / "run", start=0, stop=3, skip_first_n_steps_for_profiler=0)
    finally:
        jax.profiler.stop_trace()
    assert [r.getMessage()[:12] for r in caplog.records] == ["no profile: "] and not (tmp_path / "run").exists()
