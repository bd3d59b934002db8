"""Models of random weights to measure with, as folders that diffusers loads too."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

from sdxl_eqx.data.tokenizer import bundled_tokenizers, save_tokenizers
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.sdxl import SDXL, Encoders
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.weights.folder import write_folder
from sdxl_eqx.weights.names import places
from sdxl_eqx.weights.write import model_of


@dataclass(frozen=True)
class RandomModel:
    """The shape of a whole model."""

    unet: UNetConfig
    vae: VAEConfig
    text: CLIPTextConfig
    text_2: CLIPTextConfig

    @property
    def side(self) -> int:
        """Pixels of a side of its pictures."""
        return self.unet.sample_size * self.vae.downscale

    @property
    def parameters(self) -> float:
        """Millions of the UNet."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._skeleton().unet)) / 1e6

    def _skeleton(self) -> Any:
        def make(key: Any) -> SDXL:
            encoders = Encoders(CLIPText(self.text, key=key), CLIPText(self.text_2, key=key), VAE(self.vae, key=key))
            return SDXL(UNet(self.unet, key=key), encoders)

        return eqx.filter_eval_shape(make, jr.key(0))

    def write(self, folder: Path) -> None:
        """Write one with seeded weights, in float32.

        Raises:
            OSError: where it cannot be written.
        """
        skeleton = self._skeleton()
        rng = np.random.default_rng(0)
        leaves = []
        for place in places(skeleton):
            leaves.append(place.from_file({key: _tensor(key, place.shape, rng) for key in place.keys}))
        model = model_of(
            jax.tree.unflatten(jax.tree.structure(skeleton), leaves), ScheduleConfig().to_json(), dtype=np.float32
        )
        write_folder(model, folder, save_tokenizers=partial(save_tokenizers, bundled_tokenizers()))


def _tensor(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights that keep activations about as large as they are."""
    if len(shape) == 1:
        return np.full(shape, "norm" in key and key.endswith("weight"), np.float32)
    draw = rng.standard_normal(shape, np.float32)
    return draw if "embedding.weight" in key else draw / np.sqrt(np.prod(shape[1:]), dtype=np.float32)


TINY = RandomModel(UNetConfig.tiny(), VAEConfig.tiny(), CLIPTextConfig.tiny(), CLIPTextConfig.tiny_2())

HALF = RandomModel(
    dataclasses.replace(
        UNetConfig.sdxl_base(),
        sample_size=32,
        block_out_channels=(160, 320, 640),
        transformer_layers=(1, 2, 4),
        heads=(5, 10, 20),
        cross_attention_dim=256 + 512,
        projection_class_embeddings_input_dim=512 + 6 * 256,
    ),
    dataclasses.replace(VAEConfig.sdxl_base(), block_out_channels=(64, 128, 256, 256)),
    dataclasses.replace(
        CLIPTextConfig.sdxl_base(), hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4
    ),
    dataclasses.replace(
        CLIPTextConfig.sdxl_base_2(),
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        projection_dim=512,
    ),
)
"""SDXL of half its widths and fewer blocks, for pictures of 256 pixels."""
