"""About how much memory a step takes, before it is compiled: what `remat_policy auto` goes by."""

import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from sdxl_eqx.config import DataConfig, TrainConfig
from sdxl_eqx.data.cache import is_text_cached
from sdxl_eqx.data.tokenizer import LENGTH
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.remat import Remat
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.flops import unet_inputs

BY_RECOMPUTATION: tuple[Remat, ...] = ("none", "dots", "attention", "full")
"""Policies, from that which computes least again on. offload keeps as much as dots and waits for the host."""

MARGIN = 1.15
"""On activations, over what is kept for the backward pass, for what lives only for a while: full-size steps compiled
for an H100 at batch 8 took 0.8 GB (full, dots) to 1.9 GB (attention) more than without it."""


@dataclass(frozen=True)
class Encoding:
    """What encoders take on a device where they run in the step."""

    weights: float = 0.0
    """Bytes, all the time."""
    each: float = 0.0
    """Bytes a picture, while it is encoded: before there is anything of the UNet."""

    @classmethod
    def of(cls, shapes: ModelShapes, layout: Layout, data: DataConfig) -> "Encoding":
        """That of a model's encoders, in float32, where the step needs them."""
        if is_text_cached(data):
            return cls()
        weights = 4.0 * _elements(shapes.encoder_shapes(), layout)
        if data.cache_latents_text_encoder_outputs:  # text is small beside the UNet
            return cls(weights)
        # The VAE's first residual block: its input, what is normed, what is convolved, and their sum.
        return cls(weights, 4 * 4.0 * shapes.vae.block_out_channels[0] * data.resolution**2)


NONE = Encoding()


def step_bytes(
    config: TrainConfig,
    unet: UNetConfig,
    layout: Layout,
    batch: float,
    side: int,
    compute: Compute,
    encoders: Encoding = NONE,
) -> float:
    """Bytes that a step takes on each device, for so many samples a device and latents of `side` by `side`.

    That is weights, moments and average as they are stored; weights and gradients in the dtype of the computation; and
    what the backward pass needs of the forward pass.
    """
    shapes = eqx.filter_eval_shape(UNet, unet, key=jr.key(0))
    parameters = _elements(shapes, layout)
    dtype = jnp.dtype(config.model.activations_dtype)
    stored = jnp.dtype(config.model.weights_dtype).itemsize + 2 * jnp.dtype(config.optim.moments_dtype).itemsize
    stored += 4 if config.optim.ema_decay > 0 else 0
    # The difference of two batches: weights that the backward pass needs are counted above.
    tokens, cast_unet = LENGTH * config.data.caption_chunks, cast_shapes(shapes, dtype)
    one, two = (kept_bytes(cast_unet, n * layout.size(layout.batch), side, compute, tokens) for n in (1, 2))
    activations = (two - one) / layout.size(layout.batch)
    computing = max(parameters * 2 * dtype.itemsize + MARGIN * activations * batch, encoders.each * batch)
    return parameters * stored + encoders.weights + computing


def _elements(shapes: Any, layout: Layout) -> int:
    """Elements of arrays on each device."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(layout.shardings(shapes)), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in leaves)


def kept_bytes(unet: UNet, batch: int, side: int, compute: Compute, tokens: int = LENGTH) -> int:
    """Bytes of all arrays that the backward pass of a UNet (of shapes) needs of the forward pass, on all devices."""

    def pullback(unet: UNet, *inputs: Array) -> Any:
        return jax.vjp(lambda u: jnp.sum(u(*inputs, compute=compute)), unet)[1]

    dtype = jax.tree.leaves(unet)[0].dtype
    kept = jax.eval_shape(pullback, unet, *unet_inputs(unet.config, batch, side, side, dtype, tokens))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def cast_shapes(shapes: UNet, dtype: Any) -> UNet:
    """The shapes of a UNet cast to `dtype`."""
    return jax.eval_shape(lambda unet: cast(unet, dtype), shapes)
