"""A model that is loaded once and draws many pictures."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from sdxl_eqx.config import GenerateConfig, flag
from sdxl_eqx.flags import GENERATE_NAMES, merge
from sdxl_eqx.generation.distilled import FewSteps, as_asked
from sdxl_eqx.generation.load import lay_out, lora_files, read_controlnets, read_parts, with_loras
from sdxl_eqx.generation.memory import drawing_remedies, fitting, loading_remedies
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.models.controlnet import ControlNet
from sdxl_eqx.parallel.computing import attention_compute, encoding_compute
from sdxl_eqx.parallel.devices import check_dtype, choose_hardware
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.sampling import control_image
from sdxl_eqx.sampling.conditioning import Prompt
from sdxl_eqx.sampling.drawing import Drawing
from sdxl_eqx.sampling.pipeline import Begun, Hint, Manner, Models, generate

log = logging.getLogger("sdxl_eqx")

TILED_FROM = 2048 * 2048
"""Pixels above which pictures are decoded in tiles, where nothing else is asked for."""

TILE = 512

CHOSEN = tuple(key for key, name in GENERATE_NAMES.items() if get_origin(name.type) is Literal)
"""Flags that take one of some words."""

Picture = UInt8[np.ndarray, "_ _ 3"]
Mask = UInt8[np.ndarray, "_ _"]
"""Of any size: what is given is scaled to the size that is drawn."""


@dataclass
class Pipeline:
    """A model on the devices, ready to draw.

    ```python
    from sdxl_eqx.generation import Pipeline

    pipeline = Pipeline.load("stabilityai/stable-diffusion-xl-base-1.0")
    pictures = pipeline("a castle in the forest", seeds=[0, 1], num_inference_steps=30)
    ```
    """

    config: GenerateConfig
    parts: ModelParts
    """Of the model without LoRAs that were given here."""
    models: Models
    controlnets: list[ControlNet]
    layout: Layout
    drawing: Drawing
    """How it draws on these devices."""
    few: FewSteps | None = None
    """How the model is drawn with that --lightning-repo names."""

    @classmethod
    def load(cls, name: str, **flags: Any) -> "Pipeline":
        """A model by what `--pretrained-model-name-or-path` takes; `flags` are those of `scripts/generate.py`, such as
        `activations_dtype="float32"`.

        Raises:
            ValueError: where the flags or the model are wrong, naming the flag and the remedy.
            TypeError: for a flag that there is not.
        """
        unknown = flags.keys() - GENERATE_NAMES.keys()
        if unknown:
            raise TypeError(f"Pipeline.load has no {', '.join(sorted(unknown))}; scripts/generate.py --help lists all")
        for key, choices in ((key, get_args(GENERATE_NAMES[key].type)) for key in flags if key in CHOSEN):
            if flags[key] not in choices:
                raise ValueError(f"{flag(key)} {flags[key]!r}: must be one of {', '.join(map(repr, choices))}")
        config = merge(GenerateConfig(), {"pretrained_model_name_or_path": name, **flags})
        _check(config)
        return cls.of(config)

    @classmethod
    def of(cls, config: GenerateConfig) -> "Pipeline":
        """The model of a checked config.

        Raises:
            ValueError: where the model is wrong, naming the flag and the remedy.
            OutOfMemory: where it does not fit the devices.
        """
        with fitting("the model", loading_remedies(config)):
            return cls._of(config)

    @classmethod
    def _of(cls, config: GenerateConfig) -> "Pipeline":
        devices = choose_hardware(config.machine.hardware)
        check_dtype(devices, config.model.activations_dtype)
        parts, few = read_parts(config)
        if few is not None:
            config = as_asked(config, few)
        layout = Layout(make_mesh(config.parallel, devices), config.parallel.logical_axis_rules)
        layout.check()
        models = lay_out(parts, config, layout)
        drawing = Drawing(
            jnp.dtype(config.model.activations_dtype),
            attention_compute(config, parts.unet, layout),
            encoding_compute(config, layout),
            layout if layout.mesh.size > 1 else None,
            jnp.dtype(config.model.vae_dtype),
        )
        return cls(config, parts, models, read_controlnets(config, parts, layout), layout, drawing, few)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of pictures where nothing else is asked for."""
        own = self.parts.unet.sample_size * self.parts.vae.downscale
        return self.config.picture.height or own, self.config.picture.width or own

    def with_loras(self, loras: Mapping[str, float]) -> "Pipeline":
        """This pipeline with other LoRAs, by path or Hub id of each and its strength; {} draws without any.

        They are merged anew into the weights of the model as it was loaded, in float32.

        Raises:
            ValueError: for what is no LoRA of this model.
            OutOfMemory: where it does not fit beside this one.
        """
        asked = dataclasses.replace(
            self.config.lora_config, lora_model_name_or_path=tuple(loras) or None, scale=tuple(loras.values()) or None,
            weight_name=None, adapter_name=None,
        )  # fmt: skip
        files = lora_files(asked, token=self.config.model.hf_access_token)
        config = dataclasses.replace(self.config, lora_config=asked)
        bare = dataclasses.replace(self.config, lora_config=type(asked)())
        parts = with_loras(read_parts(bare)[0], files)
        with fitting("the model", loading_remedies(config)):
            models = lay_out(parts, config, self.layout)
        return dataclasses.replace(self, config=config, parts=parts, models=models)

    def __call__(
        self,
        prompt: str | Prompt | Sequence[str | Prompt],
        *,
        seeds: int | Sequence[int] | None = None,
        image: Picture | None = None,
        mask: Mask | None = None,
        hints: Sequence[Picture] = (),
        **changes: Any,
    ) -> UInt8[np.ndarray, "b H W 3"]:
        """Pictures from 0 to 255, one for each of the prompts and seeds (one prompt may have several seeds).

        Args:
            prompt: what to draw; a `Prompt` says more of each.
            seeds: of each picture; by default the seed of the config, plus 1 for each further picture.
            image: a picture to begin from, scaled to the size that is drawn.
            mask: white where `image` is to be painted anew.
            hints: what each ControlNet sees.
            changes: fields of `config.picture`, such as width, height, num_inference_steps, guidance_scale, strength.

        Raises:
            ValueError: for values that break a rule, naming the flag and the rule.
            OutOfMemory: where the pictures do not fit the devices, with what would.
        """
        picture = dataclasses.replace(self.config.picture, **changes)
        config = dataclasses.replace(self.config, picture=picture)
        _check(config)
        texts = [prompt] if isinstance(prompt, str | Prompt) else list(prompt)
        if seeds is None:
            seeds = range(config.machine.seed, config.machine.seed + len(texts))
        wanted = [seeds] if isinstance(seeds, int) else list(seeds)
        texts = texts * len(wanted) if len(texts) == 1 else texts
        if len(texts) != len(wanted):
            raise ValueError(f"{len(wanted)} seeds for {len(texts)} prompts; give one for each.")
        prompts = [text if isinstance(text, Prompt) else prompt_of(config, text) for text in texts]
        size = dataclasses.replace(self, config=config).size
        return self.draw(config, prompts, wanted, size, image=image, mask=mask, hints=hints)

    def draw(
        self,
        config: GenerateConfig,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        size: tuple[int, int],
        *,
        image: Picture | None = None,
        mask: Mask | None = None,
        hints: Sequence[Picture] = (),
    ) -> UInt8[np.ndarray, "b H W 3"]:
        """One batch of pictures; it is filled up to what the devices share, so that one program serves all.

        Raises:
            ValueError: where there is not one hint for each ControlNet, or a mask without a picture.
            OutOfMemory: where the pictures do not fit the devices, with what would.
        """
        if len(hints) != len(self.controlnets):
            raise ValueError(f"{len(hints)} pictures for {len(self.controlnets)} ControlNets; give one for each.")
        if mask is not None and image is None:
            raise ValueError("a mask needs the picture that it belongs to.")
        picture, drawing = config.picture, self.drawing
        shares = drawing.shares
        count = -(-len(prompts) // shares) * shares
        filled = [min(i, len(prompts) - 1) for i in range(count)]
        tile = config.output.vae_tile or (TILE if size[0] * size[1] > TILED_FROM else 0)
        begun = None if image is None else _begun(image, mask, size, picture.strength, count)
        manner = self.manner(config)
        shown = f"{count} {'picture' if count == 1 else 'pictures at once'} of {size[1]}x{size[0]}"
        with fitting(shown, drawing_remedies(self.config, count=count, shares=shares, tile=tile)):
            pictures = generate(
                self.models, [prompts[i] for i in filled], [seeds[i] for i in filled], size, manner,
                dataclasses.replace(drawing, tile=tile), begun=begun, hints=self._hints(config, hints, size, count),
            )  # fmt: skip
        return pictures[: len(prompts)]

    def manner(self, config: GenerateConfig) -> Manner:
        """How pictures of a config are drawn.

        Raises:
            ValueError: where --eta is asked of a model whose own sampler is not DDIM.
        """
        picture, scheduler = config.picture, self.models.scheduler.name
        # Of a sampler that is asked for by its name, the command line has said that --eta has no effect.
        if picture.eta and scheduler != "DDIMScheduler" and not config.diffusion_scheduler_config.class_name:
            raise ValueError(
                f"--eta {picture.eta:g}: the model's own sampler is {scheduler}, which has none; add "
                "--diffusion-scheduler-config._class-name DDIM, or leave it out."
            )
        few = self.few if self.few and self.few.scheduler["_class_name"] == scheduler else None
        timesteps = few.timesteps if few and picture.num_inference_steps == few.steps else ()
        return Manner(
            steps=picture.num_inference_steps,
            guidance_scale=picture.guidance_scale if picture.do_classifier_free_guidance else 1.0,
            guidance_rescale=picture.guidance_rescale,
            guidance_interval=picture.guidance_interval,
            eta=picture.eta,
            timesteps=timesteps,
        )

    def _hints(
        self, config: GenerateConfig, pictures: Sequence[Picture], size: tuple[int, int], count: int
    ) -> list[Hint]:
        picture, n = config.picture, len(pictures)
        scales = each(config.loaded.controlnet_conditioning_scale, 0.5, n)
        starts, ends = each(picture.control_guidance_start, 0.0, n), each(picture.control_guidance_end, 1.0, n)
        hints = []
        for net, shown, scale, start, end in zip(self.controlnets, pictures, scales, starts, ends, strict=True):
            if picture.controlnet_canny:
                shown = control_image.canny(shown, picture.canny_low, picture.canny_high)
            pixels = control_image.control_pixels(shown, size)
            hints.append(Hint(net, np.repeat(pixels[None], count, axis=0), scale, start, end))
        return hints


def _check(config: GenerateConfig) -> None:
    """Check a config for pictures that come as arrays, so that no flag has to name what a ControlNet sees."""
    loaded = config.loaded
    if loaded.controlnet_model_name_or_path and not loaded.controlnet_image:
        loaded = dataclasses.replace(loaded, controlnet_image=("an array",))
    dataclasses.replace(config, loaded=loaded).check()


def prompt_of(config: GenerateConfig, text: str) -> Prompt:
    """A prompt with what a config says of all of them."""
    p = config.picture
    return Prompt(
        text, p.negative_prompt or None, p.prompt_2, p.negative_prompt_2, p.original_size,
        p.crops_coords_top_left or (0, 0), p.target_size, p.negative_original_size, p.negative_crops_coords_top_left,
        p.negative_target_size, p.aesthetic_score, p.negative_aesthetic_score,
    )  # fmt: skip


def each(values: Sequence[float] | None, default: float, n: int) -> list[float]:
    """One value for each of n: those given, or the one for all."""
    given = list(values or [default])
    return given * n if len(given) == 1 else given


def strength_of(strength: float, *, has_mask: bool) -> float:
    """How much of a picture is drawn anew; 0 is what diffusers' pipelines take."""
    return strength or (0.9999 if has_mask else 0.3)


def _begun(image: Picture, mask: Mask | None, size: tuple[int, int], strength: float, count: int) -> Begun:
    pixels = control_image.init_pixels(image, size)
    seen = None if mask is None else np.repeat(control_image.mask_pixels(mask, size)[None], count, axis=0)
    return Begun(np.repeat(pixels[None], count, axis=0), strength_of(strength, has_mask=mask is not None), seen)
