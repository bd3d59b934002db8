"""The ControlNet: new it changes nothing, it starts as its UNet, and it learns from its zero convolutions outward."""

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
from parity_models import CONTROLNET, UNET, relative_change

from sdxl_eqx.models.controlnet import FROM_UNET, ControlNet, ControlNetConfig, sum_controls
from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.models.unet import Control, UNet, UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.weights.names import places

GRID = (12, 10)
WIDTHS = CONTROLNET.conditioning_embedding_out_channels
JSON = ControlNetConfig.sdxl_base().to_json()
ZERO = ("controlnet_down_blocks.", "controlnet_mid_block.")
"""What the zero convolutions' keys begin with, but for the picture's own."""


@pytest.fixture(scope="module")
def unet() -> UNet:
    return tiny.filled(UNet, UNET)


@pytest.fixture(scope="module")
def new(unet: UNet) -> ControlNet:
    make = eqx.filter_jit(
        lambda unet, key: ControlNet.from_unet(unet, conditioning_embedding_out_channels=WIDTHS, key=key)
    )
    return make(unet, jr.key(1))


@pytest.fixture(scope="module")
def filled() -> ControlNet:
    return tiny.filled(ControlNet, CONTROLNET)


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return tiny.unet_inputs(UNET, GRID)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return tiny.control_image(CONTROLNET, GRID)


@pytest.fixture(scope="module")
def control(filled: ControlNet, inputs: dict[str, np.ndarray], image: np.ndarray) -> Control:
    return tiny.apply_controlnet(filled, inputs, image)


def test_a_new_controlnet_changes_nothing(
    new: ControlNet, unet: UNet, inputs: dict[str, np.ndarray], image: np.ndarray, control: Control
):
    residuals = tiny.apply_controlnet(new, inputs, image)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(residuals))
    without = tiny.apply_unet(unet, inputs)
    np.testing.assert_allclose(tiny.apply_controlled(unet, inputs, residuals), without, rtol=0, atol=1e-6)
    assert relative_change(without, tiny.apply_controlled(unet, inputs, control)) > 0.1


def test_it_starts_from_copies_of_its_unet(new: ControlNet, unet: UNet):
    ours, theirs = tiny.file_tensors(new), tiny.file_tensors(unet)
    shared = [key for key in ours if key.split(".")[0] in FROM_UNET]
    assert {key.split(".")[0] for key in shared} == set(FROM_UNET)
    for key in shared:
        np.testing.assert_array_equal(ours[key], theirs[key])
    for key in ours.keys() - shared:
        zero = key.startswith((*ZERO, "controlnet_cond_embedding.conv_out."))
        assert np.any(ours[key]) != zero, key
    buffers = [model.conv_in.weight.unsafe_buffer_pointer() for model in (new, unet)]
    assert buffers[0] != buffers[1], "a train step donates the ControlNet's, and the UNet lives on"


def test_there_is_one_zero_convolution_for_each_skip_of_the_unet(control: Control):
    assert [residual.shape for residual in control.down] == [
        (2, 12, 10, 32),
        (2, 12, 10, 32),
        (2, 6, 5, 32),
        (2, 6, 5, 48),
        (2, 3, 3, 48),
        (2, 3, 3, 64),
    ]
    assert control.mid.shape == (2, 3, 3, 64)


def test_every_leaf_is_an_array_and_none_is_shared(new: ControlNet):
    leaves = jax.tree.leaves(new)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len({id(leaf) for leaf in leaves}) == len(leaves)


def test_the_scale_multiplies_every_residual(
    filled: ControlNet, inputs: dict[str, np.ndarray], image: np.ndarray, control: Control
):
    scaled = tiny.apply_controlnet(filled, inputs, image, scale=0.25)
    for one, whole in zip(jax.tree.leaves(scaled), jax.tree.leaves(control), strict=True):
        np.testing.assert_array_equal(one, 0.25 * whole)


@pytest.mark.parametrize("name", ["x", "t", "context", "pooled", "time_ids", "image"])
def test_every_input_moves_the_residuals(
    name: str, filled: ControlNet, inputs: dict[str, np.ndarray], image: np.ndarray, control: Control
):
    given = {**inputs, "image": image}
    changed = given | {name: given[name][::-1] if name in ("t", "time_ids", "image") else -given[name]}
    moved = tiny.apply_controlnet(filled, changed, changed["image"])
    assert relative_change(control.mid, moved.mid) > 1e-2
    assert relative_change(control.down[-1], moved.down[-1]) > 1e-2


def test_several_controls_are_summed(control: Control):
    double = sum_controls([control, control])
    assert jax.tree.structure(double) == jax.tree.structure(control)
    for two, one in zip(jax.tree.leaves(double), jax.tree.leaves(control), strict=True):
        np.testing.assert_array_equal(two, 2 * one)
    with pytest.raises(ValueError, match="at least one"):
        sum_controls([])


def test_at_first_only_the_zero_convolutions_learn_and_then_what_is_behind_them(
    new: ControlNet, unet: UNet, inputs: dict[str, np.ndarray], image: np.ndarray
):
    arguments, target, picture = tiny.unet_arguments(inputs), jnp.asarray(inputs["eps"]), jnp.asarray(image)

    @jax.jit
    def gradient(net: ControlNet) -> ControlNet:
        def loss(net: ControlNet) -> Array:
            control = net(*arguments.values(), image=picture, compute=Compute(remat="full"))
            return jnp.mean(jnp.square(unet(*arguments.values(), control=control) - target))

        return jax.grad(loss)(net)

    first = gradient(new)
    for key, value in tiny.file_tensors(first).items():
        assert np.any(value) == key.startswith(ZERO), key
    second = gradient(jax.tree.map(lambda w, g: w - 0.1 * g, new, first))
    behind = ("controlnet_cond_embedding.conv_in.", "controlnet_cond_embedding.blocks.")
    for key, value in tiny.file_tensors(second).items():
        assert np.isfinite(value).all() and np.any(value) != key.startswith(behind), key


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_layer_changes_the_dtype_by_silent_promotion(
    dtype: Any, filled: ControlNet, inputs: dict[str, np.ndarray], image: np.ndarray
):
    def attend(query: Array, key: Array, value: Array, *, causal: bool = False) -> Array:
        assert query.dtype == key.dtype == value.dtype == dtype
        return query

    arguments = {**tiny.unet_arguments(inputs), "x": jnp.asarray(inputs["x"], dtype)}
    net = cast(filled, dtype)
    with jax.numpy_dtype_promotion("strict"):
        control = jax.eval_shape(
            lambda scale: net(
                *arguments.values(), image=jnp.asarray(image), scale=scale, compute=Compute(attend=attend)
            ),
            jnp.float32(0.7),
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(control)} == {jnp.dtype(dtype)}


def test_an_image_of_another_size_is_refused(filled: ControlNet, inputs: dict[str, np.ndarray], image: np.ndarray):
    with pytest.raises(ValueError, match=r"8 times as high and wide as the latents \(12, 10\), so \(96, 80\)"):
        filled(*tiny.unet_arguments(inputs).values(), image=jnp.asarray(image[:, :-1]))


def test_residuals_of_another_unet_are_refused(unet: UNet, inputs: dict[str, np.ndarray], control: Control):
    fewer = Control(control.down[:-1], control.mid)
    with pytest.raises(ValueError, match=r"must have 6 residuals.*got 5"):
        jax.eval_shape(lambda model: model(*tiny.unet_arguments(inputs).values(), control=fewer), unet)


def test_a_config_is_written_as_diffusers_has_it_and_read_back(new: ControlNet):
    base = ControlNetConfig.sdxl_base()
    assert ControlNetConfig.from_json(JSON) == base
    assert JSON["_class_name"] == "ControlNetModel"
    assert not JSON.keys() & {"out_channels", "sample_size", "up_block_types"}
    other = dataclasses.replace(CONTROLNET, conditioning_channels=1)
    assert ControlNetConfig.from_json(other.to_json()).to_json() == other.to_json()
    assert new.config == ControlNetConfig.from_json(CONTROLNET.to_json())
    assert new.config.downscale == base.downscale == 8


@pytest.mark.parametrize(
    "key, value",
    [
        ("_class_name", "ControlNetUnionModel"),
        ("global_pool_conditions", True),
        ("controlnet_conditioning_channel_order", "bgr"),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("encoder_hid_dim", 64),
        ("encoder_hid_dim_type", "text_proj"),
        ("mid_block_type", "UNetMidBlock2D"),
        ("addition_embed_type", None),
        ("use_linear_projection", False),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]),
    ],
)
def test_a_variant_that_sdxl_does_not_use_is_refused_by_name(key: str, value: Any):
    with pytest.raises(ValueError, match=f"controlnet config: {key}"):
        ControlNetConfig.from_json({**JSON, key: value})


@pytest.mark.parametrize("key", ["addition_embed_type", "use_linear_projection"])
def test_the_config_of_an_older_controlnet_that_lacks_a_key_is_refused_by_it(key: str):
    with pytest.raises(ValueError, match=f"controlnet config: {key}"):
        ControlNetConfig.from_json({name: value for name, value in JSON.items() if name != key})


def test_the_published_unets_controlnet_has_every_part_of_its_unet_but_the_way_up():
    config = ControlNetConfig.sdxl_base()
    assert config.unet == UNetConfig.from_json(published.UNET)
    ours, unet = tiny.shapes_of(ControlNet, config), tiny.shapes_of(UNet, config.unet)
    assert {k: v for k, v in ours.items() if k.split(".")[0] in FROM_UNET} == {
        k: v for k, v in unet.items() if k.split(".")[0] in FROM_UNET
    }
    skeleton = eqx.filter_eval_shape(ControlNet, config, key=jr.key(0))
    assert [place.shape for place in places(skeleton.controlnet_down_blocks)[::2]] == [
        (c, c, 1, 1) for c in (320, 320, 320, 320, 640, 640, 640, 1280, 1280)
    ]
