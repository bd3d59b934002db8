import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_step import UNET

from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.training.flops import count_flops, unet_training_flops


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
