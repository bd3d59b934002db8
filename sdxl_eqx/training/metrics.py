"""What a run reports: metrics.jsonl, TensorBoard, and a bar or lines for the person who watches."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from sdxl_eqx.config import MetricsConfig
from sdxl_eqx.data.sources.files import is_local
from sdxl_eqx.training.cloud import write_whole
from sdxl_eqx.training.trackers import Wandb

log = logging.getLogger("sdxl_eqx")

WAIT = 5.0
"""Seconds that TensorBoard's thread may take to write what it was given."""


def cut_after(file: Path, step: int, run_name: str, *, finished: bool = False) -> None:
    """Take out of a metrics file what lies past a checkpoint and will be written again, and a torn last line.

    Evaluations belong after the checkpoint of their step, so those of `step` itself go too, unless the run was
    `finished` there. Everything that is not of this run stays.
    """
    if not file.exists():
        return
    kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _stays(line, step, run_name, finished)]
    building = file.with_name(f".{file.name}.part")
    building.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(building, file)


def _stays(line: str, step: int, run_name: str, finished: bool) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return not line.startswith("{")  # torn
    if not isinstance(record, dict) or "step" not in record or record.get("run_name", run_name) != run_name:
        return True
    return record["step"] < step or (record["step"] == step and (finished or "learning/loss" in record))


class MetricsWriter:
    """Writes records to the run's files; `start` is the step that the run begins after, `finished` there or not.

    A disk that becomes full is said once, and training goes on: no process of a run may end alone.
    """

    def __init__(
        self,
        config: MetricsConfig,
        *,
        file: Path,
        tensorboard: Path,
        run_name: str,
        start: int,
        finished: bool = False,
        tracker: Wandb | None = None,
        upload: Callable[[], Any] | None = None,
        periods: Path | None = None,
    ):
        """`tracker` is told the same; `upload` is called when the files are whole, each log_period and at `flush`;
        in the folder `periods` each log_period has a file of its own besides, as MaxDiffusion names them.

        Raises:
            ValueError: for a metrics_file that is not on this machine.
        """
        if not is_local(config.metrics_file):
            raise ValueError(
                f"--metrics-file {config.metrics_file}: must be a local file; the metrics of a run whose "
                "--base-output-directory is on gs:// are there in any case."
            )
        self.run_name = run_name
        self.log_period = config.log_period
        self.files = []
        self.board = None
        self.is_full = False
        self.tracker = tracker
        self.upload = upload
        self.periods = periods if config.write_metrics else None
        self._period: list[tuple[int, str]] = []
        if config.write_metrics:
            copies = [Path(config.metrics_file)] if config.metrics_file else []
            for path in [file, *copies]:
                path.parent.mkdir(parents=True, exist_ok=True)
                cut_after(path, start, run_name, finished=finished)
                self.files.append(path.open("a", encoding="utf-8", buffering=1))
            self.board = SummaryWriter(str(tensorboard), purge_step=start + 1 if start else None, max_queue=10**6)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record; numbers that are not finite are written as strings, which JSON allows."""
        shown = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        line = json.dumps({"step": step, "run_name": self.run_name, **shown})
        for file in self.files:
            self._try(file.write, f"{line}\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.write(step, values)
        if self.periods is not None:
            self._period.append((step, line))
        if step % self.log_period == 0:
            self._end_period()
            self.flush()

    def flush(self) -> None:
        """Have all that was written in the files."""
        if self.board is not None:
            self._try(self._flush_board)
        if self.upload is not None:
            self.upload()

    def _flush_board(self) -> None:
        """Have what TensorBoard's writer was given in its file: its own flush does not wait for its thread."""
        assert self.board is not None
        waiting: Any = self.board.file_writer.event_writer._event_queue  # pyright: ignore
        end = time.monotonic() + WAIT
        while not waiting.empty() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.02)  # for the one that the thread has taken and not written yet
        self.board.flush()

    def text(self, name: str, value: str) -> None:
        """A text on TensorBoard."""
        if self.board is not None:
            self.board.add_text(name, value, 0)
        if self.tracker is not None:
            self.tracker.text(name, value)

    def picture(self, name: str, picture, step: int) -> None:
        """A picture `[H, W, 3]` from 0 to 255 on TensorBoard."""
        if self.board is not None:
            self.board.add_image(name, picture, step, dataformats="HWC")
        if self.tracker is not None:
            self.tracker.picture(name, picture, step)

    def close(self) -> None:
        """Write what is left."""
        self._end_period()
        for file in self.files:
            self._try(file.close)
        if self.board is not None:
            self._try(self.board.close)
        if self.tracker is not None:
            self.tracker.close()

    def _end_period(self) -> None:
        """Write the records since the last such file."""
        if self.periods is None or not self._period:
            return
        (first, _), (last, _) = self._period[0], self._period[-1]
        file = self.periods / f"metrics_step_{first:06}_to_step_{last:06}.txt"
        self._try(lambda: write_whole(str(file), "".join(f"{line}\n" for _, line in self._period).encode()))
        self._period.clear()

    def _try(self, write: Callable[..., Any], *values: Any) -> None:
        try:
            write(*values)
        except OSError as error:
            if not self.is_full:
                log.error("metrics are not written: %s", error)
            self.is_full = True
            self._drop_board()

    def _drop_board(self) -> None:
        """Have nothing more to do with TensorBoard: what its thread, which the error ended, leaves in its queue would
        be waited for when the process ends."""
        events = getattr(getattr(self.board, "file_writer", None), "event_writer", None)
        queue = getattr(events, "_event_queue", None)
        if queue is not None:
            queue.cancel_join_thread()
        self.board = None


class Watch:
    """A progress bar on a terminal, a line each log_period without one."""

    def __init__(self, *, start: int, total: int, log_period: int, is_shown: bool = True):
        self.total, self.log_period = total, log_period
        self.start = start
        self.console = Console()
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}  left"),
            TimeRemainingColumn(compact=True),
        )
        self.bar = (
            Progress(*columns, console=self.console, transient=False) if self.console.is_terminal and is_shown else None
        )
        self.task = None

    def __enter__(self) -> "Watch":
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.start, status="compiling")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, step: int, *, loss: float, rate: float, speed: float, waiting: float, seconds_left: float) -> None:
        """The state of the run after `step`; `speed` is images a second, `waiting` the share of time spent on waiting
        for data."""
        status = f"loss {loss:.4f}  lr {rate:.2e}  {speed:.1f} images/s  data {waiting:.1%}"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, status=status)
        elif step % self.log_period == 0 or step == self.total:
            left = f"{int(seconds_left // 60)}:{int(seconds_left % 60):02d}"
            log.info("step %d/%d  %s  %s left", step, self.total, status, left)
