"""What is asked of each measurement."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataBenchmark:
    """How fast pictures become batches: JPEGs beside plain Pillow, two threads beside one, a cache by itself."""

    photos: str = ""
    """Folder of photographs, of which the first few are taken, scaled to the sizes that are measured; without it noise
    with the spectrum of photographs."""
    json: str = ""
    """Write the figures into this file too, with those of each round."""
    rounds: int = 5
    """So many times everything is measured, in turn with what it is compared to; medians count."""
