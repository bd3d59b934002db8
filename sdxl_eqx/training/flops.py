"""Floating-point operations of a computation, counted in its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from sdxl_eqx.models.unet import UNet, UNetConfig


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations (2 a multiply-add) of all matrix products and convolutions; scan bodies count once a turn.

    `args` may be shapes. XLA's own count sees a scan body once, so it cannot be used here.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def unet_training_flops(config: UNetConfig, h: int, w: int) -> int:
    """Of one training step on one latent of h x w: three times the forward pass; what is recomputed does not count."""
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = ((1, h, w, config.in_channels), (1,), (1, 77, config.cross_attention_dim), (1, pooled), (1, 6))
    unet = jax.eval_shape(lambda: UNet(config, key=jax.random.key(0)))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return 3 * count_flops(lambda model, *inputs: model(*inputs), unet, *args)


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            c_out = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // c_out
        else:
            turns = eqn.params["length"] if name == "scan" else 1
            total += turns * sum(_count(inner) for inner in _inner(eqn.params))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
