"""The UNet: diffusers' numbers from the golden files, and that each input is heard."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_models as tiny
import parity_published as published
import pytest
from jaxtyping import Array
from parity_models import REFINER, UNET, assert_close, read_golden, relative_change

from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.norm import GroupNorm, LayerNorm

GRID = (12, 10)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return tiny.filled(UNet, UNET)


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return tiny.unet_inputs(UNET, GRID)


@pytest.fixture(scope="module")
def output(unet: UNet, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return tiny.apply_unet(unet, inputs)


def test_the_output_is_diffusers_on_a_grid_that_halves_unevenly(output: np.ndarray):
    assert_close(output, read_golden("unet")["output"], 1e-4)


def test_the_refiners_shape_gives_diffusers_output():
    refiner = tiny.filled(UNet, REFINER)
    output = tiny.apply_unet(refiner, tiny.unet_inputs(REFINER, (10, 12), time_ids=5))
    assert_close(output, read_golden("refiner")["output"], 1e-4)


@pytest.mark.parametrize("name", ["x", "t", "context", "pooled", "time_ids"])
def test_every_input_moves_the_output(name: str, unet: UNet, inputs: dict[str, np.ndarray], output: np.ndarray):
    changed = inputs[name][::-1] if name in ("t", "time_ids") else -inputs[name]
    assert relative_change(output, tiny.apply_unet(unet, {**inputs, name: changed})) > 1e-2


@pytest.mark.parametrize("i", range(6))
def test_every_time_id_moves_the_output(i: int, unet: UNet, inputs: dict[str, np.ndarray], output: np.ndarray):
    changed = inputs["time_ids"].copy()
    changed[:, i] += 300
    assert relative_change(output, tiny.apply_unet(unet, {**inputs, "time_ids": changed})) > 1e-2


def test_a_sample_does_not_hear_the_others_of_its_batch(unet: UNet, inputs: dict[str, np.ndarray], output: np.ndarray):
    reversed_inputs = {name: value[::-1].copy() for name, value in inputs.items()}
    np.testing.assert_allclose(tiny.apply_unet(unet, reversed_inputs)[::-1], output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, allowed", [(jnp.bfloat16, 5e-2)])
def test_half_precision_stays_finite_and_close(
    dtype: Any, allowed: float, unet: UNet, inputs: dict[str, np.ndarray], output: np.ndarray
):
    cond = tiny.conditioning(inputs)
    # Not under strict promotion: jax.nn.dot_product_attention itself promotes scores to float32.
    ours = jax.jit(UNet.__call__)(
        cast(unet, dtype),
        jnp.asarray(inputs["x"], dtype),
        jnp.asarray(inputs["t"], jnp.float32),
        cond.context,
        cond.pooled,
        cond.time_ids,
    )
    assert ours.dtype == dtype
    wide = np.asarray(ours.astype(jnp.float32))
    assert np.isfinite(wide).all()
    assert relative_change(output, wide) < allowed


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_layer_changes_the_dtype_by_silent_promotion(dtype: Any, unet: UNet, inputs: dict[str, np.ndarray]):
    def attend(query: Array, key: Array, value: Array, *, causal: bool = False) -> Array:
        assert query.dtype == key.dtype == value.dtype == dtype
        return query

    cond = tiny.conditioning(inputs)
    x, t = jnp.asarray(inputs["x"], dtype), jnp.asarray(inputs["t"], jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        out = jax.eval_shape(
            lambda model: model(x, t, cond.context, cond.pooled, cond.time_ids, compute=Compute(attend=attend)),
            cast(unet, dtype),
        )
    assert out.dtype == dtype


def test_the_time_ids_are_embedded_in_float32_whatever_the_weights_are(unet: UNet, inputs: dict[str, np.ndarray]):
    narrow = cast(unet, jnp.bfloat16)
    t = jnp.asarray([17.0, 801.0])
    pooled, time_ids = jnp.asarray(inputs["pooled"]), jnp.asarray(inputs["time_ids"])
    ours = narrow.embed(t, pooled, time_ids)
    rounded = narrow.embed(t, pooled, (time_ids + 1365).astype(jnp.bfloat16).astype(jnp.float32))
    exact = unet.embed(t, pooled, time_ids)
    assert relative_change(exact, ours.astype(jnp.float32)) < 2e-2
    assert relative_change(unet.embed(t, pooled, time_ids + 1365), rounded.astype(jnp.float32)) > 2e-2


def test_every_norm_has_diffusers_eps():
    """Too small to show in the output of a tiny model, and yet it counts where activations are small."""
    skeleton = eqx.filter_eval_shape(UNet, UNetConfig.sdxl_base(), key=jr.key(0))
    nodes = jax.tree_util.tree_leaves_with_path(skeleton, is_leaf=lambda x: isinstance(x, GroupNorm | LayerNorm))
    norms = {jax.tree_util.keystr(path): node for path, node in nodes if isinstance(node, GroupNorm | LayerNorm)}
    assert len(norms) == 2 * 17 + 11 * 4 + 1
    for path, norm in norms.items():
        transformer = isinstance(norm, GroupNorm) and "attentions" in path
        assert norm.eps == (1e-6 if transformer else 1e-5), path
        assert isinstance(norm, LayerNorm) or norm.groups == 32


@pytest.mark.parametrize(
    "config, json", [(UNetConfig.sdxl_base(), published.UNET), (UNetConfig.sdxl_refiner(), published.REFINER)]
)
def test_the_published_config_is_read_as_the_model_that_is_built_in(config: UNetConfig, json: dict[str, Any]):
    assert UNetConfig.from_json(json) == config
    assert UNetConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("config, count", [(UNetConfig.sdxl_base(), 6), (UNetConfig.sdxl_refiner(), 5)])
def test_the_number_of_time_ids_follows_from_the_config(config: UNetConfig, count: int):
    assert config.number_of_time_ids == count


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_linear_projection", False),
        ("addition_embed_type", None),
        ("freq_shift", 1),
        ("class_embed_type", "timestep"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D"] * 3),
    ],
)
def test_a_variant_that_sdxl_does_not_use_is_refused_by_name(key: str, value: Any):
    with pytest.raises(ValueError, match=key):
        UNetConfig.from_json({**published.UNET, key: value})


def test_channels_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="norm_num_groups=7"):
        jax.eval_shape(lambda key: UNet(dataclasses.replace(UNET, norm_num_groups=7), key=key), jr.key(0))
