"""What is asked of each measurement."""

from dataclasses import dataclass
from typing import Literal


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


@dataclass(frozen=True)
class GenerateBenchmark:
    """How fast prompts become pictures on the CPU, in float32, beside diffusers' StableDiffusionXLPipeline."""

    model: Literal["all", "tiny", "300m"] = "all"
    """Which model of random weights: by the parameters of its UNet."""
    steps: int = 5
    """Of the Euler sampler, each with guidance."""
    starts: int = 2
    """So many times each side begins anew, in turn; medians count."""
    rounds: int = 5
    """Of so many pictures a side after that, in turn; medians count."""
    json: str = ""
    """Write the figures into this file too, with those of each round."""
