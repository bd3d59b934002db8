"""What ends a run, said with its reason, what is safe and what to do."""

import logging
from collections.abc import Callable
from typing import TypeVar

from sdxl_eqx.training.checkpoint import NotSaved
from sdxl_eqx.training.setup import Run

log = logging.getLogger("sdxl_eqx")

T = TypeVar("T")


class RunError(Exception):
    """The run cannot go on; the message says why, what is safe and what to do."""


def last_good(run: Run) -> str:
    """Which checkpoint is safe, in a sentence."""
    try:
        run.checkpoints.wait_here()  # what is said of an error may be said by one process alone
    except NotSaved as error:
        log.error("%s", error)
    step = run.checkpoints.latest()
    return "No checkpoint was written." if step is None else f"The last good checkpoint is that of step {step}."


def explain(error: Exception, run: Run, *, doing: str = "training") -> Exception:
    """What is to be raised in place of an error of JAX: what did not fit, and what to do."""
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
        return error
    batch, remat = run.config.optim.per_device_batch_size, run.program.compute.remat
    what = (
        f"--per-device-batch-size {batch:g} with --remat-policy {remat} does not fit. Halve the batch, use "
        "--remat-policy full, or share the weights with --ici-fsdp-parallelism."
        if doing == "training"
        else f"{doing} of --resolution {run.config.data.resolution} does not fit beside the state; share the weights "
        "with --ici-fsdp-parallelism, take smaller --moments-dtype bfloat16, or a lower resolution."
    )
    return RunError(f"out of memory: {what} {last_good(run)} ({str(error).splitlines()[0][:200]})")


def explained(get: Callable[[], T], run: Run) -> T:
    """`get()`, or what is wrong with the data and the last good checkpoint."""
    try:
        return get()
    except ValueError as error:
        raise RunError(f"{error} {last_good(run)}") from error
