"""What is asked of a step that is compiled for devices that are not here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportConfig:
    """Compile the training step for devices that are not here, and say what it needs of them.

    Beside these flags it takes all those of scripts/train.py (see its --help), which it compiles the very step of.
    """

    json: str = ""
    """Write the report into this file too."""
    search: bool = False
    """Find the largest batch a device that fits, for each mesh and remat policy that is not given, and the best of
    them."""
    effort: float = 0.0
    """XLA's exec_time_optimization_effort, from -1 to 1: at -1 a TPU's program compiles many times faster, and takes
    other memory."""
