"""The ControlNet against diffusers': its weights, saved by it and read by us, float32; zero convolutions filled."""

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import parity_models as tiny
import parity_published as published
import parity_torch as theirs
import pytest
from parity_models import CONTROLNET, UNET, assert_close

from sdxl_eqx.models.controlnet import ControlNet, ControlNetConfig, sum_controls
from sdxl_eqx.models.unet import Control, UNet
from sdxl_eqx.weights.read import read_json, read_model, weight_files

pytestmark = pytest.mark.parity

ATOL = 1e-4
SALT = 2
SCALE = 0.7
GRIDS = [(12, 10), (8, 16)]
WIDTHS = CONTROLNET.conditioning_embedding_out_channels
AS_READ = ControlNetConfig.from_json(CONTROLNET.to_json())


@pytest.fixture(scope="module")
def their_unet() -> Any:
    return theirs.their_unet(UNET, salt=SALT)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return tiny.filled(UNet, UNET, salt=SALT)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ControlNet]:
    """(diffusers' ControlNet, ours with the weights that it saved)."""
    module, folder = theirs.their_controlnet(CONTROLNET, salt=SALT), tmp_path_factory.mktemp("controlnet")
    with theirs.their_warnings_are_theirs():
        module.save_pretrained(folder, safe_serialization=True)
    assert ControlNetConfig.from_json(read_json(folder / "config.json")) == AS_READ
    skeleton = eqx.filter_eval_shape(ControlNet, AS_READ, key=jr.key(0))
    return module, read_model(skeleton, weight_files(folder), dtype=np.float32)


def assert_control_close(ours: Control, down: list[np.ndarray], mid: np.ndarray) -> None:
    for residual, wanted in zip((*ours.down, ours.mid), (*down, mid), strict=True):
        assert_close(residual, wanted, ATOL)


@pytest.mark.parametrize("grid", GRIDS, ids=["halves unevenly", "halves evenly"])
def test_the_residuals_and_the_unets_output_with_them_are_diffusers(
    nets: tuple[Any, ControlNet], their_unet: Any, unet: UNet, grid: tuple[int, int]
):
    inputs, image = tiny.unet_inputs(UNET, grid, seed=SALT), tiny.control_image(CONTROLNET, grid)
    down, mid, output = theirs.their_controlled_output(their_unet, nets[0], inputs, image, SCALE)
    control = tiny.apply_controlnet(nets[1], inputs, image, SCALE)
    assert_control_close(control, down, mid)
    ours = tiny.apply_controlled(unet, inputs, control)
    assert_close(ours, output, ATOL)
    assert tiny.relative_change(theirs.their_output(their_unet, inputs), ours) > 0.1


def test_the_sum_of_two_controlnets_is_diffusers(nets: tuple[Any, ControlNet], their_unet: Any, unet: UNet):
    inputs = tiny.unet_inputs(UNET, GRIDS[0], seed=SALT)
    images = [tiny.control_image(CONTROLNET, GRIDS[0], seed=seed) for seed in (0, 1)]
    scales = [SCALE, 0.4]
    both = theirs.MultiControlNetModel([nets[0], nets[0]])
    down, mid, output = theirs.their_controlled_output(their_unet, both, inputs, images, scales)
    parts = [tiny.apply_controlnet(nets[1], inputs, *given) for given in zip(images, scales, strict=True)]
    control = sum_controls(parts)
    assert_control_close(control, down, mid)
    assert_close(tiny.apply_controlled(unet, inputs, control), output, ATOL)


def test_every_key_holds_what_diffusers_holds_under_it(nets: tuple[Any, ControlNet]):
    ours, state = tiny.file_tensors(nets[1]), nets[0].state_dict()
    assert ours.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(ours[key], value.numpy(), err_msg=key)


def test_a_config_that_we_write_has_no_key_that_diffusers_does_not_know():
    known = inspect.signature(theirs.ControlNetModel.__init__).parameters
    written = ControlNetConfig.sdxl_base().to_json()
    assert written.pop("_class_name") == theirs.ControlNetModel.__name__
    assert written.keys() <= known.keys()


def test_every_key_and_shape_of_sdxls_controlnet_is_diffusers():
    names = inspect.signature(theirs.ControlNetModel.__init__).parameters
    config = {key: value for key, value in published.UNET.items() if key in names}
    with theirs.torch.device("meta"), theirs.their_warnings_are_theirs():
        module = theirs.ControlNetModel(**config, conditioning_embedding_out_channels=[16, 32, 96, 256])
    full = {**module.config, "_class_name": theirs.ControlNetModel.__name__}
    assert ControlNetConfig.from_json(full) == ControlNetConfig.sdxl_base()
    assert tiny.shapes_of(ControlNet, ControlNetConfig.sdxl_base()) == theirs.shapes(module)


def test_from_unet_gives_each_key_what_diffusers_from_unet_gives_it(their_unet: Any, unet: UNet):
    with theirs.their_warnings_are_theirs():
        module = theirs.ControlNetModel.from_unet(their_unet, conditioning_embedding_out_channels=WIDTHS)
    make = jax.jit(lambda unet, key: ControlNet.from_unet(unet, conditioning_embedding_out_channels=WIDTHS, key=key))
    net = make(unet, jr.key(3))
    assert net.config == AS_READ
    ours, state = tiny.file_tensors(net), module.state_dict()
    assert ours.keys() == state.keys()
    drawn = ("controlnet_cond_embedding.conv_in.", "controlnet_cond_embedding.blocks.")
    for key, value in state.items():
        if key.startswith(drawn):
            bounds = [np.abs(x).max() for x in (ours[key], value.numpy())]
            assert ours[key].shape == tuple(value.shape) and bounds[0] == pytest.approx(bounds[1], rel=0.5), key
        else:
            np.testing.assert_array_equal(ours[key], value.numpy(), err_msg=key)
