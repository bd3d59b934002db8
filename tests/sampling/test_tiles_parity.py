"""Tiles against diffusers' `enable_tiling`, over the tiny autoencoder."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import parity_torch as theirs
import pytest

from sdxl_eqx.models.vae import VAE
from sdxl_eqx.sampling.tiles import decode_tiled, encode_tiled

pytestmark = pytest.mark.parity

CONFIG = dataclasses.replace(tiny.VAE_CONFIG, block_out_channels=(16, 24), layers_per_block=1)
"""Small, since every shape of a tile is compiled; two pixels to a latent."""

SIDE = 16

# In latents, a tile of 8, 6 from one to the next: whole, one axis only, lasts of 2 and 6, lasts below a quarter (1).
SIZES = [(8, 8), (6, 16), (14, 18), (13, 7)]


@pytest.fixture(scope="module")
def tiling() -> Any:
    """diffusers' autoencoder with tiles of SIDE pixels."""
    vae = theirs.their_vae(CONFIG)
    vae.enable_tiling()
    vae.tile_sample_min_size = SIDE
    vae.tile_latent_min_size = SIDE // CONFIG.downscale
    return vae


@pytest.fixture(scope="module")
def vae() -> VAE:
    return tiny.filled(VAE, CONFIG)


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what it costs
def both(vae: VAE, z: Any, x: Any) -> Any:
    moments = encode_tiled(vae, x, tile=SIDE)
    return decode_tiled(vae, z, tile=SIDE), moments.mean, moments.logvar


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_diffusers(vae: VAE, tiling: Any, size: tuple[int, int]):
    h, w = size
    rng = tiny.generator("tiles", size)
    z = rng.standard_normal((2, h, w, 4)).astype(np.float32)
    x = rng.uniform(-1, 1, (2, 2 * h, 2 * w, 3)).astype(np.float32)
    pixels, mean, logvar = both(vae, jnp.asarray(z), jnp.asarray(x))
    their_mean, their_logvar = theirs.their_encoding(tiling, x)
    tiny.assert_close(pixels, theirs.their_decoding(tiling, z), 1e-4)
    tiny.assert_close(mean, their_mean, 1e-4)
    tiny.assert_close(logvar, their_logvar, 1e-4)


def test_tiling_is_what_makes_the_difference(tiling: Any):
    z = tiny.generator("whole").standard_normal((1, 12, 12, 4)).astype(np.float32)
    whole = theirs.their_decoding(theirs.their_vae(CONFIG), z)
    assert np.abs(whole - theirs.their_decoding(tiling, z)).max() > 0.1
