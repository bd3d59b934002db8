"""A profile of a few steps of a run, for TensorBoard and xprof."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from sdxl_eqx.config import MetricsConfig

log = logging.getLogger("sdxl_eqx")


class Profiler:
    """Records `profiler_steps` steps, from the one on that follows `skip_first_n_steps_for_profiler` others.

    Use it as a context around the loop; `at(n)` as a context around the dispatch of step n. What is recorded lies in
    FOLDER/plugins/profile/ when the last of the steps has been computed, or the context ends.
    """

    def __init__(self, config: MetricsConfig, folder: Path, start: int):
        """`folder`: TensorBoard's; `start`: the step that the run begins after."""
        self.folder = folder
        self.first = start + config.skip_first_n_steps_for_profiler + 1
        self.last = self.first + config.profiler_steps - 1
        self.is_on = config.enable_profiler
        self.is_recording = False
        self._results: Any = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What a run that ends before the last step has recorded is kept."""
        if self.is_recording:
            self._stop(wait=kind is None)
        elif self.is_on and kind is None:
            log.warning("no profile: the run ended before step %d, the first to be recorded", self.first)

    @contextmanager
    def at(self, n: int) -> Iterator[Callable[[Any], Any]]:
        """A context around the dispatch of step n; what it is given is waited for when the recording ends."""
        if not self.is_on:
            yield _same
            return
        if not self.is_recording and n >= self.first:
            self._begin()
        if not self.is_recording:
            yield self._keep
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=n):
            yield self._keep
        if n >= self.last:
            self._stop(wait=True)

    def _keep(self, results: Any) -> Any:
        self._results = results
        return results

    def _begin(self) -> None:
        jax.block_until_ready(self._results)  # or what is still running of the step before would be in the profile
        self._results = None
        try:
            jax.profiler.start_trace(str(self.folder))
        except RuntimeError as error:  # of a profile that somebody else is taking
            log.error("no profile: %s", error)
            self.is_on = False
            return
        self.is_recording = True

    def _stop(self, *, wait: bool) -> None:
        """`wait` for what is still running; not where it has failed."""
        try:
            if wait:
                jax.block_until_ready(self._results)
        finally:
            self._results = None
            self.is_recording = self.is_on = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:  # a full disk costs the profile alone
                log.error("no profile: %s", error)
            else:
                log.info("profile in %s; look at it with tensorboard --logdir %s", self.folder, self.folder)


def _same(results: Any) -> Any:
    return results
