import json
import logging
import time
from pathlib import Path

import pytest

from sdxl_eqx.config import MetricsConfig
from sdxl_eqx.training.metrics import MetricsWriter
from sdxl_eqx.training.timings import Timings


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_what_takes_long_is_logged_and_written_in_the_order_in_which_it_began(clock, tmp_path, caplog):
    timings = Timings()
    with timings.of("load_model"):
        clock[0] += 2
        with timings.of("read"):
            clock[0] += 1
    with timings.of("read"):
        clock[0] += 0.5
    timings.add("compile", 4.0)
    clock[0] += 0.25
    file = tmp_path / "new" / "timing.json"
    with caplog.at_level(logging.INFO):
        timings.report(file=str(file), step=7)
    seconds = {"load_model": 3.0, "read": 1.5, "compile": 4, "total": 3.75}
    assert json.loads(file.read_text()) == {"step": 7, "seconds": seconds}
    assert list(json.loads(file.read_text())["seconds"]) == list(seconds)
    assert [p.name for p in file.parent.iterdir()] == ["timing.json"]
    assert [r.getMessage() for r in caplog.records] == [
        "start-up: load_model 3.0 s, read 1.5 s, compile 4.0 s, total 3.8 s"
    ]


def test_they_are_metrics_of_a_step_too(clock, tmp_path):
    metrics = MetricsWriter(
        MetricsConfig(), file=tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tb", run_name="x", start=0
    )
    timings = Timings()
    with timings.of("load_data"):
        clock[0] += 2
    timings.report(file="", step=1, write=metrics.write)
    metrics.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record == {"step": 1, "run_name": "x", "timing/load_data": 2.0, "timing/total": 2.0}


def test_what_failed_has_no_time(clock):
    timings = Timings()
    with pytest.raises(OSError), timings.of("load_data"):
        raise OSError
    assert timings.seconds == {}


def test_a_file_that_cannot_be_written_is_said_and_costs_nothing_else(tmp_path, caplog):
    (tmp_path / "file").touch()
    Timings().report(file=str(tmp_path / "file" / "timing.json"), step=1)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert said.startswith("--timing-metrics-file: not written") and Path(tmp_path / "file").read_bytes() == b""
