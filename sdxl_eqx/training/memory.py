"""About how much memory a step takes, before it is compiled: what `remat_policy auto` goes by."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.data.tokenizer import LENGTH
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.remat import Remat
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.flops import unet_inputs
from sdxl_eqx.training.networks import Networks, denoiser_shapes, join, split

T = TypeVar("T")

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
    def of(cls, shapes: ModelShapes, layout: Layout, config: TrainConfig) -> "Encoding":
        """That of a model's encoders, in float32, where the step needs them."""
        data = config.data
        if config.is_text_cached:
            return cls()
        encoders = shapes.encoder_shapes()
        weights = 4.0 * _elements(encoders, layout)
        if config.text.train_text_encoder:  # computed with a copy; whole ones have moments and gradients
            each = jnp.dtype(config.model.activations_dtype).itemsize
            each += each + _moving(config) if config.trains == "unet" else 0
            weights += each * sum(_elements(part, layout) for part in (encoders.text_encoder, encoders.text_encoder_2))
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

    That is what is stored of weights, moments and average; weights and gradients in the dtype of the computation; and
    what the backward pass needs of the forward pass. Of text encoders that train, it counts the weights and their
    moments, not what their backward pass needs.
    """
    trained, frozen = split(denoiser_shapes(unet, config), config)
    dtype = jnp.dtype(config.model.activations_dtype)
    training = _elements(trained, layout)
    stored = _bytes(trained, layout) + training * _moving(config) + _bytes(frozen, layout)
    # The difference of two batches: weights that the backward pass needs are counted above.
    tokens, cast_parts = LENGTH * config.data.caption_chunks, cast_shapes((trained, frozen), dtype)
    one, two = (kept_bytes(*cast_parts, n * layout.size(layout.batch), side, compute, tokens) for n in (1, 2))
    activations = (two - one) / layout.size(layout.batch)
    copies = _elements(_to_cast(frozen, dtype), layout)
    computing = (2 * training + copies) * dtype.itemsize + MARGIN * activations * batch
    return stored + encoders.weights + max(computing, encoders.each * batch)


def _moving(config: TrainConfig) -> int:
    """Bytes of moments and average of each weight that trains."""
    return 2 * jnp.dtype(config.optim.moments_dtype).itemsize + (4 if config.optim.ema_decay > 0 else 0)


def _to_cast(shapes: T, dtype: Any) -> T:
    """The arrays that the step computes with a copy of."""
    after = cast_shapes(shapes, dtype)
    return jax.tree.map(lambda x, y: x if x.dtype != y.dtype else None, shapes, after)


def _bytes(shapes: Any, layout: Layout) -> int:
    """Bytes of arrays on each device."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(layout.shardings(shapes)), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


def _elements(shapes: Any, layout: Layout) -> int:
    """Elements of arrays on each device."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(layout.shardings(shapes)), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in leaves)


def kept_bytes(
    trained: Networks, frozen: Networks, batch: int, side: int, compute: Compute, tokens: int = LENGTH
) -> int:
    """Bytes of all arrays that the backward pass of what denoises needs of the forward pass, on all devices.

    Both are shapes in the dtype of the computation.
    """

    def pullback(trained: Networks, frozen: Networks, image: Array, *inputs: Array) -> Any:
        def loss(trained: Networks) -> Array:
            whole = join(trained, frozen)
            net = whole.controlnet
            control = None if net is None else net(*inputs, image=image, compute=compute)
            return jnp.sum(whole.unet(*inputs, control=control, compute=compute))

        return jax.vjp(loss, trained)[1]

    dtype = jax.tree.leaves(trained)[0].dtype
    net = trained.controlnet
    downscale = 1 if net is None else net.config.downscale
    image = jax.ShapeDtypeStruct((batch, side * downscale, side * downscale, 3), dtype)
    inputs = unet_inputs(trained.unet.config, batch, side, side, dtype, tokens)
    kept = jax.eval_shape(pullback, trained, frozen, image, *inputs)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def cast_shapes(shapes: T, dtype: Any) -> T:
    """The shapes of networks cast to `dtype`."""
    return jax.eval_shape(lambda tree: cast(tree, dtype), shapes)
