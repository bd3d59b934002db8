"""Samples that cannot be used, and the account of them."""

import logging

logger = logging.getLogger("sdxl_eqx")


class BadSample(ValueError):
    """A sample that cannot be used; `name` is what the data set calls it, `reason` is why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class BadItems:
    """The samples that could not be used, each logged once; too many of them end the run.

    Args:
        total: how many samples there are.
        max_fraction: the share of them that may be bad (ten may be in any case).
    """

    def __init__(self, total: int, max_fraction: float):
        self.total = total
        self.limit = max(10, max_fraction * total)
        self.max_fraction = max_fraction
        self.reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        """How many distinct samples were bad so far."""
        return len(self.reasons)

    @property
    def is_too_many(self) -> bool:
        """Whether more than max(10, max_fraction x all) are bad, or all are."""
        return self.count > self.limit or self.count >= self.total

    def add(self, bad: BadSample) -> None:
        """Count a bad sample, if it is a new one.

        Raises:
            ValueError: too many are bad.
        """
        if bad.name in self.reasons:
            return
        self.reasons[bad.name] = bad.reason
        logger.warning("skipped %s: %s", bad.name, bad.reason)
        if self.is_too_many:
            raise self.error()

    def error(self) -> ValueError:
        """Says how many are bad, how many may be, and which come first."""
        first = "; ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:3])
        return ValueError(
            f"{self.count} of {self.total} samples cannot be used, at most max(10, {self.max_fraction} x {self.total})"
            f" may be, and never all: {first}. Repair them, take them out of the data set, "
            "or allow more with --max-bad-fraction"
        )
