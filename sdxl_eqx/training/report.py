"""The answer to what a run would need: compiled, searched, said and written."""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from sdxl_eqx.config import ReportConfig, TrainConfig
from sdxl_eqx.parallel.collectives import Traffic, sent
from sdxl_eqx.parallel.topologies import Chip
from sdxl_eqx.training.ahead import GB, Report, Target, begin_without_devices
from sdxl_eqx.training.search import search

log = logging.getLogger("sdxl_eqx")

COLUMNS = (
    "devices", "mesh", "images a device", "remat", "computed", "arguments", "temporaries", "peak of memory, GB", "fits",
    "sent, GB", "TFLOP a step", "ideal step, s", "effort", "lower + compile, s",
)  # fmt: skip


def answer(config: TrainConfig, asked: ReportConfig) -> int:
    """The report of a command line, with its log; returns the exit code."""
    try:
        begin_without_devices(config)
        report(config, asked)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    return 0


def report(config: TrainConfig, asked: ReportConfig) -> list[Report]:
    """Compile as asked, say it, and write it; the best report comes first.

    Raises:
        ValueError: for a topology that is unknown, what the mesh cannot share, or a model that does not fit.
    """
    if not -1 <= asked.effort <= 1:
        raise ValueError(f"--effort {asked.effort:g}: must be from -1 to 1.")
    file = Path(asked.json).absolute()
    if asked.json and (not file.parent.is_dir() or file.is_dir()):
        raise ValueError(f"--json {asked.json}: must be a file in a folder that is there.")

    def keep(found: Sequence[Report]) -> None:
        values = [dataclasses.asdict(one) for one in found]
        if asked.json:
            file.write_text(f"{json.dumps(values if asked.search else values[0], indent=1)}\n", encoding="utf-8")

    target = Target.of(config, asked.effort)
    found = search(target, keep) if asked.search else [target.compiled(config)]
    keep(found)
    log.info("%s", table(found))
    if not found[0].fits:
        raise ValueError(does_not_fit(found, target.chip))
    return found


def table(found: Sequence[Report]) -> str:
    """Reports as a Markdown table."""
    rows: list[list[str]] = [list(COLUMNS)]
    for one in found:
        traffic = {kind: Traffic(**values) for kind, values in one.collectives.items()}
        rows.append([
            one.topology,
            " x ".join(f"{axis} {size}" for axis, size in one.mesh.items()) or "-",
            f"{one.per_device_batch_size:g}",
            one.remat_policy,
            f"x {one.recompute_ratio:.2f}",
            f"{one.argument_bytes / GB:.1f}",
            f"{one.temp_bytes / GB:.1f}",
            f"{one.peak_bytes / GB:.1f} of {one.chip_bytes / GB:.1f}",
            "yes" if one.fits else "no",
            f"{sent(traffic) / GB:.1f}",
            f"{one.tflop_per_step:.0f}",
            f"{one.ideal_step_seconds:.3f}",
            f"{one.effort:g}",
            f"{one.lower_seconds:.0f} + {one.compile_seconds:.0f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def does_not_fit(found: Sequence[Report], chip: Chip) -> str:
    """What is too much of the report that takes least, and what would fit."""
    one = min(found, key=lambda report: report.peak_bytes)
    batch, shares = one.per_device_batch_size, one.mesh.get("data", 1) * one.mesh.get("fsdp", 1)
    would = []
    if batch * one.devices > shares:
        would.append("lower --per-device-batch-size (--search finds the largest)")
    if one.remat_policy != "full":
        would.append("use --remat-policy full")
    if one.mesh.get("data", 1) > 1:
        would.append("share weights and optimizer by --ici-fsdp-parallelism -1 --ici-data-parallelism 1")
    if not would:
        room = chip.limit - (one.peak_bytes - one.argument_bytes)
        enough = math.ceil(one.argument_bytes * one.devices / room) if room > 0 else 0
        would.append(f"take {enough} of these devices or more, by fsdp" if enough else "take larger devices")
        would.append("or --moments-dtype bfloat16")
    return (
        f"--compile-topology {one.topology}: {batch:g} images a device with --remat-policy {one.remat_policy} take "
        f"{one.peak_bytes / GB:.1f} GB, and of {chip.memory / GB:.1f} it may fill {chip.limit / GB:.1f}; "
        f"{', '.join(would)}."
    )
