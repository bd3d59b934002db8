"""Floating-point operations of a computation, counted in its jaxpr."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.data.pictures import Size
from sdxl_eqx.data.tokenizer import LENGTH
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.training.networks import Networks, join, network_shapes, split

KERNELS = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 4,
    "mha_forward": 2,
    "mha_preprocess_backward": 0,
    "mha_backward": 4,
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 3,
    "splash_mha_dq": 1,
}
"""Products as large as that of queries and keys in the attention kernels of cuDNN, Triton and TPUs, by how their names
begin. Scores that a kernel computes again within its backward pass are its own affair and do not count."""


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations (2 a multiply-add) of all matrix products, convolutions and attention kernels; scan bodies count once
    a turn, and what a `shard_map` does once a device.

    `args` may be shapes. XLA's own count sees a scan body once and no kernel, so it cannot be used here.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # What a policy keeps still stands among what is computed again, where nothing needs it.
    return _count(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def training_flops(shapes: ModelShapes, config: TrainConfig, size: Size) -> int:
    """Of one training step on one picture of (height, width) `size`: the UNet's both passes, and what is encoded."""
    data = config.data
    h, w = (side // shapes.vae.downscale for side in size)
    flops = denoising_flops(shapes, config, h, w)
    if not config.is_text_cached:
        flops += text_flops(shapes, data.caption_chunks) * (3 if config.text.train_text_encoder else 1)
    if not data.cache_latents_text_encoder_outputs:
        flops += vae_flops(shapes, size)
    return flops


def denoising_flops(shapes: ModelShapes, config: TrainConfig, h: int, w: int) -> int:
    """Of one training step on one latent of h x w, without what is encoded; what is recomputed does not count."""
    tokens = LENGTH * config.data.caption_chunks
    if config.trains == "unet":
        return unet_training_flops(shapes.unet, h, w, tokens)
    return both_passes(shapes, config, Compute(), batch=1, h=h, w=w, dtype=jnp.float32)


def both_passes(
    shapes: ModelShapes, config: TrainConfig, compute: Compute, *, batch: int, h: int, w: int, dtype: Any
) -> int:
    """What forward and backward pass of what denoises compute, where a part of it trains."""
    networks = network_shapes(shapes, config)
    trained, frozen = split(Networks(networks.unet, None, networks.controlnet), config)
    inputs = unet_inputs(shapes.unet, batch, h, w, dtype, LENGTH * config.data.caption_chunks)
    image = jax.ShapeDtypeStruct((batch, h * shapes.vae.downscale, w * shapes.vae.downscale, 3), dtype)

    def loss(trained: Networks, frozen: Networks, image: Any, *inputs: Any) -> Any:
        whole = cast(join(trained, frozen), dtype)
        nets = whole.controlnet
        control = None if nets is None else nets(*inputs, image=image, compute=compute)
        return jnp.sum(whole.unet(*inputs, control=control, compute=compute).astype(jnp.float32))

    return count_flops(jax.value_and_grad(loss), trained, frozen, image, *inputs)


def unet_training_flops(config: UNetConfig, h: int, w: int, tokens: int = LENGTH) -> int:
    """Of one training step on one latent of h x w: three times the forward pass; what is recomputed does not count."""
    unet = eqx.filter_eval_shape(UNet, config, key=jr.key(0))
    inputs = unet_inputs(config, 1, h, w, jnp.float32, tokens)
    return 3 * count_flops(lambda model, *inputs: model(*inputs), unet, *inputs)


def vae_flops(shapes: ModelShapes, size: Size) -> int:
    """Of encoding one picture of (height, width) `size`."""
    pixels = jax.ShapeDtypeStruct((1, *size, shapes.vae.in_channels), jnp.float32)
    return count_flops(lambda vae, pixels: vae.encode(pixels).mean, shapes.encoder_shapes().vae, pixels)


def text_flops(shapes: ModelShapes, chunks: int = 1) -> int:
    """Of encoding one caption of so many chunks of 77 tokens."""
    ids = jax.ShapeDtypeStruct((1, LENGTH * chunks), jnp.int32)
    return count_flops(lambda encoders, ids: encoders.encode_text(ids, ids), shapes.encoder_shapes(), ids)


def step_recompute_ratio(
    shapes: ModelShapes, config: TrainConfig, compute: Compute, *, batch: int, side: int, dtype: Any
) -> float:
    """That of `recompute_ratio`; where not the whole UNet trains, over what is computed where all is kept."""
    tokens = LENGTH * config.data.caption_chunks
    if config.trains == "unet":
        return recompute_ratio(shapes.unet, compute, batch=batch, side=side, dtype=dtype, tokens=tokens)
    passes = partial(both_passes, shapes, config, batch=batch, h=side, w=side, dtype=dtype)
    return passes(compute) / passes(dataclasses.replace(compute, remat="none", gather=None, place=None))


def recompute_ratio(
    config: UNetConfig, compute: Compute, *, batch: int, side: int, dtype: Any, tokens: int = LENGTH
) -> float:
    """What both passes of a UNet compute, over three times the forward pass: about 1 where nothing is computed twice.

    It is a little less, as nobody asks for the gradient of the UNet's input.
    """

    def loss(unet: UNet, *inputs: Any) -> Any:
        return jnp.sum(unet(*inputs, compute=compute).astype(jnp.float32))

    unet = eqx.filter_eval_shape(lambda: cast(UNet(config, key=jr.key(0)), dtype))
    inputs = unet_inputs(config, batch, side, side, dtype, tokens)
    return count_flops(jax.value_and_grad(loss), unet, *inputs) / (3 * count_flops(loss, unet, *inputs))


def unet_inputs(
    config: UNetConfig, batch: int, h: int, w: int, dtype: Any, tokens: int = LENGTH
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of what a UNet takes: latents of h x w, timesteps, context of `tokens`, pooled text, time ids."""

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    return (
        array(h, w, config.in_channels),
        array(dtype=jnp.float32),
        array(tokens, config.cross_attention_dim),
        array(config.pooled_dim),
        array(config.number_of_time_ids, dtype=jnp.float32),
    )


def _count(jaxpr: Any) -> int:
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn: Any) -> int:
    name = eqn.primitive.name
    out = eqn.outvars[0].aval.shape if eqn.outvars else ()
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * math.prod(out) * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        c_out = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        # The gradient of a strided convolution puts zeros between its input's entries.
        return 2 * math.prod(out) * math.prod(kernel) // (c_out * math.prod(eqn.params["lhs_dilation"]))
    if name == "pallas_call" or name in KERNELS:
        return _kernel(eqn, eqn.params["name"] if name == "pallas_call" else name)
    turns = 1
    if name == "scan":
        turns = eqn.params["length"]
    elif name == "shard_map":
        turns = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
    return turns * sum(_count(inner) for inner in _inner(eqn.params))


def _kernel(eqn: Any, name: str) -> int:
    """Of an attention kernel: queries and keys are its first arrays of numbers, alike but for their lengths."""
    products = next(products for begin, products in KERNELS.items() if name.startswith(begin))
    query, key, *_ = (
        x.aval.shape for x in eqn.invars if x.aval.ndim >= 3 and jnp.issubdtype(x.aval.dtype, jnp.floating)
    )
    # All gradients in one: that of the queries in parts, one for each block of keys.
    if name.startswith("splash_mha_dkv") and any(x.aval.ndim > len(query) for x in eqn.outvars):
        products += 1
    length = -2 if name.startswith("splash") else -3
    return products * 2 * math.prod(query) * key[length]


def _inner(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
