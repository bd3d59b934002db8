import io
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sdxl_eqx.config import MetricsConfig
from sdxl_eqx.training import metrics
from sdxl_eqx.training.metrics import MetricsWriter, Watch, cut_after


def record(step, **values):
    return json.dumps({"step": step, "run_name": "x", **values})


def test_what_lies_past_the_checkpoint_and_a_torn_line_are_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    kept = [record(n, **{"learning/loss": n / 10}) for n in range(1, 4)]
    evaluation = record(3, **{"eval/caption_retrieval": 0.5})
    past = [record(n, **{"learning/loss": n / 10}) for n in (4, 5)]
    file.write_text("\n".join([*kept, evaluation, *past, past[0][:20]]))
    cut_after(file, 3, "x")
    assert file.read_text() == "".join(f"{line}\n" for line in kept)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_before_the_checkpoint_stays(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [record(2, **{"learning/loss": 1.0}), record(2, **{"eval/caption_retrieval": 0.5})]
    file.write_text("\n".join(lines))
    cut_after(file, 3, "x")
    assert file.read_text().splitlines() == lines


def test_records_of_another_run_in_the_same_file_stay(tmp_path):
    file = tmp_path / "metrics.jsonl"
    other = json.dumps({"step": 9, "run_name": "y", "learning/loss": 1.0})
    file.write_text("\n".join([record(9, **{"learning/loss": 1.0}), other]))
    cut_after(file, 3, "x")
    assert file.read_text().splitlines() == [other]


def test_what_is_not_a_record_of_a_run_stays_but_a_torn_line_goes(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text('my notes\n[1, 2]\n{"mine": 1}\n{"st')
    cut_after(file, 3, "x")
    assert file.read_text() == 'my notes\n[1, 2]\n{"mine": 1}\n'


def test_the_evaluation_of_a_finished_run_stays_when_it_is_trained_on(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [record(3, **{"learning/loss": 1.0}), record(3, **{"eval/caption_retrieval": 0.5})]
    file.write_text("\n".join(lines) + "\n")
    cut_after(file, 3, "x", finished=True)
    assert file.read_text().splitlines() == lines


def test_a_file_that_is_not_there_is_no_error(tmp_path):
    cut_after(tmp_path / "metrics.jsonl", 3, "x")
    assert not list(tmp_path.iterdir())


def writer(tmp_path, start=0, **options):
    return MetricsWriter(
        MetricsConfig(**options),
        file=tmp_path / "metrics.jsonl",
        tensorboard=tmp_path / "tensorboard",
        run_name="x",
        start=start,
    )


def test_a_record_is_whole_in_the_file_as_soon_as_it_is_written(tmp_path):
    metrics = writer(tmp_path, metrics_file=str(tmp_path / "copies" / "copy.jsonl"))
    metrics.write(1, {"learning/loss": 0.5, "learning/grad_norm": math.nan, "x": math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(lines) == {
        "step": 1,
        "run_name": "x",
        "learning/loss": 0.5,
        "learning/grad_norm": "nan",
        "x": "inf",
    }
    assert (tmp_path / "copies" / "copy.jsonl").read_text() == lines
    metrics.close()


def test_a_resumed_run_writes_after_what_it_kept(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        metrics = writer(tmp_path, start)
        for n in steps:
            metrics.write(n, {"learning/loss": start + n / 10})
        metrics.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["learning/loss"]) for r in records] == [(1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, caplog):
    metrics = writer(tmp_path)
    metrics.files[0].close()
    with open("/dev/full", "a", buffering=1) as full:
        metrics.files = [full]
        for n in (1, 2):
            metrics.write(n, {"learning/loss": 0.5})
        metrics.close()
        (said,) = [record.getMessage() for record in caplog.records]
        assert "metrics are not written: [Errno 28] No space left on device" in said


def test_the_files_are_whole_when_they_are_sent_each_period_and_when_it_is_asked_for(tmp_path):
    sent = []

    def upload():
        events = sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
        sent.append(((tmp_path / "metrics.jsonl").read_text().count("\n"), events))

    metrics = MetricsWriter(
        MetricsConfig(log_period=2), file=tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard",
        run_name="x", start=0, upload=upload,
    )  # fmt: skip
    for n in range(1, 6):
        metrics.write(n, {"learning/loss": 0.5})
    metrics.flush()
    metrics.close()
    lines, events = zip(*sent, strict=True)
    assert lines == (2, 4, 5) and 0 < events[0] < events[1] < events[2]


def test_a_copy_in_a_bucket_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"--metrics-file gs://bucket/m.jsonl: must be a local file.*gs://"):
        writer(tmp_path, metrics_file="gs://bucket/m.jsonl")
    assert not list(tmp_path.iterdir())


PROGRAM = """
import sys
from pathlib import Path

import numpy as np

from sdxl_eqx.config import MetricsConfig
from sdxl_eqx.training.metrics import MetricsWriter

folder = Path(sys.argv[1])
metrics = MetricsWriter(
    MetricsConfig(log_period=1), file=folder / "m.jsonl", tensorboard=folder / "tb", run_name="x", start=0
)


def full(*_):
    raise OSError(28, "No space left on device")


records = metrics.board.file_writer.event_writer._ev_writer
records.write_event = records.flush = full
for step in (1, 2):
    noise = np.random.default_rng(step).integers(0, 256, (256, 256, 3), np.uint8)  # more than a pipe holds
    metrics.picture("samples", noise, step)
    metrics.picture("samples", noise, step)
    metrics.write(step, {"learning/loss": 0.5})
metrics.close()
"""


def test_a_board_that_cannot_be_written_does_not_keep_the_process_from_ending(tmp_path):
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], timeout=30, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "m.jsonl").read_text().count("\n") == 2


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path):
    metrics = writer(tmp_path, write_metrics=False)
    metrics.write(1, {"learning/loss": 0.5})
    metrics.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("step", "shown"), [(9, False), (10, True), (12, True)])
def test_without_a_terminal_a_line_stands_for_the_bar_each_period_and_at_the_end(step, shown, caplog):
    caplog.set_level(logging.INFO)
    with Watch(start=0, total=12, log_period=10) as watch:
        watch.show(step, loss=0.5, rate=1e-3, speed=20.0, waiting=0.004, seconds_left=65.0)
    messages = [r.getMessage() for r in caplog.records]
    assert messages == (
        [f"step {step}/12  loss 0.5000  lr 1.00e-03  20.0 images/s  data 0.4%  1:05 left"] if shown else []
    )


def test_on_a_terminal_a_bar_shows_loss_rate_and_speed(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(metrics, "Console", lambda: Console(force_terminal=True, file=screen, width=110))
    with Watch(start=0, total=2, log_period=1) as watch:
        assert watch.bar is not None
        watch.bar.refresh()
        assert "compiling" in screen.getvalue() and "nan" not in screen.getvalue()
        watch.show(1, loss=0.5, rate=1e-3, speed=9.25, waiting=0.5, seconds_left=3.0)
        watch.bar.refresh()
    assert "loss 0.5000  lr 1.00e-03  9.2 images/s" in screen.getvalue()
    assert "1/2" in screen.getvalue()
