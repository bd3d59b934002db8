"""The autoencoder: diffusers' numbers from the golden files, its config and its posterior."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_models as tiny
import parity_published as published
import pytest
from parity_models import VAE_CONFIG, assert_close, read_golden

from sdxl_eqx.models.vae import VAE, Moments, VAEConfig
from sdxl_eqx.nn.norm import GroupNorm


@pytest.fixture(scope="module")
def vae() -> VAE:
    return tiny.filled(VAE, VAE_CONFIG)


def test_the_moments_are_diffusers_where_pixels_halve_unevenly(vae: VAE):
    golden = read_golden("vae")
    moments = tiny.run_encode(vae, jnp.asarray(tiny.pixels()))
    assert_close(moments.mean, golden["mean"], 1e-4)
    assert_close(moments.logvar, golden["logvar"], 1e-4)


def test_the_decoded_pixels_are_diffusers(vae: VAE):
    assert_close(tiny.run_decode(vae, jnp.asarray(tiny.latents())), read_golden("vae")["pixels"], 1e-4)


def test_the_log_variance_is_clipped(vae: VAE):
    # Half the channels of quant_conv are log-variances: a bias far out on either side.
    bias = jnp.asarray([0, 0, 0, 0, 1e3, 1e3, -1e3, -1e3], jnp.float32)
    far = eqx.tree_at(lambda model: model.quant_conv.bias, vae, bias)
    logvar = np.asarray(tiny.run_encode(far, jnp.asarray(tiny.pixels())).logvar)
    assert (logvar[..., :2] == 20).all()
    assert (logvar[..., 2:] == -30).all()


def test_every_norm_has_diffusers_eps(vae: VAE):
    norms = [
        node for node in jax.tree.leaves(vae, is_leaf=lambda x: isinstance(x, GroupNorm)) if isinstance(node, GroupNorm)
    ]
    assert len(norms) == 2 * 6 + 2 * 9 + 4 * 2 + 2 + 2
    assert {norm.eps for norm in norms} == {1e-6}


def test_a_draw_has_the_posteriors_mean_and_deviation():
    shape = (1, 100, 100, 4)
    moments = Moments(jnp.full(shape, 3.0), jnp.full(shape, 2 * np.log(0.5)))
    draw = np.asarray(moments.sample(key=jr.key(0)))
    assert draw.mean() == pytest.approx(3, abs=0.02)
    assert draw.std() == pytest.approx(0.5, abs=0.02)


def test_the_published_config_is_read_as_the_model_that_is_built_in():
    assert VAEConfig.from_json(published.VAE) == VAEConfig.sdxl_base()
    assert VAEConfig.from_json(VAEConfig.tiny().to_json()) == VAEConfig.tiny()
    assert VAEConfig.sdxl_base().scaling_factor == 0.13025


def test_a_config_without_a_scaling_factor_has_diffusers_default():
    config = {key: value for key, value in published.VAE.items() if key != "scaling_factor"}
    assert VAEConfig.from_json(config).scaling_factor == 0.18215


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_quant_conv", False),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0, 0.0, 0.0, 0.0]),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("out_channels", 4),
    ],
)
def test_a_variant_that_sdxl_does_not_use_is_refused_by_name(key: str, value: Any):
    with pytest.raises(ValueError, match=key):
        VAEConfig.from_json({**published.VAE, key: value})
