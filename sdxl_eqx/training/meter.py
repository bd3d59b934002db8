"""What is measured of each step, read one step late so that the loop never waits for the device."""

import math
import time
from typing import Any

import numpy as np

from sdxl_eqx.data.pictures import Size
from sdxl_eqx.training.errors import RunError, last_good
from sdxl_eqx.training.feed import Feed
from sdxl_eqx.training.flops import training_flops
from sdxl_eqx.training.metrics import MetricsWriter, Watch
from sdxl_eqx.training.setup import Run


class Meter:
    """Turns the arrays of a step into a record, one step late."""

    def __init__(self, run: Run, writer: MetricsWriter, watch: Watch, data: Feed):
        self.run, self.writer, self.watch, self.bad = run, writer, watch, data.bad
        self.pending: tuple[int, Any, Size, float] | None = None
        self.clock = time.perf_counter()
        self.began: float | None = None
        self.first = 0
        self.waited = 0.0
        each = run.batch_size / run.mesh.size / 1e12
        self.tflop = {shape: training_flops(run.parts, run.config.data, shape) * each for shape in data.buckets.shapes}

    def put(self, n: int, metrics: Any, shape: Size, waited: float) -> None:
        """Remember the metrics of step n, which may still be running, on pictures of a shape that it waited for."""
        self.pending = (n, metrics, shape, waited)

    def restart(self) -> None:
        """Begin the next step's time now: what was drawn or saved since is no part of it, nor of the speed."""
        now = time.perf_counter()
        if self.began is not None:
            self.began += now - self.clock
        self.clock = now

    def flush(self) -> None:
        """Wait for the remembered step and report it.

        Raises:
            RunError: where it is not finite, so that no checkpoint of it is written over a good one.
        """
        if self.pending is None:
            return
        n, metrics, shape, waited = self.pending
        self.pending = None
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        loss, rate = values.pop("learning/loss"), float(np.asarray(self.run.rate(n - 1)))
        self.writer.write(
            n,
            {
                "learning/loss": loss,
                "learning/current_learning_rate": rate,
                **values,
                "perf/step_time_seconds": seconds,
                "perf/images_per_second": self.run.batch_size / seconds,
                "perf/data_wait_seconds": waited,
                "perf/per_device_tflops": self.tflop[shape],
                "perf/per_device_tflops_per_sec": self.tflop[shape] / seconds,
                "data/bad_samples": self.bad.count,
            },
        )
        norm = values["learning/grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"step {n}: loss {loss}, gradient norm {norm}: not finite. Lower --learning-rate, or add "
                f"--opt-enable-grad-global-norm-clipping. {last_good(self.run)}"
            )
        # The first step is mostly compiling: speed and time left are those of the steps after it.
        if self.began is None:
            self.began, self.first = now, n
            speed, left, waiting = self.run.batch_size / seconds, 0.0, waited / seconds
        else:
            self.waited += waited
            each = (now - self.began) / (n - self.first)
            speed, left = self.run.batch_size / each, each * (self.run.total_steps - n)
            waiting = self.waited / (now - self.began)
        self.watch.show(n, loss=loss, rate=rate, speed=speed, waiting=waiting, seconds_left=left)
