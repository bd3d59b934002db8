"""What was measured, beside what it is compared to and what is asked of it."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = ("", "ours", "baseline", "ratio", "asked", "reached")


@dataclass(frozen=True)
class Figure:
    """A quantity, as each round measured it.

    What is asked holds for the ratio where there is a baseline, else for the quantity itself.
    """

    name: str
    unit: str
    rounds: tuple[float, ...]
    baseline_rounds: tuple[float, ...] = ()
    """Of what it is compared to: times, so that a ratio above 1 is in our favour."""
    least: float | None = None
    """What is asked: at least so much."""
    below: float | None = None
    """Or less than so much."""
    note: str = ""
    """Why it means little here, if it does; then it is not said whether what is asked is reached."""

    @property
    def ours(self) -> float:
        """The median round."""
        return statistics.median(self.rounds)

    @property
    def baseline(self) -> float | None:
        """The median round of what it is compared to."""
        return statistics.median(self.baseline_rounds) if self.baseline_rounds else None

    @property
    def ratio(self) -> float | None:
        """Baseline through ours."""
        return None if self.baseline is None else self.baseline / self.ours

    @property
    def asked(self) -> str:
        """What is asked, in words; '' for nothing."""
        unit = "x" if self.baseline_rounds else f" {self.unit}"
        if self.least is not None:
            return f">= {self.least:g}{unit}"
        return "" if self.below is None else f"< {self.below:g}{unit}"

    @property
    def reached(self) -> bool | None:
        """Whether that is reached; None where nothing is asked or it cannot be said here."""
        if not self.asked or self.note:
            return None
        value = self.ours if self.ratio is None else self.ratio
        return (self.least is None or value >= self.least) and (self.below is None or value < self.below)

    def to_json(self) -> dict[str, Any]:
        """Everything that is known of it."""
        derived = {name: getattr(self, name) for name in ("ours", "baseline", "ratio", "asked", "reached")}
        return {**dataclasses.asdict(self), **derived}


def table(figures: Sequence[Figure]) -> str:
    """Figures as a Markdown table."""
    rows: list[list[str]] = [list(COLUMNS)]
    for one in figures:
        reached = one.note or {True: "yes", False: "no", None: ""}[one.reached]
        baseline = "" if one.baseline is None else _said(one.baseline, one.unit)
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}x"
        rows.append([one.name, _said(one.ours, one.unit), baseline, ratio, one.asked, reached])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _said(value: float, unit: str) -> str:
    """Three digits at least."""
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"
