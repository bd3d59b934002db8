"""One page of pictures: every way to draw, ours beside diffusers', from the export of a finished run.

    JAX_PLATFORMS=cpu PYTHONPATH=tests python tests/generation/side_by_side.py RUN/export PAGE.png [--steps 20]

needs PyTorch and diffusers (`pip install -e '.[dev]'`). LoRA, ControlNet and refiner are small random ones that are
made for the model; they leave no picture as it is, and the same on either side. Under each pair stands the largest
difference in levels, of 255; the exit code is 1 where one is above 2.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import parity_torch as theirs
import small_models as small
import twins
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

from sdxl_eqx.models.controlnet import ControlNetConfig
from sdxl_eqx.models.unet import UNetConfig

PROMPT, SEED = "a photo of a red circle", [5]
EULER, DPM, DDIM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"
ZOOM, MARGIN, LINE, PAIRS = 2, 10, 30, 4

Pair = tuple[twins.Drawn, twins.Drawn]


class Pairs:
    """Each way to draw with one model, by its name on the page."""

    def __init__(self, folder: Path, work: Path, steps: int) -> None:
        self.folder, self.work = folder, work
        self.pipe = twins.load_theirs("StableDiffusionXLPipeline", folder)
        self.base = twins.load_ours(folder)
        side = 2 * self.base.size[0]
        self.size = (side, side)
        self.common = {"num_inference_steps": steps, "guidance_scale": 5.0}
        self.sides = {"height": side, "width": side}
        self.unet = self.base.parts.unet

    def all(self) -> dict[str, Callable[[], Pair]]:
        """What is drawn, in the order of the page."""
        image: dict[str, Any] = {"image": small.picture(self.size)}
        masked: dict[str, Any] = {**image, "mask": small.mask(self.size)}
        return {
            "Euler": lambda: self.text(EULER),
            "DDIM": lambda: self.text(DDIM),
            "DPM-Solver++, Karras": lambda: self.text(DPM, use_karras_sigmas=True),
            "negative prompt, rescale 0.7": lambda: self.text(EULER, negative_prompt="blue", guidance_rescale=0.7),
            "sizes and crop": lambda: self.text(
                EULER, original_size=(64, 48), crops_coords_top_left=(8, 16), target_size=(96, 64)
            ),
            "image to image 0.3": lambda: self.over(**image, strength=0.3),
            "image to image 0.7": lambda: self.over(**image, strength=0.7),
            "image to image 0.7, DPM++": lambda: self.over(DPM, **image, strength=0.7),
            "inpainting 0.6": lambda: self.painted(**masked, strength=0.6),
            "inpainting 1": lambda: self.painted(**masked, strength=1.0),
            "inpainting UNet": lambda: self.painted(inpainting=True, **masked, strength=1.0),
            "LoRA": self.lora,
            "ControlNet": lambda: self.steered(1),
            "two ControlNets": lambda: self.steered(2),
            "refiner, last 0.2": self.refined,
        }

    def text(self, scheduler: str, **asked: Any) -> Pair:
        """From a prompt alone."""
        changes = {key: asked.pop(key) for key in ["use_karras_sigmas"] if key in asked}
        asked = {**self.common, **self.sides, **asked}
        other = self.their("StableDiffusionXLPipeline", scheduler, changes)
        return self.drawn(self.ours(scheduler, changes), asked), twins.draw_theirs(other, PROMPT, SEED, **asked)

    def over(self, scheduler: str = EULER, **asked: Any) -> Pair:
        """Over a picture."""
        asked = {**self.common, **asked}
        other = self.their("StableDiffusionXLImg2ImgPipeline", scheduler)
        ours = self.drawn(self.ours(scheduler), {**asked, **self.sides})
        return ours, twins.draw_theirs(other, PROMPT, SEED, **asked)

    def painted(self, *, inpainting: bool = False, mask: Any, **asked: Any) -> Pair:
        """Within a mask."""
        asked, parts, ours = {**self.common, **self.sides, **asked}, {}, self.base
        if inpainting:
            at = small.save_unet(self.work / "inpainting", dataclasses.replace(self.unet, in_channels=9))
            parts = {"unet": theirs.UNet2DConditionModel.from_pretrained(at, local_files_only=True)}
            ours = twins.load_ours(self.folder, unet_checkpoint=str(at))
        other = self.their("StableDiffusionXLInpaintPipeline", EULER, **parts)
        wanted = twins.draw_theirs(other, PROMPT, SEED, mask_image=mask, **asked)
        return self.drawn(ours, {**asked, "mask": mask}), wanted

    def lora(self) -> Pair:
        """With a LoRA in the values of every attention."""
        found = self.base.parts.model.parts["unet"]
        names = [key.removesuffix(".weight") for key in found if key.endswith("to_v.weight")]
        shapes: Any = {f"unet.{name}": found[f"{name}.weight"].shape for name in names}
        file = self.work / "lora.safetensors"
        save_file(small.lora_tensors(shapes, (".lora_A.weight", ".lora_B.weight"), 4), file)
        other = twins.load_theirs("StableDiffusionXLPipeline", self.folder)
        with theirs.their_warnings_are_theirs():
            other.load_lora_weights(str(self.work), weight_name=file.name, adapter_name="lora")
            other.set_adapters(["lora"], [0.6])
        asked = {**self.common, **self.sides}
        ours = self.drawn(self.base.with_loras({str(file): 0.6}), asked)
        return ours, twins.draw_theirs(other, PROMPT, SEED, **asked)

    def steered(self, count: int) -> Pair:
        """By ControlNets, of which the first ends early."""
        levels = self.base.parts.vae.downscale.bit_length()
        config = ControlNetConfig(self.unet, conditioning_embedding_out_channels=(16,) * levels)
        folders = [self.work / f"net {count} {i}" for i in range(count)]
        for i, at in enumerate(folders):
            small.save_controlnet(at, config, salt=i)
        nets = [theirs.ControlNetModel.from_pretrained(at, local_files_only=True) for at in folders]
        hints = [small.picture(self.size, 7 + i) for i in range(count)]
        told: dict[str, Any] = {
            "controlnet_conditioning_scale": [0.5] * count, "control_guidance_end": [0.5, 1.0][:count]
        }  # fmt: skip
        flags = {key: tuple(value) for key, value in told.items()}
        ours = twins.load_ours(self.folder, controlnet_model_name_or_path=tuple(map(str, folders)), **flags)
        one = count == 1
        other = self.their("StableDiffusionXLControlNetPipeline", EULER, controlnet=nets[0] if one else nets)
        told = {key: value[0] if one else value for key, value in told.items()}
        asked = {**self.common, **self.sides}
        wanted = twins.draw_theirs(other, PROMPT, SEED, image=hints[0] if one else hints, **told, **asked)
        return self.drawn(ours, {**asked, "hints": hints}), wanted

    def refined(self) -> Pair:
        """With a refiner for the last steps."""
        text = self.base.parts.text_2
        unet: UNetConfig = dataclasses.replace(
            self.unet, cross_attention_dim=text.hidden_size,
            projection_class_embeddings_input_dim=(text.projection_dim or 0) + 5 * self.unet.addition_time_embed_dim,
        )  # fmt: skip
        other = self.their(
            "StableDiffusionXLImg2ImgPipeline", EULER, unet=theirs.their_unet(unet), text_encoder=None, tokenizer=None,
            requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
        )  # fmt: skip
        with theirs.their_warnings_are_theirs():
            other.save_pretrained(self.work / "refiner")
        ours = twins.load_ours(self.folder, refiner_model_name_or_path=str(self.work / "refiner"))
        first = twins.draw_theirs(self.pipe, PROMPT, SEED, denoising_end=0.8, **self.common, **self.sides)
        begun = {"image": theirs.to_torch(first.latents), "denoising_start": 0.8}
        wanted = twins.draw_theirs(other, PROMPT, SEED, **begun, **self.common)
        return self.drawn(ours, {**self.common, **self.sides}), wanted

    def drawn(self, pipeline: Any, asked: dict[str, Any]) -> twins.Drawn:
        """Ours."""
        return twins.draw_ours(pipeline, PROMPT, SEED, **asked)

    def ours(self, scheduler: str, changes: Any = None) -> Any:
        """Our pipeline with a scheduler."""
        flags = {"_class_name": scheduler, **(changes or {})}
        return twins.load_ours(self.folder, **{f"diffusion_scheduler_config.{k}": v for k, v in flags.items()})

    def their(self, kind: str, scheduler: str, changes: Any = None, **parts: Any) -> Any:
        """diffusers' pipeline with a scheduler."""
        changed = twins.their_scheduler(self.pipe, scheduler, **(changes or {}))
        return twins.their_kind(self.pipe, kind, scheduler=changed, **parts)


def page(pairs: dict[str, Pair]) -> Image.Image:
    """All pairs with their names and differences."""
    h, w = (ZOOM * side for side in next(iter(pairs.values()))[0].pictures.shape[1:3])
    cell = (max(2 * w + 2, 190) + MARGIN, h + LINE + MARGIN)
    rows = -(-len(pairs) // PAIRS)
    sheet = Image.new("RGB", (PAIRS * cell[0] + MARGIN, rows * cell[1] + LINE + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), "left: sdxl_eqx, right: diffusers; the largest difference of 255 levels", fill="black")
    for i, (name, pair) in enumerate(pairs.items()):
        x, y = MARGIN + i % PAIRS * cell[0], LINE + i // PAIRS * cell[1]
        for j, drawn in enumerate(pair):
            shown = Image.fromarray(drawn.pictures[0]).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(shown, (x + j * (w + 2), y))
        apart = twins.difference(*pair)
        pen.text((x, y + h + 2), f"{name}: {apart}", fill="black" if apart <= 2 else "red")
    return sheet


def main() -> int:
    """Draw and save; 1 where a pair differs by more than 2 levels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    found: dict[str, Pair] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, draw in Pairs(asked.export, Path(work), asked.steps).all().items():
            found[name] = draw()
            apart, latents = twins.difference(*found[name]), [pair.latents for pair in found[name]]
            print(f"{name}: {apart} levels, latents {np.abs(latents[0] - latents[1]).max():.1e}", flush=True)
            page(found).save(asked.page)
    return int(any(twins.difference(*pair) > 2 for pair in found.values()))


if __name__ == "__main__":
    sys.exit(main())
