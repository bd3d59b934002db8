"""Whole models against diffusers and transformers: their weights, saved by them and read by us, float32."""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_models as tiny
import parity_torch as theirs
import pytest
from parity_models import REFINER, TEXT, TEXT_2, UNET, VAE_CONFIG, assert_close

from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.weights.names import places
from sdxl_eqx.weights.read import clip_key, read_json, read_model, weight_files

pytestmark = pytest.mark.parity

ATOL = 1e-4
SALT = 1
"""Other weights than the golden files'."""


def save(module: Any, folder: Path) -> Path:
    with theirs.their_warnings_are_theirs():
        module.save_pretrained(folder, safe_serialization=True)
    return folder


def read(make: Any, config: Any, folder: Path) -> Any:
    skeleton = eqx.filter_eval_shape(make, config, key=jr.key(0))
    rename = clip_key if make is CLIPText else str
    return read_model(skeleton, weight_files(folder), dtype=np.float32, rename=rename)


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, UNet]:
    module = theirs.their_unet(UNET, salt=SALT)
    folder = save(module, tmp_path_factory.mktemp("unet"))
    assert UNetConfig.from_json(read_json(folder / "config.json")) == UNET
    return module, read(UNet, UNET, folder)


@pytest.mark.parametrize("grid", [(12, 10), (8, 16)], ids=["halves unevenly", "halves evenly"])
def test_the_unet_is_diffusers(unets: tuple[Any, UNet], grid: tuple[int, int]):
    inputs = tiny.unet_inputs(UNET, grid, seed=SALT)
    assert_close(tiny.apply_unet(unets[1], inputs), theirs.their_output(unets[0], inputs), ATOL)


def test_a_unet_of_the_refiners_shape_is_diffusers(tmp_path: Path):
    module = theirs.their_unet(REFINER, salt=SALT)
    folder = save(module, tmp_path)
    assert UNetConfig.from_json(read_json(folder / "config.json")) == REFINER
    inputs = tiny.unet_inputs(REFINER, (10, 12), time_ids=5, seed=SALT)
    ours = tiny.apply_unet(read(UNet, REFINER, folder), inputs)
    assert_close(ours, theirs.their_output(module, inputs), ATOL)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_gradient_of_the_loss_is_autograds(unets: tuple[Any, UNet], prediction_type: str):
    module, unet = unets
    inputs = tiny.unet_inputs(UNET, (12, 10), seed=SALT)
    wanted_loss, wanted = theirs.their_gradient(module, inputs, prediction_type)
    loss, gradient = tiny.unet_gradient(unet, inputs, prediction_type, tiny.PLAIN)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    ours = tiny.file_tensors(gradient)
    assert ours.keys() == wanted.keys()
    total = np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in wanted.values()))
    floor = 1e-3 * total / np.sqrt(len(wanted))
    for key, theirs_g in wanted.items():
        difference, norm = np.linalg.norm(ours[key] - theirs_g), np.linalg.norm(theirs_g)
        assert difference <= 1e-4 * max(norm, floor), f"{key}: off by {difference:.3g} of {norm:.3g}"


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, VAE]:
    module = theirs.their_vae(VAE_CONFIG, salt=SALT)
    folder = save(module, tmp_path_factory.mktemp("vae"))
    assert VAEConfig.from_json(read_json(folder / "config.json")) == VAE_CONFIG
    return module, read(VAE, VAE_CONFIG, folder)


def test_the_encoders_mean_and_logvar_are_diffusers(vaes: tuple[Any, VAE]):
    moments = tiny.run_encode(vaes[1], jnp.asarray(tiny.pixels()))
    mean, logvar = theirs.their_encoding(vaes[0], tiny.pixels())
    assert_close(moments.mean, mean, ATOL)
    assert_close(moments.logvar, logvar, ATOL)


def test_the_decoders_pixels_are_diffusers(vaes: tuple[Any, VAE]):
    pixels = tiny.run_decode(vaes[1], jnp.asarray(tiny.latents()))
    assert_close(pixels, theirs.their_decoding(vaes[0], tiny.latents()), ATOL)


@pytest.mark.parametrize("eos", [2, 49407])
@pytest.mark.parametrize("prefix", [True, False], ids=["with text_model.", "without text_model."])
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_a_text_encoder_is_transformers(which: int, eos: int, prefix: bool, tmp_path: Path):
    config = dataclasses.replace((TEXT, TEXT_2)[which], eos_token_id=eos)
    module = theirs.their_text(config, salt=SALT)
    save(module, tmp_path)
    projection = config.projection_dim is not None
    assert CLIPTextConfig.from_json(read_json(tmp_path / "config.json"), projection=projection) == config
    state = {key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
    if prefix:
        state = {key if key.startswith("text_projection.") else f"text_model.{key}": v for key, v in state.items()}
    theirs.save(state, tmp_path / "model.safetensors")
    ids = tiny.prompt_ids()[which]
    penultimate, pooled = tiny.run_text(read(CLIPText, config, tmp_path), jnp.asarray(ids))
    wanted_penultimate, wanted_pooled = theirs.their_states(module, ids)
    assert_close(penultimate, wanted_penultimate, ATOL)
    assert_close(pooled, wanted_pooled, ATOL)


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_the_files_that_transformers_itself_saves_are_read_too(which: int, tmp_path: Path):
    config = (TEXT, TEXT_2)[which]
    module = theirs.their_text(config, salt=SALT)
    encoder = read(CLIPText, config, save(module, tmp_path))
    ours = tiny.file_tensors(encoder)
    for key, value in theirs.fill(theirs.their_text(config), salt=SALT).state_dict().items():
        if not key.endswith("position_ids"):
            np.testing.assert_array_equal(ours[clip_key(key)], value.numpy())


def test_pooling_takes_the_first_end_token_though_the_padding_is_one_too():
    ids = tiny.prompt_ids()[0]
    assert (ids[:3, -1] == 49407).all(), "the first tokenizer pads with the end token"
    ours = tiny.filled(CLIPText, TEXT)
    _, pooled = tiny.run_text(ours, jnp.asarray(ids))
    cut = np.where(np.arange(77) > np.argmax(ids == 49407, axis=1)[:, None], 0, ids)
    _, without = tiny.run_text(ours, jnp.asarray(cut))
    np.testing.assert_allclose(pooled, without, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(tiny.FULL))
def test_every_key_and_shape_of_the_published_model_is_diffusers(name: str):
    import parity_published as published

    shapes = {
        "unet": (theirs.UNet2DConditionModel, published.UNET),
        "refiner": (theirs.UNet2DConditionModel, published.REFINER),
        "vae": (theirs.AutoencoderKL, published.VAE),
        "text_encoder": (theirs.CLIPTextModel, published.TEXT),
        "text_encoder_2": (theirs.CLIPTextModelWithProjection, published.TEXT_2),
    }
    kind, config = shapes[name]
    with theirs.torch.device("meta"), theirs.their_warnings_are_theirs():
        module = kind(theirs.TorchTextConfig(**config)) if name.startswith("text") else kind(**config)
    ours = tiny.shapes_of(*tiny.FULL[name])
    assert ours == theirs.shapes(module)
    assert len(places(eqx.filter_eval_shape(*tiny.FULL[name], key=jr.key(0)))) <= len(ours)
