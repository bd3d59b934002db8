"""The smallest SDXL that draws, in a folder as diffusers has it, with random weights; and LoRAs of its own."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import parity_models as tiny
import pytest
from safetensors.numpy import save_file

from sdxl_eqx.data.tokenizer import bundled_tokenizers, save_tokenizers
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.generation import Pipeline
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.sdxl import SDXL, Encoders
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.weights.folder import write_folder
from sdxl_eqx.weights.write import model_of

UNET = dataclasses.replace(
    UNetConfig.tiny(),
    block_out_channels=(8, 16),
    heads=(1, 2),
    cross_attention_dim=32,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=16 + 6 * 4,
    norm_num_groups=2,
    sample_size=8,
)
VAE_CONFIG = dataclasses.replace(VAEConfig.tiny(), block_out_channels=(8, 8), norm_num_groups=2, sample_size=16)
TEXT = dataclasses.replace(CLIPTextConfig.tiny(), hidden_size=16, intermediate_size=32)
TEXT_2 = dataclasses.replace(TEXT, hidden_act="gelu", projection_dim=16)

OWN = UNET.sample_size * VAE_CONFIG.downscale
"""Pixels of a side where nothing else is asked for."""

QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


def write_model(folder: Path, *, unet: Callable[[UNet], UNet] = lambda unet: unet) -> Path:
    """Write the model, with its UNet changed."""
    encoders = Encoders(tiny.filled(CLIPText, TEXT), tiny.filled(CLIPText, TEXT_2), tiny.filled(VAE, VAE_CONFIG))
    whole = SDXL(unet(tiny.filled(UNet, UNET)), encoders)
    tokenizers = partial(save_tokenizers, bundled_tokenizers())
    write_folder(model_of(whole, ScheduleConfig().to_json(), dtype=np.float32), folder, save_tokenizers=tokenizers)
    return folder


def write_lora(file: Path, *, key: str = QUERY) -> Path:
    """Write a LoRA that changes one matrix much."""
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((2, 32)), rng.standard_normal((16, 2))
    save_file({f"{key}.lora_A.weight": down.astype(np.float32), f"{key}.lora_B.weight": up.astype(np.float32)}, file)
    return file


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder; read only."""
    return write_model(tmp_path_factory.mktemp("models") / "small-sdxl")


@pytest.fixture(scope="session")
def pipeline(folder: Path) -> Pipeline:
    """The model on 8 devices, in float32."""
    return Pipeline.load(str(folder), activations_dtype="float32", num_inference_steps=2)
