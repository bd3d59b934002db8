"""The largest batch that fits devices that are not here, over meshes and remat policies, and the best of them."""

import dataclasses
import logging

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.config.groups import MESH_AXES
from sdxl_eqx.training.ahead import Report, Target
from sdxl_eqx.training.memory import BY_RECOMPUTATION

log = logging.getLogger("sdxl_eqx")

MOST = 4096
"""Images a device beyond which nobody looks for more."""


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


def search(target: Target) -> list[Report]:
    """The largest batch of each mesh and policy worth trying, the best first; those that do not fit come last.

    Raises:
        ValueError: where none fits.
    """
    found = []
    refused = None
    once = _Once()  # what is said of attention would be said for each program
    log.addFilter(once)
    try:
        for config in _worth_trying(target):
            try:
                found.append(_largest(target, config))
            except ValueError as error:
                refused = error
                log.info("%s", error)
    finally:
        log.removeFilter(once)
    if not found and refused is not None:
        raise refused
    return sorted(found, key=lambda one: (not one.fits, one.image_seconds))


def _worth_trying(target: Target) -> list[TrainConfig]:
    """Meshes and policies that the config leaves open: data or fsdp over all devices, and all that keep less."""
    config, count = target.config, len(target.devices)
    parallel, attention = config.parallel, config.attention
    sizes = [(axis, getattr(parallel, f"ici_{axis}_parallelism")) for axis in MESH_AXES]
    is_open = count > 1 and all(size == (-1 if axis == "data" else 1) for axis, size in sizes)
    shared = dataclasses.replace(parallel, ici_data_parallelism=1, ici_fsdp_parallelism=-1)
    meshes = [parallel, shared] if is_open else [parallel]
    policies = BY_RECOMPUTATION if attention.remat_policy == "auto" else (attention.remat_policy,)
    return [
        dataclasses.replace(config, parallel=mesh, attention=dataclasses.replace(attention, remat_policy=policy))
        for mesh in meshes
        for policy in policies
    ]


def _largest(target: Target, config: TrainConfig) -> Report:
    """The report of the largest batch that fits: a line through two, then one or more that verify it.

    Raises:
        ValueError: where the compiler refuses one image a device.
    """
    known: dict[int, Report | None] = {}

    def compiled(batch: int) -> Report | None:
        """None where the compiler refuses."""
        if batch not in known:
            optim = dataclasses.replace(config.optim, per_device_batch_size=float(batch))
            try:
                known[batch] = target.compiled(dataclasses.replace(config, optim=optim))
            except ValueError:
                if batch == 1:
                    raise
                known[batch] = None
        return known[batch]

    def fits(batch: int) -> bool:
        one = compiled(batch)
        return one is not None and one.fits

    guess = target.estimate(config)
    small = max(guess // 2, 1)
    while small > 1 and not fits(small):
        small //= 2
    if (first := compiled(small)) is not None and not first.fits:
        return first
    large = max(min(guess, 2 * small), small + 1)
    while large > small + 1 and compiled(large) is None:
        large = (small + large) // 2
    best = _by_a_line(compiled(small), compiled(large), target.chip.limit)
    while not fits(best):
        best -= 1
    # Where the compiler saves memory only when it must, the line was too steep: once more, from nearer.
    further = _by_a_line(compiled(small), compiled(best), target.chip.limit)
    if further > best and fits(further):
        best = further
    found = known[best]
    assert found is not None
    return found


def _by_a_line(low: Report | None, high: Report | None, limit: int) -> int:
    """The batch a device at which a line through two reports reaches the limit; at least that of the lower one."""
    assert low is not None
    small = int(low.per_device_batch_size)
    if high is None or high.per_device_batch_size == small:
        return small
    slope = max((high.peak_bytes - low.peak_bytes) / (high.per_device_batch_size - small), 1.0)
    return min(max(int(small + (limit - low.peak_bytes) / slope), small), MOST)
