"""Ctrl-C and SIGTERM: how a run, of one process or many, ends after a whole step."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax

from sdxl_eqx.parallel import hosts

log = logging.getLogger("sdxl_eqx")


class Stop:
    """Remembers Ctrl-C and SIGTERM, so that the loop ends after a whole step; a second Ctrl-C ends one process at once.

    Of several processes, one that is told to stop has all of them stop after the same step: SIGTERM is left to JAX's
    preemption service, which tells the others, and Ctrl-C is turned into it.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.alone = jax.process_count() == 1
        self.asked = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM) if self.alone else (signal.SIGINT,):
                self.before[number] = signal.signal(number, self._note)
        return self

    def now(self, step: int | None = None) -> bool:
        """Whether the run ends after `step`, or at this place after the last one; every process must ask there.

        Questions are numbered by steps, as those of Orbax are, which asks the same service.
        """
        self.asked = self.asked + 1 if step is None else step
        if not self.alone and not self.signal and hosts.all_stop(self.asked):
            self.signal = signal.SIGTERM
            log.warning("SIGTERM: all processes save after this step")
        return bool(self.signal)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.alone:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.signal = number
        log.warning("%s: saving after this step", signal.Signals(number).name)
