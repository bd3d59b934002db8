"""What is measured of each step, read one step late so that the loop never waits for the device."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdxl_eqx.data.pictures import Size
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.topologies import CHIPS
from sdxl_eqx.training.errors import RunError, last_good
from sdxl_eqx.training.feed import Feed
from sdxl_eqx.training.flops import training_flops
from sdxl_eqx.training.metrics import MetricsWriter, Watch
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.timings import Timings

log = logging.getLogger("sdxl_eqx")

DECILES = ("decile_sums", "decile_counts")
"""Losses by tenths of the timesteps, which are metrics where there are samples of them."""

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""What JAX calls the chips whose peak is known. The H100 and H200 of other forms (PCIe, NVL) are slower than these."""

MEMORY = {"bytes_in_use": "perf/memory_bytes_in_use", "peak_bytes_in_use": "perf/memory_peak_bytes"}
"""The metrics of what a device says of its memory."""


def peak_tflops(devices: Sequence[Any]) -> float | None:
    """The published peak of a device's dense bfloat16 products, in TFLOP/s; None where that is not known."""
    name = KINDS.get(devices[0].device_kind)
    return None if name is None else CHIPS[name].tflops


def memory_used(devices: Sequence[Any]) -> dict[str, float]:
    """Bytes in use now, and at most since the process began, of the device that has most; nothing of CPUs."""
    stats = [device.memory_stats() or {} for device in devices]
    return {name: float(max(one[key] for one in stats)) for key, name in MEMORY.items() if all(key in s for s in stats)}


class Meter:
    """Turns the arrays of a step into a record, one step late.

    `perf/mfu` is the share of the peak of bfloat16 products that the model's own operations reach, whatever is computed
    again and in whatever dtype (model FLOPs utilization: Chowdhery et al. 2022, appendix B).
    """

    def __init__(self, run: Run, writer: MetricsWriter, watch: Watch, data: Feed, timings: Timings):
        self.run, self.writer, self.watch, self.bad, self.timings = run, writer, watch, data.bad, timings
        self.pending: tuple[int, Any, Size, float] | None = None
        self.skipped = self.in_a_row = 0
        """Steps that were not finite and changed nothing: in all, and up to now."""
        self.clock = time.perf_counter()
        self.began: float | None = None
        self.first = 0
        self.waited = 0.0
        self.devices = run.mesh.local_devices
        self.peak = peak_tflops(self.devices)
        each = run.batch_size / run.mesh.size / 1e12
        self.tflop = {shape: training_flops(run.parts, run.config, shape) * each for shape in data.buckets.shapes}

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
            RunError: where more than max_nonfinite_steps in a row were not finite.
        """
        if self.pending is None:
            return
        n, metrics, shape, waited = self.pending
        self.pending = None
        values = {name: float(np.asarray(value)) for name, value in metrics.items() if name not in DECILES}
        sums, counts = (np.asarray(metrics[name]) for name in DECILES)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        loss, rate = values.pop("learning/loss"), float(np.asarray(self.run.rate(n - 1)))
        self._count(n, loss, values["learning/grad_norm"])
        self.writer.write(
            n,
            {
                "learning/loss": loss,
                "learning/current_learning_rate": rate,
                **values,
                **{
                    f"loss/t{100 * i:03d}_{100 * i + 99:03d}": float(sums[i] / counts[i])
                    for i in range(10)
                    if counts[i] > 0
                },
                "learning/skipped_steps": self.skipped,
                "perf/step_time_seconds": seconds,
                "perf/images_per_second": self.run.batch_size / seconds,
                "perf/data_wait_seconds": waited,
                "perf/per_device_tflops": self.tflop[shape],
                "perf/per_device_tflops_per_sec": self.tflop[shape] / seconds,
                **({} if self.peak is None else {"perf/mfu": self.tflop[shape] / seconds / self.peak}),
                **memory_used(self.devices),
                "data/bad_samples": self.bad.count,
            },
        )
        allowed = self.run.config.optim.max_nonfinite_steps
        if self.in_a_row > allowed:
            raise RunError(
                f"step {n}: loss {loss}, gradient norm {values['learning/grad_norm']}: not finite, as in "
                f"{self.in_a_row} steps in a row (--max-nonfinite-steps {allowed}). Lower --learning-rate, or add "
                f"--opt-enable-grad-global-norm-clipping. {last_good(self.run)}"
            )
        # The first step is mostly compiling: speed and time left are those of the steps after it.
        if self.began is None:
            self.began, self.first = now, n
            self._report(n, seconds)
            speed, left, waiting = self.run.batch_size / seconds, 0.0, waited / seconds
        else:
            self.waited += waited
            each = (now - self.began) / (n - self.first)
            speed, left = self.run.batch_size / each, each * (self.run.total_steps - n)
            waiting = self.waited / (now - self.began)
        self.watch.show(n, loss=loss, rate=rate, speed=speed, waiting=waiting, seconds_left=left)

    def _report(self, n: int, seconds: float) -> None:
        """How long it took to come as far as the first step's end, compilation and all."""
        self.timings.add("first_step", seconds)
        metrics, folder = self.run.config.metrics, self.run.folder
        if hosts.is_first() and metrics.write_timing_metrics:
            file = metrics.timing_metrics_file or str(folder.path / "timing.json")
            self.timings.report(file=file, step=n, write=self.writer.write)

    def _count(self, n: int, loss: float, norm: float) -> None:
        """Count a step that was not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        log.warning("step %d: loss %s, gradient norm %s: not finite, so that it changes nothing", n, loss, norm)
