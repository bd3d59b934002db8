"""The autoencoder on pictures too large for it: tile by tile, overlapping, blended where they overlap.

As diffusers' AutoencoderKL with `enable_tiling` (`tiled_decode`, `_tiled_encode`; tile_overlap_factor 0.25). Tiles
know nothing of each other, so that norms and attention see one tile alone: the result is not that of the whole.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdxl_eqx.models.vae import VAE, Moments
from sdxl_eqx.nn.compute import Compute

Grid = list[list[Array]]
"""Tiles `[b, h, w, c]` by row and column; those of the last ones may be smaller."""


def decode_tiled(
    vae: VAE, z: Float[Array, "b h w c"], *, compute: Compute = Compute(), tile: int = 0
) -> Float[Array, "b H W c3"]:
    """Pixels, about [-1, 1], of latents that were divided by scaling_factor. To be compiled by the caller.

    Args:
        tile: side of a tile in pixels; 0 is what the autoencoder was made for (1024 for SDXL).

    Raises:
        ValueError: the tile does not divide into four overlaps of whole latents.
    """
    scale = vae.config.downscale
    side = _side(vae, tile) // scale
    if max(z.shape[1:3]) <= side:
        return vae.decode(z, compute=compute)
    tiles = _each_tile(lambda part: vae.decode(part, compute=compute), z, side)
    return _blended(tiles, side * scale)


def encode_tiled(vae: VAE, pixels: Float[Array, "b H W c"], *, compute: Compute = Compute(), tile: int = 0) -> Moments:
    """Posterior of pixels in [-1, 1], as `VAE.encode` gives it. To be compiled by the caller.

    Args:
        tile: side of a tile in pixels; 0 is what the autoencoder was made for (1024 for SDXL).

    Raises:
        ValueError: the tile does not divide into four overlaps of whole latents, or a side of the picture not into
            latents.
    """
    scale = vae.config.downscale
    side = _side(vae, tile)
    if max(pixels.shape[1:3]) <= side:
        return vae.encode(pixels, compute=compute)
    if pixels.shape[1] % scale or pixels.shape[2] % scale:
        raise ValueError(
            f"pictures of {pixels.shape[2]}x{pixels.shape[1]} cannot be encoded in tiles; both sides must be multiples "
            f"of {scale}: crop or resize them"
        )
    # What is blended are the channels from which the moments are made, before the clip of the log-variance.
    tiles = _each_tile(lambda part: vae.quant_conv(vae.encoder(part, compute)), pixels, side)
    mean, logvar = jnp.split(_blended(tiles, side // scale), 2, axis=-1)
    return Moments(mean, jnp.clip(logvar, -30.0, 20.0))


def tile_sides(length: int, side: int) -> list[tuple[int, int]]:
    """(start, length) of the tiles along an axis: each begins three quarters of a tile after the one before."""
    return [(start, min(side, length - start)) for start in range(0, length, 3 * side // 4)]


def _side(vae: VAE, tile: int) -> int:
    """The side of a tile in pixels."""
    side = tile or vae.config.sample_size
    unit = 4 * vae.config.downscale
    if side <= 0 or side % unit:
        raise ValueError(f"a tile of {side} pixels has no overlap of whole latents; give a multiple of {unit}")
    return side


def _each_tile(function: Callable[[Array], Array], x: Float[Array, "b h w c"], side: int) -> Grid:
    """A function's results on each tile of `x`, one after the other.

    Tiles of one shape share one loop: its body is compiled once and holds the activations of one tile. There are two
    lengths along an axis, three where the last tile is shorter than a quarter; so four shapes in most pictures, and
    at most nine.
    """
    rows, columns = (tile_sides(length, side) for length in x.shape[1:3])
    tiles: dict[tuple[int, int], Array] = {}
    for h in _distinct(rows):
        for w in _distinct(columns):
            starts = [(i, j) for i, height in rows for j, width in columns if (height, width) == (h, w)]

            def one(start: Array, h: int = h, w: int = w) -> Array:
                corner = (0, start[0], start[1], 0)
                return function(jax.lax.dynamic_slice(x, corner, (x.shape[0], h, w, x.shape[3])))

            results = jax.lax.map(one, jnp.asarray(np.array(starts, np.int32)))
            tiles.update(zip(starts, results, strict=True))
    return [[tiles[i, j] for j, _ in columns] for i, _ in rows]


def _distinct(sides: Sequence[tuple[int, int]]) -> list[int]:
    return sorted({length for _, length in sides}, reverse=True)


def _blended(tiles: Grid, side: int) -> Array:
    """One picture of tiles of that side: a tile fades in over the quarter that it shares with the one above it, then
    with the one to its left, each of which has been blended itself."""
    overlap, kept = side // 4, side - side // 4
    above: list[Array] = []
    rows = []
    for row in tiles:
        done: list[Array] = []
        for j, tile in enumerate(row):
            if above:
                tile = _faded(above[j], tile, overlap, axis=1)
            if j:
                tile = _faded(done[-1], tile, overlap, axis=2)
            done.append(tile)
        rows.append(jnp.concatenate([tile[:, :kept, :kept] for tile in done], axis=2))
        above = done
    return jnp.concatenate(rows, axis=1)


def _faded(a: Float[Array, "b h1 w1 c"], b: Float[Array, "b h w c"], overlap: int, *, axis: int) -> Array:
    """`b`, whose beginning along an axis is faded in from the end of `a` (diffusers' `blend_v`, `blend_h`)."""
    n = min(a.shape[axis], b.shape[axis], overlap)
    shape = [1, 1, 1, 1]
    shape[axis] = n
    share = jnp.reshape(jnp.arange(n, dtype=b.dtype) / n, shape)
    end = jax.lax.slice_in_dim(a, a.shape[axis] - n, a.shape[axis], axis=axis)
    start, rest = jnp.split(b, [n], axis=axis)
    return jnp.concatenate([end * (1 - share) + start * share, rest], axis=axis)
