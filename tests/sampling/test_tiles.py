"""Tiles: where they lie, how they blend, and that they hold back what one picture needs."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_eqx.models.vae import VAE
from sdxl_eqx.sampling import tiles
from sdxl_eqx.sampling.tiles import decode_tiled, encode_tiled, tile_sides

CONFIG = dataclasses.replace(tiny.VAE_CONFIG, block_out_channels=(16, 24), layers_per_block=1, sample_size=32)
"""Small, since every shape of a tile is compiled; two pixels to a latent."""

SIDE = 16
"""Of a tile in pixels: 8 latents, 6 from one tile to the next."""


@pytest.fixture(scope="module")
def vae() -> VAE:
    return tiny.filled(VAE, CONFIG)


def compiled(function: Any, *args: Any) -> Any:
    """A function compiled for arguments of these shapes; quickly, as none of it is long to run."""
    options: Any = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*args).compile(compiler_options=options)


def decode(vae: VAE, z: Any, tile: int) -> np.ndarray:
    return np.asarray(compiled(lambda vae, z: decode_tiled(vae, z, tile=tile), vae, z)(vae, z))


def decode_whole(vae: VAE, z: Any) -> np.ndarray:
    return np.asarray(compiled(lambda vae, z: vae.decode(z), vae, z)(vae, z))


def noise(*shape: int) -> np.ndarray:
    return tiny.generator("tiles", shape).standard_normal(shape).astype(np.float32)


@given(st.integers(1, 300), st.integers(1, 8).map(lambda n: 4 * n))
def test_tiles_cover_an_axis_and_have_at_most_three_lengths(length: int, side: int):
    sides = tile_sides(length, side)
    assert set().union(*(range(i, i + n) for i, n in sides)) == set(range(length))
    # What is kept of each tile, three quarters, meets the next one, and nothing of the last one is lost.
    assert [i for i, _ in sides] == [3 * side // 4 * k for k in range(len(sides))]
    assert sides[-1][1] <= 3 * side // 4
    assert len({n for _, n in sides}) <= (3 if sides[-1][1] < side // 4 else 2)


def test_a_picture_no_larger_than_a_tile_is_decoded_whole(vae: VAE):
    z = jnp.asarray(noise(1, 8, 6, 4))
    np.testing.assert_array_equal(decode(vae, z, SIDE), decode_whole(vae, z))


def test_the_default_tile_is_the_autoencoders_own(vae: VAE):
    z = jnp.asarray(noise(1, 16, 16, 4))  # 32 pixels, its sample_size
    np.testing.assert_array_equal(decode(vae, z, 0), decode_whole(vae, z))


def test_a_corner_comes_from_the_first_tile_alone(vae: VAE):
    z = noise(1, 12, 6, 4)
    whole = decode(vae, jnp.asarray(z), SIDE)
    corner = decode_whole(vae, jnp.asarray(z[:, :8]))
    tiny.assert_close(whole[:, :12], corner[:, :12], 1e-5)


def test_tiles_fade_into_each_other():
    # Tiles of 8 with levels of their own: 6 are kept of each, the first 2 of the next run from the one to the other.
    ones = jnp.ones((1, 8, 8, 1))
    made = tiles._blended([[0 * ones, 4 * ones], [8 * ones[:, :6], 12 * ones[:, :6]]], 8)[0, :, :, 0]
    assert made.shape == (12, 12)
    np.testing.assert_allclose(made[0, 5:9], [0, 0, 2, 4])
    np.testing.assert_allclose(made[5:9, 0], [0, 0, 4, 8])


def test_each_shape_is_compiled_once(vae: VAE):
    z = jax.ShapeDtypeStruct((1, 23, 40, 4), jnp.float32)  # rows of 8, 8, 8, 5; columns of 8 (6 of them), 4
    loops = str(jax.make_jaxpr(lambda z: decode_tiled(vae, z, tile=SIDE))(z)).count("= scan[")
    assert loops == 2 * 2


def test_memory_is_that_of_a_tile(vae: VAE):
    z = jax.ShapeDtypeStruct((1, 120, 6, 4), jnp.float32)
    whole, tiled = (
        compiled(lambda z, tile=tile: decode_tiled(vae, z, tile=tile), z).memory_analysis().temp_size_in_bytes
        for tile in (240, SIDE)
    )
    output = 240 * 12 * 3 * 4
    assert tiled < 8 * output < whole


@pytest.mark.parametrize("tile", [-16, 20, 9])
def test_a_tile_without_whole_overlaps_is_an_error(vae: VAE, tile: int):
    for function, x in ((decode_tiled, noise(1, 20, 20, 4)), (encode_tiled, noise(1, 40, 40, 3))):
        with pytest.raises(ValueError, match="multiple of 8"):
            function(vae, jnp.asarray(x), tile=tile)


def test_pixels_that_are_no_whole_latents_are_an_error(vae: VAE):
    with pytest.raises(ValueError, match=r"21x20 .*multiples of 2"):
        encode_tiled(vae, jnp.asarray(noise(1, 20, 21, 3)), tile=SIDE)


def test_the_log_variance_is_clipped_after_blending(vae: VAE):
    bias = jnp.asarray([0, 0, 0, 0, 1e3, 1e3, -1e3, -1e3], jnp.float32)
    far: Any = eqx.tree_at(lambda model: model.quant_conv.bias, vae, bias)
    x = jnp.asarray(noise(1, 20, 12, 3))
    moments = compiled(lambda vae, x: encode_tiled(vae, x, tile=SIDE), far, x)(far, x)
    assert moments.mean.shape == (1, 10, 6, 4)
    assert (np.asarray(moments.logvar[..., :2]) == 20).all()
    assert (np.asarray(moments.logvar[..., 2:]) == -30).all()
