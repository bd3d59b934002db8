"""What `scripts/generate.py` is asked for, and the rules that it keeps."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from sdxl_eqx.config.rules import (
    Flat,
    Rule,
    attention_rules,
    check,
    lora_rules,
    mesh_rules,
    prompt_rules,
    scheduler_rules,
)
from sdxl_eqx.config.shared import (
    AttentionKernelConfig,
    DiffusionSchedulerConfig,
    FlashBlockSizes,
    Floats,
    LoadedConfig,
    LoraConfig,
    MachineConfig,
    MeshConfig,
    ModelSourceConfig,
    PromptConfig,
)

Pair = tuple[int, int] | None
"""Two sides or coordinates in pixels."""

Span = tuple[float, float]
"""From one fraction of the steps to another."""


@dataclass(frozen=True)
class GenerateModelConfig(ModelSourceConfig):
    """The model and how it computes."""

    vae_checkpoint: str = ""
    """Another VAE to put in: diffusers folder, .safetensors file or Hub id."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the VAE computes; in float16 SDXL's own overflows."""
    hf_access_token: str = field(default="", repr=False)
    """Token for the Hub; '' takes HF_TOKEN from the environment. Never logged or saved."""


@dataclass(frozen=True)
class PictureConfig(PromptConfig):
    """What is drawn, and how closely it follows the prompt."""

    prompt: str = PromptConfig.prompt
    """What is to be seen."""
    prompt_2: str = ""
    """Prompt of the second text encoder; '' is the same as the first's."""
    negative_prompt_2: str = ""
    """Negative prompt of the second text encoder; '' is the same as the first's."""
    prompts_file: str = ""
    """Text file with a prompt a line, which may end in --n NEGATIVE --w WIDTH --h HEIGHT --d SEED --s STEPS --l SCALE;
    or .jsonl. It takes the place of prompt."""
    caption_chunks: int = 1
    """A prompt may have so many times 75 tokens, encoded in chunks; what is longer is cut."""
    num_images_per_prompt: int = 1
    """Pictures of each prompt, with seed, seed + 1 and on."""
    width: int = 0
    """Pixels, a multiple of 8; 0 is the model's own."""
    height: int = 0
    """Pixels, a multiple of 8; 0 is the model's own."""
    original_size: Pair = None
    """(height, width) that the model is told the picture had; by default its own."""
    crops_coords_top_left: Pair = None
    """(top, left) that the model is told it was cropped at; by default (0, 0)."""
    target_size: Pair = None
    """(height, width) that the model is told the picture has; by default its own."""
    negative_original_size: Pair = None
    """original_size of the negative prompt; by default the same."""
    negative_crops_coords_top_left: Pair = None
    """crops_coords_top_left of the negative prompt; by default the same."""
    negative_target_size: Pair = None
    """target_size of the negative prompt; by default the same."""
    guidance_interval: Span = (0.0, 1.0)
    """Steps, as fractions of all, within which guidance is on (Kynkaanniemi et al. 2024)."""
    eta: float = 0.0
    """Fresh noise at each step of DDIM, from 0 (none) to 1 (as much as DDPM)."""
    image: str = ""
    """Picture to begin from: path or URL."""
    strength: float = 0.0
    """Share of the steps that are drawn over it; 0 is 0.3, with a mask 0.9999."""
    mask_image: str = ""
    """Picture that is white where the picture is to be painted anew."""
    refiner_model_name_or_path: str = ""
    """SDXL's refiner, which draws the last steps."""
    refiner_fraction: float = 0.2
    """Share of the steps that the refiner draws."""
    aesthetic_score: float = 6.0
    """That the refiner is told of."""
    negative_aesthetic_score: float = 2.5
    """That the refiner is told of with the negative prompt."""
    control_guidance_start: Floats = None
    """Fraction of the steps from which each ControlNet takes part; 0 by default."""
    control_guidance_end: Floats = None
    """Fraction of the steps up to which each ControlNet takes part; 1 by default."""
    controlnet_canny: bool = False
    """Draw the edges of each controlnet_image first (Canny 1986)."""
    canny_low: int = 100
    """Least gradient of an edge's continuation."""
    canny_high: int = 200
    """Least gradient of an edge's beginning."""


@dataclass(frozen=True)
class OutputConfig:
    """Where pictures go and how many are drawn at once."""

    images_dir: str = "outputs/images"
    """Folder of the pictures, which are numbered on from the highest number there."""
    grid: bool = False
    """One sheet of all pictures besides."""
    batch_size: int = 0
    """Pictures drawn at once; 0 is one a device."""
    vae_tile: int = 0
    """Decode in tiles of so many pixels; 0 does so, in tiles of 512, for pictures of more than 2048 x 2048."""


@dataclass(frozen=True)
class GenerateConfig:
    """Draw pictures with Stable Diffusion XL."""

    machine: Annotated[MachineConfig, Flat] = field(default_factory=MachineConfig)
    model: Annotated[GenerateModelConfig, Flat] = field(default_factory=GenerateModelConfig)
    attention: Annotated[AttentionKernelConfig, Flat] = field(default_factory=AttentionKernelConfig)
    flash_block_sizes: FlashBlockSizes = field(default_factory=FlashBlockSizes)
    diffusion_scheduler_config: DiffusionSchedulerConfig = field(default_factory=DiffusionSchedulerConfig)
    picture: Annotated[PictureConfig, Flat] = field(default_factory=PictureConfig)
    lora_config: LoraConfig = field(default_factory=LoraConfig)
    loaded: Annotated[LoadedConfig, Flat] = field(default_factory=LoadedConfig)
    parallel: Annotated[MeshConfig, Flat] = field(default_factory=MeshConfig)
    output: Annotated[OutputConfig, Flat] = field(default_factory=OutputConfig)

    def check(self) -> None:
        """Check everything that needs neither file nor device.

        Raises:
            ValueError: with the flag, its value, the rule and what to do.
        """
        check(self, generate_rules(self))


def generate_rules(config: GenerateConfig) -> list[Rule]:
    """Every rule, in the order of the flags."""
    picture, loaded, output = config.picture, config.loaded, config.output
    side = "must be a multiple of 8, or 0 for the model's own"
    low, high = picture.guidance_interval
    nets = len(loaded.controlnet_model_name_or_path or ())
    each = f"must be one for all, or one for each of the {nets} of --controlnet-model-name-or-path"

    def fits(values: tuple[object, ...] | None) -> bool:
        return values is None or len(values) in (1, nets)

    def is_fraction(values: tuple[float, ...] | None) -> bool:
        return values is None or all(0 <= value <= 1 for value in values)

    def are_finite(values: tuple[float, ...] | None) -> bool:
        return values is None or all(map(math.isfinite, values))

    sizes = ("original_size", "target_size", "negative_original_size", "negative_target_size")
    return [
        ("seed", "must be 0 or more and below 2**32", 0 <= config.machine.seed < 2**32),
        *attention_rules(config.attention, config.flash_block_sizes),
        *scheduler_rules(config.diffusion_scheduler_config),
        *prompt_rules(picture),
        ("caption_chunks", "must be 1 or more", picture.caption_chunks >= 1),
        ("num_images_per_prompt", "must be 1 or more", picture.num_images_per_prompt >= 1),
        ("width", side, picture.width >= 0 and picture.width % 8 == 0),
        ("height", side, picture.height >= 0 and picture.height % 8 == 0),
        *((key, "must be above 0", min(getattr(picture, key) or (1, 1)) > 0) for key in sizes),
        ("guidance_interval", "must be two numbers from 0 to 1, the second not less", 0 <= low <= high <= 1),
        ("eta", "must be from 0 to 1", 0 <= picture.eta <= 1),
        ("strength", "must be above 0 and at most 1, or 0 for the usual one", 0 <= picture.strength <= 1),
        ("mask_image", "give the picture it belongs to with --image",
         bool(picture.image or picture.prompts_file) or not picture.mask_image),
        ("refiner_fraction", "must be above 0 and below 1", 0 < picture.refiner_fraction < 1),
        ("aesthetic_score", "must be a finite number", math.isfinite(picture.aesthetic_score)),
        ("negative_aesthetic_score", "must be a finite number", math.isfinite(picture.negative_aesthetic_score)),
        ("control_guidance_start", f"{each}, from 0 to 1",
         fits(picture.control_guidance_start) and is_fraction(picture.control_guidance_start)),
        ("control_guidance_end", f"{each}, from 0 to 1",
         fits(picture.control_guidance_end) and is_fraction(picture.control_guidance_end)),
        ("control_guidance_end", "must be above --control-guidance-start, or its ControlNet takes no part",
         not nets or all(start < end for start, end in _control_spans(picture))),
        ("canny_low", "must be 0 or more", picture.canny_low >= 0),
        ("canny_high", "must not be less than --canny-low", picture.canny_high >= picture.canny_low),
        *lora_rules(config.lora_config),
        ("lightning_ckpt", "name its file, as sdxl_lightning_4step_unet.safetensors",
         bool(loaded.lightning_ckpt) or not loaded.lightning_repo),
        ("controlnet_conditioning_scale", f"{each}, and finite",
         fits(loaded.controlnet_conditioning_scale) and are_finite(loaded.controlnet_conditioning_scale)),
        ("controlnet_image", f"give a picture; {each}" if nets else "name a --controlnet-model-name-or-path for it",
         bool(loaded.controlnet_image) == bool(nets) and fits(loaded.controlnet_image)),
        *mesh_rules(config.parallel),
        ("batch_size", "must be 0 (one a device) or more", output.batch_size >= 0),
        ("vae_tile", "must be a multiple of 64 of at least 128, or 0",
         output.vae_tile == 0 or (output.vae_tile >= 128 and output.vae_tile % 64 == 0)),
    ]  # fmt: skip


def _control_spans(picture: PictureConfig) -> list[Span]:
    """From where to where each ControlNet takes part."""
    starts, ends = picture.control_guidance_start or (0.0,), picture.control_guidance_end or (1.0,)
    n = max(len(starts), len(ends))
    starts, ends = (values * n if len(values) == 1 else values for values in (starts, ends))
    return list(zip(starts, ends, strict=False))  # other lengths are another rule's
