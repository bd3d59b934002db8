"""The four parts of Stable Diffusion XL together."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.controlnet import ControlNet
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.linear import Int8Weight


class Conditioning(eqx.Module):
    """What the UNet is conditioned on beside the timestep."""

    context: Float[Array, "b s e"]
    """Penultimate hidden states of both text encoders, side by side."""
    pooled: Float[Array, "b p"]
    """Pooled embedding of the second text encoder."""
    time_ids: Float[Array, "b i"]
    """(original height, width, crop top, left, target height, width) in pixels (Podell et al. 2023, section 2.2)."""


class Encoders(eqx.Module):
    """The parts around the UNet, frozen while it trains."""

    text_encoder: CLIPText
    text_encoder_2: CLIPText
    vae: VAE

    def encode_text(
        self, ids: Int[Array, "b s"], ids_2: Int[Array, "b s"], *, compute: Compute = Compute()
    ) -> tuple[Float[Array, "b s e"], Float[Array, "b p"]]:
        """(context, pooled) of prompts tokenized by either tokenizer.

        Prompts of several chunks, each as long as the encoders read at once, are encoded chunk by chunk; their hidden
        states follow each other, and the pooled embedding is the first chunk's (as AUTOMATIC1111 and ComfyUI have it).
        """
        b, s = ids.shape
        length = min(s, self.text_encoder.config.max_position_embeddings)
        ids, ids_2 = ids.reshape(-1, length), ids_2.reshape(-1, length)
        first, _ = self.text_encoder(ids, compute=compute)
        second, pooled = self.text_encoder_2(ids_2, compute=compute)
        return jnp.concatenate([first, second], axis=-1).reshape(b, s, -1), pooled[:: s // length]


class SDXL(eqx.Module):
    """Stable Diffusion XL."""

    unet: UNet
    encoders: Encoders
    controlnet: ControlNet | None = None


def cast(model: Any, dtype: Any) -> Any:
    """`model` with every floating array in `dtype`, but for the scales of 8-bit weights and DoRA's magnitudes.

    Either is a number near another one, of which the ratio or the difference counts.
    """

    def one(path: Any, x: Any) -> Any:
        exact = isinstance(x, Int8Weight) or (bool(path) and getattr(path[-1], "name", "") == "lora_magnitude")
        return x if exact or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=lambda x: isinstance(x, Int8Weight))
