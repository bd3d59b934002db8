"""Times of what is compared, taken turn about on the same cores."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Measurement = Callable[[], float]
"""Measures something once."""


def milliseconds(work: Callable[[], object]) -> float:
    """How long it takes once."""
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def alternated(ours: Measurement, baseline: Measurement, rounds: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What both measure in each round, the one first and then the other."""
    found: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        both = list(zip((ours, baseline), found, strict=True))
        for measure, values in both if i % 2 == 0 else reversed(both):
            values.append(measure())
    return tuple(found[0]), tuple(found[1])


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pinned(count: int) -> Iterator[None]:
    """This thread, and those that it starts meanwhile, on so many of its cores, where the system can (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
