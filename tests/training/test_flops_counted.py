"""TFLOPs against another count: XLA's own, of whole models that it is given unrolled and never compiles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from sdxl_eqx.config import DiffusionSchedulerConfig
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAEConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.training.flops import count_flops, unet_inputs, unet_training_flops, vae_flops

UNET = dataclasses.replace(
    UNetConfig.tiny(), block_out_channels=(256, 512), heads=(1, 1), cross_attention_dim=512, norm_num_groups=32
)
"""Few layers, but wide ones on large pictures: XLA counts every sum and root of norms and softmax too, and leaves out
what convolutions take from beyond the borders. Here either is under half a percent."""

SIDE = 512
"""Of its latents."""


def by_xla(function: Callable[..., Any], *args: Any) -> float:
    """Operations that XLA counts in a program."""
    cost: Any = jax.jit(function).lower(*args).cost_analysis()
    return cost["flops"]


def unet_shapes(side: int) -> tuple[Any, ...]:
    """A UNet and what it takes."""
    return eqx.filter_eval_shape(UNet, UNET, key=jr.key(0)), *unet_inputs(UNET, 1, side, side, jnp.float32)


def run(unet: UNet, *inputs: Any) -> Any:
    """The forward pass without loops, whose bodies XLA counts once."""
    return unet(*inputs, compute=Compute(scan_unroll=2))


def test_a_unet_takes_what_xla_counts():
    shapes = unet_shapes(SIDE)
    assert count_flops(run, *shapes) == pytest.approx(by_xla(run, *shapes), rel=0.01)


def test_training_a_unet_takes_what_xla_counts_of_both_passes():
    """But for the gradients of latents and texts, which nobody asks for, of the first layers that see them."""
    shapes = unet_shapes(SIDE)
    both = jax.value_and_grad(lambda *args: jnp.sum(run(*args)))
    assert unet_training_flops(UNET, SIDE, SIDE) == pytest.approx(by_xla(both, *shapes), rel=0.01)


def test_the_encoder_of_a_vae_takes_what_xla_counts():
    vae = dataclasses.replace(VAEConfig.sdxl_base(), block_out_channels=(256, 256, 512), layers_per_block=1)
    shapes = dataclasses.replace(ModelShapes.sdxl_base(DiffusionSchedulerConfig()), vae=vae)
    pixels = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.float32)
    counted = by_xla(lambda vae, pixels: vae.encode(pixels).mean, shapes.encoder_shapes().vae, pixels)
    assert vae_flops(shapes, (1024, 1024)) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("config", [CLIPTextConfig.sdxl_base(), CLIPTextConfig.sdxl_base_2()])
def test_a_text_encoder_takes_what_xla_counts(config: CLIPTextConfig):
    config = dataclasses.replace(config, num_hidden_layers=3)
    text = eqx.filter_eval_shape(CLIPText, config, key=jr.key(0))
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)

    def encode(text: CLIPText, ids: Any) -> Any:
        return text(ids, compute=Compute(scan_unroll=3))

    assert count_flops(encode, text, ids) == pytest.approx(by_xla(encode, text, ids), rel=0.01)
