"""Where figures go: the log, and a file that says which machine and versions they are of."""

import dataclasses
import json
import logging
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdxl_eqx.benchmarks.figures import Figure, table
from sdxl_eqx.benchmarks.timing import cores

log = logging.getLogger("sdxl_eqx")


def check_counts(**counts: int) -> None:
    """Check that flags which count something are at least 1.

    Raises:
        ValueError: with the flag.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1.")


def results_file(name: str) -> Path | None:
    """The file of `--json`, if there is to be one; before anything is measured.

    Raises:
        ValueError: where it cannot be one.
    """
    if not name:
        return None
    file = Path(name).absolute()
    if not file.parent.is_dir() or file.is_dir():
        raise ValueError(f"--json {name}: must be a file in a folder that is there.")
    return file


def load_average() -> float | None:
    """How busy the machine is with other things, where the system says; to be asked before it is busy with this."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def of_now(figures: Sequence[Figure], load: float | None) -> list[Figure]:
    """Figures that say so where the machine was busy with other things: threads that wait for each other stand still
    then, so that one side may lose much more than the other."""
    if load is None or load <= cores() / 2:
        return list(figures)
    return [dataclasses.replace(one, note=f"the machine was busy: load {load:.1f}") for one in figures]


def publish(
    figures: list[Figure], file: Path | None, *, libraries: Sequence[str], load: float | None, **facts: Any
) -> list[Figure]:
    """Say the figures, and write them with those of each round, machine, versions of `libraries`, and other facts."""
    log.info("%s", table(figures))
    if file is None:
        return figures
    values = {
        "machine": {"system": platform.platform(), "cores": cores(), "load": load},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in libraries}},
        **facts,
        "figures": [one.to_json() for one in figures],
    }
    file.write_text(f"{json.dumps(values, indent=1)}\n", encoding="utf-8")
    return figures


def _version(name: str) -> str | None:
    """That of a library; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
