"""Folders of the tiny models as people have them: a whole SDXL, a ControlNet, a LoRA."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import parity_models as tiny
from PIL import Image

from sdxl_eqx.data.tokenizer import bundled_tokenizers, save_tokenizers
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.controlnet import ControlNet, ControlNetConfig
from sdxl_eqx.models.sdxl import SDXL, Encoders
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.weights.folder import write_folder, write_json
from sdxl_eqx.weights.write import model_of, write_model

INPAINTING = dataclasses.replace(tiny.UNET, in_channels=9)
"""The UNet of diffusers/stable-diffusion-xl-1.0-inpainting-0.1: mask and masked picture beside the latents."""

REFINER = dataclasses.replace(
    tiny.REFINER, cross_attention_dim=48, projection_class_embeddings_input_dim=40 + 5 * 8, layers_per_block=1
)
"""The refiner of `tiny.TEXT_2`."""

CONTROLNET = ControlNetConfig(tiny.UNET, conditioning_embedding_out_channels=(6, 10, 14))
"""A ControlNet at the grid of `tiny.VAE_CONFIG`, which is 4 times as coarse as the picture."""

SCHEDULER = {
    **ScheduleConfig().to_json(), "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
    "sample_max_value": 1.0,
}  # fmt: skip
"""What the published file says of classes that it does not name."""


def save_base(folder: Path, unet: UNetConfig = tiny.UNET) -> Path:
    """A whole model with the weights that follow from the keys."""
    encoders = Encoders(
        text_encoder=tiny.filled(CLIPText, tiny.TEXT),
        text_encoder_2=tiny.filled(CLIPText, tiny.TEXT_2),
        vae=tiny.filled(VAE, tiny.VAE_CONFIG),
    )
    model = model_of(SDXL(tiny.filled(UNet, unet), encoders), SCHEDULER, dtype=np.float32)
    write_folder(model, folder, save_tokenizers=partial(save_tokenizers, bundled_tokenizers()))
    return folder


def save_unet(folder: Path, unet: UNetConfig, *, salt: int = 0) -> Path:
    """A UNet in a folder of its own."""
    return _save(tiny.filled(UNet, unet, salt=salt), unet.to_json(), folder)


def save_controlnet(folder: Path, net: ControlNetConfig = CONTROLNET, *, salt: int = 0) -> Path:
    """A ControlNet in a folder of its own; its zero convolutions are filled too."""
    return _save(tiny.filled(ControlNet, net, salt=salt), net.to_json(), folder)


def _save(module: Any, config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_json(config, folder / "config.json")
    write_model(module, config, folder / "diffusion_pytorch_model.safetensors", dtype=np.float32)
    return folder


def lora_tensors(shapes: Mapping[str, tuple[int, int]], names: tuple[str, str], rank: int) -> dict[str, np.ndarray]:
    """Random layers of modules whose matrices have those shapes, under those endings of down and up."""
    found = {}
    for module, (out, inner) in shapes.items():
        rng = tiny.generator("lora", module, rank)
        found[module + names[0]] = (rng.standard_normal((rank, inner)) / np.sqrt(inner * rank)).astype(np.float32)
        found[module + names[1]] = (0.5 * rng.standard_normal((out, rank))).astype(np.float32)
    return found


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Smooth colours with an edge across them."""
    rng = tiny.generator("picture", seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    found = np.array(small.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    found[size[0] // 3 :, size[1] // 2 :] = 255 - found[size[0] // 3 :, size[1] // 2 :]
    return found


def mask(size: tuple[int, int]) -> np.ndarray:
    """A white disc in a black picture, with all levels of grey at its rim."""
    y, x = np.mgrid[: size[0], : size[1]]
    radius = np.hypot((y - 0.45 * size[0]) / size[0], (x - 0.6 * size[1]) / size[1])
    return np.clip(255 * (0.35 - radius) / 0.1 + 128, 0, 255).astype(np.uint8)
