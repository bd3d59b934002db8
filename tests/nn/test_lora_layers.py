"""Low-rank changes of layers: what they compute is what merging them into the weights gives."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_models as tiny
import pytest

from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.conv import Conv2d
from sdxl_eqx.nn.linear import Linear
from sdxl_eqx.nn.lora import LoraConv2d, LoraLinear, LoraShape, add_lora, with_dropout

PLAIN, DORA = LoraShape(3, 0.5), LoraShape(3, 0.5, dora=True)
KEY = jr.key(0)


def moved(layer: LoraLinear | LoraConv2d) -> LoraLinear | LoraConv2d:
    """A layer whose change has an effect."""

    def where(one: LoraLinear | LoraConv2d) -> list[jax.Array]:
        return [x for x in (one.lora_up, one.lora_magnitude) if x is not None]

    drawn = [x + 0.3 * jr.normal(jr.key(i), x.shape) for i, x in enumerate(where(layer))]
    return eqx.tree_at(where, layer, drawn)


def scaled(layer: LoraLinear | LoraConv2d, whole: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The weight with each output's own size, by the paper's equation 5."""
    if layer.lora_magnitude is None:
        return whole
    size = np.sqrt(np.square(whole).sum(axis=axes, keepdims=True))
    return whole / size * np.asarray(layer.lora_magnitude).reshape(size.shape)


@pytest.mark.parametrize("lora", [PLAIN, DORA], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_dense_layer_is_that_of_the_merged_weight(lora: LoraShape, use_bias: bool):
    base = Linear(7, 5, use_bias=use_bias, key=KEY)
    layer = moved(LoraLinear(base, lora, key=jr.key(1)))
    whole = np.asarray(base.weight) + lora.strength * np.asarray(layer.lora_up) @ np.asarray(layer.lora_down)
    x = jr.normal(jr.key(2), (2, 4, 7))
    merged = eqx.tree_at(lambda one: one.weight, base, jnp.asarray(scaled(layer, whole, (1,))))
    np.testing.assert_allclose(layer(x), merged(x), rtol=0, atol=1e-5)
    assert np.abs(np.asarray(layer(x) - base(x))).max() > 0.1


@pytest.mark.parametrize("lora", [PLAIN, DORA], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, None), (3, 2, (0, 1)), (1, 1, None)])
def test_a_convolution_is_that_of_the_merged_weight(lora: LoraShape, kernel: int, stride: int, padding):
    base = Conv2d(4, 6, kernel, key=KEY)
    layer = moved(LoraConv2d(base, lora, key=jr.key(1)))
    up = np.asarray(layer.lora_up)[0, 0]
    whole = np.asarray(base.weight) + lora.strength * np.asarray(layer.lora_down) @ up
    x = jr.normal(jr.key(2), (2, 6, 5, 4))
    merged = eqx.tree_at(lambda one: one.weight, base, jnp.asarray(scaled(layer, whole, (0, 1, 2))))
    assert isinstance(layer, LoraConv2d)
    how: dict[str, Any] = {"stride": stride, "padding": padding}
    np.testing.assert_allclose(layer(x, **how), merged(x, **how), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_change_has_no_effect_and_is_in_every_block_of_a_stack(dora: bool):
    unet = tiny.filled(UNet, tiny.UNET)
    adapted = add_lora(
        unet, lambda path: path.endswith(("attn1.to_q", "resnets.0.conv1")), LoraShape(2, 1.0, dora=dora), key=KEY
    )
    inputs = tiny.unet_inputs(tiny.UNET, (8, 8))
    tiny.assert_close(tiny.apply_unet(adapted, inputs), tiny.apply_unet(unet, inputs), 1e-5)
    stack = adapted.mid_block.attentions[0].transformer_blocks.attn1.to_q
    assert isinstance(stack, LoraLinear) and stack.lora_down.shape == (2, 2, 64)
    assert (stack.lora_down[0] != stack.lora_down[1]).all()
    assert not isinstance(adapted.mid_block.attentions[0].transformer_blocks.attn1.to_k, LoraLinear)
    assert isinstance(adapted.mid_block.resnets[0].conv1, LoraConv2d)


@pytest.mark.parametrize("lora", [PLAIN, DORA], ids=["LoRA", "DoRA"])
def test_dropout_is_of_the_change_alone_and_keeps_its_mean(lora: LoraShape):
    shape = LoraShape(lora.rank, lora.strength, dropout=0.5, dora=lora.dora)
    layer = moved(LoraLinear(Linear(7, 5, key=KEY), shape, key=jr.key(1)))
    x = jr.normal(jr.key(2), (3, 7))
    drawn = jax.vmap(lambda key: with_dropout(layer, key=key)(x))(jr.split(jr.key(3), 4000))
    assert jnp.std(drawn, axis=0).min() > 0.01
    np.testing.assert_allclose(jnp.mean(drawn, axis=0), layer(x), atol=0.1)
    assert (with_dropout(layer, key=KEY)(x) == with_dropout(layer, key=KEY)(x)).all()


def test_blocks_of_a_stack_and_layers_drop_other_inputs():
    unet = eqx.filter_eval_shape(UNet, tiny.UNET, key=KEY)
    shape = LoraShape(2, 1.0, dropout=0.1)
    adapted = jax.eval_shape(lambda u: add_lora(u, lambda path: path.endswith("to_q"), shape, key=KEY), unet)
    keys = eqx.filter_eval_shape(lambda u: with_dropout(u, key=KEY), adapted)
    at = keys.mid_block.attentions[0].transformer_blocks
    assert at.attn1.to_q.lora_key.shape == (2,) and at.attn2.to_q.lora_key.shape == (2,)
    assert not hasattr(at.attn1.to_k, "lora_key")


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_a_new_dora_has_no_effect_in_bfloat16_and_a_hundredth_of_its_size_has_one(kind: str):
    if kind == "dense":
        base, x = Linear(64, 48, key=KEY), jr.normal(jr.key(1), (7, 64))
        changed = LoraLinear(base, DORA, key=KEY)
    else:
        base, x = Conv2d(16, 48, 3, key=KEY), jr.normal(jr.key(1), (1, 6, 5, 16))
        changed = LoraConv2d(base, DORA, key=KEY)
    x = x.astype(jnp.bfloat16)
    plain, fresh = cast(base, jnp.bfloat16)(x), cast(changed, jnp.bfloat16)(x)
    difference = np.abs(np.float32(fresh) - np.float32(plain)) / np.abs(np.float32(plain)).max()
    assert difference.max() < 2e-3, difference.max()
    assert changed.lora_magnitude is not None
    grown = eqx.tree_at(lambda layer: layer.lora_magnitude, changed, changed.lora_magnitude * 1.01)
    gain = np.vdot(np.float32(cast(grown, jnp.bfloat16)(x)), np.float32(plain)) / np.vdot(*2 * [np.float32(plain)])
    assert 1.007 < gain < 1.013  # outputs are rounded to 0.4%
