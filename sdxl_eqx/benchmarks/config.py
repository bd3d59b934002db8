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


@dataclass(frozen=True)
class AttentionBenchmark:
    """How fast attention is at the shapes of SDXL's UNet, both passes, by all that serves on the first device here,
    beside PyTorch's scaled_dot_product_attention on the same (CPU and NVIDIA GPUs)."""

    batch: int = 8
    """Pictures."""
    side: int = 0
    """Pixels of a side of them; 0: 1024 on accelerators, 256 on a CPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on accelerators, float32 on a CPU."""
    rounds: int = 3
    """So many times each side begins anew, in turn; medians count."""
    json: str = ""
    """Write the figures into this file too, with those of each round."""


@dataclass(frozen=True)
class StepBenchmark:
    """How fast the training step is on one device, on latents and text that are encoded already, beside the same UNet
    of diffusers in PyTorch on the same (channels last, autocast, torch.compile, fused AdamW; CPU and NVIDIA GPUs)."""

    model: Literal["auto", "tiny", "300m", "sdxl"] = "auto"
    """Of random weights; auto: SDXL's on accelerators, tiny on a CPU."""
    batch: int = 8
    """Pictures in a step."""
    their_batch: int = 0
    """Those in a step of PyTorch, where it holds fewer or more; 0: as many. Seconds an image are compared."""
    side: int = 0
    """Pixels of a side of them; 0: what the model is for."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the computation; auto: bfloat16 on accelerators, float32 on a CPU."""
    remat_policy: Literal["auto", "none", "dots", "attention", "full", "offload"] = "auto"
    """Ours."""
    their_checkpointing: bool = False
    """Gradient checkpointing in PyTorch, which saves memory as remat_policy full does; without it SDXL holds about 5
    images on 80 GB."""
    their_compile: bool = True
    """torch.compile; without it PyTorch runs eagerly."""
    steps: int = 30
    """In a round, after two that are not counted."""
    rounds: int = 2
    """So many times each side begins anew, in turn; medians count."""
    json: str = ""
    """Write the figures into this file too, with those of each round."""
