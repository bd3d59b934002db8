"""The largest batch that fits devices that are not here, over meshes and remat policies, and the best of them."""

import dataclasses
import logging
from collections.abc import Callable

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.config.shared import MESH_AXES
from sdxl_eqx.training.ahead import DoesNotFit, Report, Target
from sdxl_eqx.training.memory import BY_RECOMPUTATION

log = logging.getLogger("sdxl_eqx")

MOST = 4096
"""Images a device beyond which nobody looks for more."""

SHARES = 16
"""Chips that share weights in larger slices. Of 1280 columns in 256 shares each has 5, and libtpu (0.0.42.1) gathers
and scatters most of those by all-reduces of whole arrays: it sends 26 GB in a step of SDXL, and 17 with 16 shares."""

TRIES = 6
"""Programs compiled from one that fits on, for each mesh and policy."""


class _Once(logging.Filter):
    """Lets every message pass once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it was not said yet."""
        message = record.getMessage()
        is_new = message not in self.said
        self.said.add(message)
        return is_new


def search(target: Target, keep: Callable[[list[Report]], None] = lambda found: None) -> list[Report]:
    """The largest batch of each mesh and policy worth trying, the best first; those that do not fit come last.

    `keep` is given them as they are found.

    Raises:
        ValueError: where none fits.
    """
    found: list[Report] = []
    refused = None
    once = _Once()  # what is said of attention would be said for each program
    log.addFilter(once)
    try:
        for config in _worth_trying(target):
            try:
                found.append(_largest(target, config))
                found.sort(key=lambda one: (not one.fits, one.image_seconds))
                keep(found)
            except ValueError as error:
                refused = error
                log.info("%s", error)
    finally:
        log.removeFilter(once)
    if not found and refused is not None:
        raise refused
    return found


def _worth_trying(target: Target) -> list[TrainConfig]:
    """Meshes and policies that the config leaves open: data, fsdp or both over all devices, and all that keep less."""
    config, count = target.config, len(target.devices)
    parallel, attention = config.parallel, config.attention
    sizes = [(axis, getattr(parallel, f"ici_{axis}_parallelism")) for axis in MESH_AXES]
    is_open = count > 1 and all(size == (-1 if axis == "data" else 1) for axis, size in sizes)
    meshes = [parallel]
    if is_open:
        meshes.append(dataclasses.replace(parallel, ici_data_parallelism=1, ici_fsdp_parallelism=-1))
    if is_open and target.chip.hardware == "tpu" and count > SHARES and count % SHARES == 0:
        meshes.append(dataclasses.replace(parallel, ici_fsdp_parallelism=SHARES))
    policies = BY_RECOMPUTATION if attention.remat_policy == "auto" else (attention.remat_policy,)
    return [
        dataclasses.replace(config, parallel=mesh, attention=dataclasses.replace(attention, remat_policy=policy))
        for mesh in meshes
        for policy in policies
    ]


def _largest(target: Target, config: TrainConfig) -> Report:
    """The report of the largest batch that fits: lines through two reports, until one that is verified.

    Raises:
        ValueError: where the compiler refuses one image a device, or fails.
    """
    limit = target.chip.limit

    def compiled(batch: int) -> Report | None:
        """None where the compiler refuses for want of memory; any other failure says nothing of the batch."""
        optim = dataclasses.replace(config.optim, per_device_batch_size=float(batch))
        try:
            return target.compiled(dataclasses.replace(config, optim=optim))
        except DoesNotFit as error:
            if batch == 1:
                raise
            log.info("%s", error)
            return None

    batch = max(target.estimate(config) // 2, 1)
    low, high, high_batch = compiled(batch), None, MOST
    while low is None or not low.fits:
        if batch == 1:
            assert low is not None
            return low
        high, high_batch = low, batch
        batch //= 2
        low = compiled(batch)
    for _ in range(TRIES):
        # What a compiler saves only when it must makes no line: each step is at most a doubling.
        batch = min(_by_a_line(low, high, limit), 2 * int(low.per_device_batch_size), high_batch - 1)
        if batch <= low.per_device_batch_size:
            break
        found = compiled(batch)
        if found is not None and found.fits:
            low, high = found, high if high is not None and not high.fits else low
        else:
            high, high_batch = found, batch
    return low


def _by_a_line(low: Report, high: Report | None, limit: int) -> int:
    """The batch a device at which a line through two reports reaches the limit; twice the lower one's without both."""
    small = int(low.per_device_batch_size)
    if high is None or high.per_device_batch_size == small or high.peak_bytes <= low.peak_bytes:
        return 2 * small
    slope = (high.peak_bytes - low.peak_bytes) / (high.per_device_batch_size - small)
    return int(small + (limit - low.peak_bytes) / slope)
