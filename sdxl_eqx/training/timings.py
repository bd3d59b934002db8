"""How long the parts of a run's start-up take."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdxl_eqx.training.cloud import write_whole

log = logging.getLogger("sdxl_eqx")


class Timings:
    """Seconds by name, in the order in which they were begun.

    A name that comes again adds to what it has; what lies inside another counts in both.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Take the time of what is done inside, where that does not fail."""
        self.seconds.setdefault(name, 0.0)
        began = time.perf_counter()
        try:
            yield
        except BaseException:
            if self.seconds[name] == 0:
                del self.seconds[name]
            raise
        self.seconds[name] += time.perf_counter() - began

    def add(self, name: str, seconds: float) -> None:
        """Add what was measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def report(self, *, file: str, step: int, write: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Log them and write them: as `timing/NAME` of `step` by `write` (MetricsWriter's), and as JSON in a file,
        local or remote ('': none).

        `total` is all since this object was made. A file that cannot be written is said and costs nothing else.
        """
        values = {**self.seconds, "total": time.perf_counter() - self.began}
        log.info("start-up: %s", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in values.items()))
        if write is not None:
            write(step, {f"timing/{name}": seconds for name, seconds in values.items()})
        if not file:
            return
        try:
            write_whole(file, f"{json.dumps({'step': step, 'seconds': values}, indent=1)}\n".encode())
        except (OSError, ValueError) as error:
            log.error("--timing-metrics-file: not written: %s", error)
