import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_step import UNET

from sdxl_eqx.arrays import Attend
from sdxl_eqx.config import DataConfig, DiffusionSchedulerConfig, FlashBlockSizes, TrainConfig
from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.sharded import Sharded
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.remat import Remat
from sdxl_eqx.training.flops import (
    count_flops,
    recompute_ratio,
    text_flops,
    training_flops,
    unet_training_flops,
    vae_flops,
)


def test_sdxl_base_takes_the_published_number_of_operations():
    forward = unet_training_flops(UNetConfig.sdxl_base(), 128, 128) / 3
    assert forward == pytest.approx(6761e9, rel=1e-3)


def test_products_and_convolutions_are_counted_by_hand():
    a, b = jnp.ones((5, 2, 3)), jnp.ones((5, 3, 4))
    assert count_flops(lambda a, b: jnp.sin(a @ b), a, b) == 2 * 5 * 2 * 3 * 4

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert count_flops(conv, jnp.ones((2, 8, 6, 3)), jnp.ones((3, 3, 3, 7))) == 2 * (2 * 4 * 3 * 7) * (3 * 3 * 3)


@pytest.mark.parametrize("unroll", [1, 4])
def test_the_body_of_a_scan_counts_once_a_turn_however_it_is_unrolled(unroll):
    w = jnp.ones((4, 3, 3))

    def stack(x, w):
        return jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(x, w), None), x, w, unroll=unroll)[0]

    assert count_flops(stack, jnp.ones((2, 3)), w) == 4 * 2 * 2 * 3 * 3


def test_one_more_transformer_block_costs_the_same_each_time():
    costs = [unet_training_flops(dataclasses.replace(UNET, transformer_layers=(depth,)), 8, 8) for depth in (1, 2, 5)]
    assert costs[2] - costs[1] == 3 * (costs[1] - costs[0]) > 0


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_a_kernel_takes_what_plain_attention_takes_forward_and_backward(kernel):
    """At lengths that need no padding."""
    x = jnp.ones((2, 256, 4, 64), jnp.bfloat16)

    def both(attend):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v, causal=False).astype(jnp.float32))

        return count_flops(jax.value_and_grad(loss, argnums=(0, 1, 2)), x, x, x)

    plain = both(dot_product)
    assert plain == 6 * 2 * 2 * 256 * 256 * 4 * 64
    # A gradient's product with its result, outside of the kernel, comes on top.
    assert both(Flash(kernel)) == pytest.approx(plain, rel=1e-3)
    assert both(Flash(kernel, FlashBlockSizes(block_q=128, block_kv=128))) == pytest.approx(plain, rel=1e-3)


def test_what_a_shard_map_does_counts_once_a_device():
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, keys = jnp.ones((4, 64, 2, 16)), jnp.ones((4, 32, 2, 16))
    sharded = Sharded(dot_product, mesh, heads=(), batch=("data",))
    assert count_flops(sharded, x, keys, keys) == count_flops(dot_product, x, keys, keys)


def test_the_gradient_of_a_strided_convolution_does_not_count_the_zeros_between():
    def conv(x, w):
        return jnp.sum(jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))

    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    forward = count_flops(conv, x, w)
    assert count_flops(jax.value_and_grad(conv, argnums=(0, 1)), x, w) == 3 * forward


def ratio(remat: Remat, attend: Attend = dot_product) -> float:
    return recompute_ratio(UNET, Compute(attend, remat), batch=2, side=16, dtype=jnp.float32)


def test_policies_that_keep_less_compute_more_again():
    ratios = [ratio(remat) for remat in ("none", "dots", "attention", "full")]
    assert 0.9 < ratios[0] <= 1 and 1.15 < ratios[-1] < 4 / 3
    assert ratios == sorted(ratios) and ratios[1] < ratios[2]
    assert ratio("offload") == ratios[1]


def test_a_policy_that_keeps_attention_runs_no_forward_kernel_twice():
    assert ratio("attention", Flash("splash")) < ratio("full", Flash("splash"))


def test_encoding_a_picture_takes_the_published_number_of_operations():
    """4879 GFLOP of the VAE's convolutions and attention, 111 of both text encoders."""
    shapes = ModelShapes.sdxl_base(DiffusionSchedulerConfig())
    assert vae_flops(shapes, (1024, 1024)) == pytest.approx(4879e9, rel=1e-2)
    assert text_flops(shapes) == pytest.approx(111e9, rel=1e-2)


def test_a_step_counts_what_it_encodes_and_all_chunks_of_a_caption():
    shapes, size = dataclasses.replace(ModelShapes.sdxl_base(DiffusionSchedulerConfig()), unet=UNET), (64, 128)
    unet = unet_training_flops(shapes.unet, 8, 16)
    assert training_flops(shapes, TrainConfig(), size) == unet
    text = text_flops(shapes)
    assert training_flops(shapes, TrainConfig(data=DataConfig(caption_shuffle=True)), size) == unet + text
    pixels = DataConfig(cache_latents_text_encoder_outputs=False)
    assert training_flops(shapes, TrainConfig(data=pixels), size) == unet + text + vae_flops(shapes, size)
    longer = training_flops(shapes, TrainConfig(data=DataConfig(caption_shuffle=True, caption_chunks=2)), size)
    assert longer == unet_training_flops(UNET, 8, 16, 154) + 2 * text > unet + text
