"""AdamW's moments in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization")."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int, Int32, UInt8

from sdxl_eqx.parallel.specs import DENSE, OTHER
from sdxl_eqx.training.rounding import hashed
from sdxl_eqx.weights.names import is_stacked

BLOCK = 256
"""At most so many entries share a scale."""
SHORT = 32
"""Blocks shorter than this would save nothing, and the moments stay float32."""
SMALL = 4096
"""Arrays of fewer entries stay float32, as in bitsandbytes."""
DECADES = 7
"""Powers of ten that a code spans; each has twice as many values as the one below."""


class EightBitState(NamedTuple):
    """Both moments by parameter: codes of the parameter's shape, or float32 where they are not quantised."""

    updates: Int[Array, ""]
    """Done so far; they draw the rounding."""
    mu: Any
    nu: Any
    mu_scale: Any
    """The largest magnitude of each block: the parameter's shape, but for the axis of the blocks; None if float32."""
    nu_scale: Any


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction, as `optax.scale_by_adam`, with moments kept in 8 bits; each update is computed in float32.

    Unlike bitsandbytes' the codes are rounded stochastically, for the reason of `rounded`: to the nearest, a second
    moment would stand still. And one that is not 0 never becomes 0, or its entry would move by mu / eps.
    """

    def init(params: Any) -> EightBitState:
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        codes, scales = [], []
        for path, x in leaves:
            block = block_of(path, x.shape)
            codes.append(jnp.zeros(x.shape, jnp.float32 if block is None else jnp.uint8))
            scales.append(None if block is None else jnp.zeros(block.scales(x.shape), jnp.float32))
        # Arrays of their own, so that the state may be donated.
        mu, nu = structure.unflatten(codes), structure.unflatten([jnp.copy(x) for x in codes])
        nu_scales = [None if x is None else jnp.copy(x) for x in scales]
        return EightBitState(
            jnp.zeros((), jnp.int32), mu, nu, structure.unflatten(scales), structure.unflatten(nu_scales)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.updates + 1
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        parts = [structure.flatten_up_to(x) for x in (state.mu, state.nu, state.mu_scale, state.nu_scale)]

        def one(i: int, path: Any, g: Array, mu: Array, nu: Array, mu_scale: Any, nu_scale: Any) -> Iterator[Any]:
            block = block_of(path, g.shape)
            mu = mu if block is None else dequantise(mu, mu_scale, block, signed=True)
            nu = nu if block is None else dequantise(nu, nu_scale, block, signed=False)
            mu = b1 * mu + (1 - b1) * g
            nu = b2 * nu + (1 - b2) * jnp.square(g)
            yield (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            if block is None:
                yield from (mu, nu, None, None)
                return
            codes, scales = quantise(mu, block, state.updates, 2 * i, signed=True)
            codes_2, scales_2 = quantise(nu, block, state.updates, 2 * i + 1, signed=False)
            yield from (codes, codes_2, scales, scales_2)

        rows = [
            tuple(one(i, path, g, *moments)) for i, ((path, g), *moments) in enumerate(zip(leaves, *parts, strict=True))
        ]
        direction, *moments = (structure.unflatten(list(column)) for column in zip(*rows, strict=True))
        return direction, EightBitState(count, *moments)

    return optax.GradientTransformation(init, update)


class Block(NamedTuple):
    """The entries that share a scale: `size` neighbours along `axis`, which it divides."""

    axis: int
    size: int

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of an array."""
        return (*shape[: self.axis], shape[self.axis] // self.size, *shape[self.axis + 1 :])

    def split(self, x: Array) -> Array:
        """An array with the axis of the blocks in two: which block, and where in it."""
        axis, size = self
        return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def block_of(path: Any, shape: tuple[int, ...]) -> Block | None:
    """The blocks of the parameter at that path; None where its moments stay float32.

    They lie along an axis that FSDP does not share by default, so that a device finds its scales without the others.
    """
    if math.prod(shape) < SMALL:
        return None
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    depth = 1 if is_stacked(name) else 0
    sizes = {axis: _block(shape[axis]) for axis in range(depth, len(shape))}
    local = _local_axis(name, len(shape) - depth) + depth
    axis = local if sizes[local] >= 2 * SHORT else max(sizes, key=lambda axis: sizes[axis])
    return Block(axis, sizes[axis]) if sizes[axis] >= SHORT else None


def quantise(
    x: Float32[Array, "..."], block: Block, count: Int[Array, ""], stream: int, *, signed: bool
) -> tuple[UInt8[Array, "..."], Float32[Array, "..."]]:
    """(codes, scales) of an array, rounded to either neighbour, the nearer one the more often; `count`, `stream` draw.

    No entry is off by more than its neighbours are apart: 1.4% of its block's largest magnitude (0.7% unsigned) in the
    decade below that, and in each decade further down a fifth of this, but thrice as much at the top of each. What is
    below 5.5e-7 (3.25e-7) of the largest may become 0.
    """
    magnitude = jnp.abs(x)
    scales = jnp.max(block.split(magnitude), axis=block.axis + 1)
    a = magnitude / jnp.maximum(_widen(scales, block), jnp.finfo(jnp.float32).tiny)
    below = _floor(a, signed=signed)
    low, high = _value(below, signed=signed), _value(below + 1, signed=signed)
    draw = (hashed(x.shape, count, stream) >> 8).astype(jnp.float32) * 2.0**-24
    # A magnitude of 1 has no neighbour above.
    code = jnp.minimum(below + (draw * (high - low) < a - low), _top(signed))
    if not signed:
        return jnp.where(a > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8), scales
    return jnp.where(x < 0, code + 128, code).astype(jnp.uint8), scales


def dequantise(
    codes: UInt8[Array, "..."], scales: Float32[Array, "..."], block: Block, *, signed: bool
) -> Float32[Array, "..."]:
    """The array of these codes."""
    code = codes.astype(jnp.int32)
    value = _value(jnp.where(code >= 128, code - 128, code) if signed else code, signed=signed) * _widen(scales, block)
    return jnp.where(code >= 128, -value, value) if signed else value


def _top(signed: bool) -> int:
    return 127 if signed else 255


def _value(q: Int32[Array, "..."], *, signed: bool) -> Float32[Array, "..."]:
    """The magnitude, at most 1, that the q-th code stands for: bitsandbytes' `create_dynamic_map`.

    Decade i of 7 has 2^i values if signed, else 2^(i + 1): the middles of as many equal parts of [10^(i-7), 10^(i-6)].
    The largest is 1 on either side (bitsandbytes' negative side ends at 0.993). Arithmetic, and no table: TPUs look up
    slowly.
    """
    fine = 0 if signed else 1
    n = q + fine
    power = 31 - jax.lax.clz(jnp.maximum(n, 1))
    parts = jax.lax.shift_left(jnp.ones_like(n), power)
    value = _tens(power - fine) * (0.1 + 0.9 * ((n - parts).astype(jnp.float32) + 0.5) / parts.astype(jnp.float32))
    return jnp.where(q >= _top(signed), 1.0, jnp.where(q == 0, 0.0, value))


def _floor(a: Float32[Array, "..."], *, signed: bool) -> Int32[Array, "..."]:
    """The largest q whose magnitude is at most a, below the top."""
    fine = 0 if signed else 1
    decade = sum(
        ((a >= _lowest(i, fine)).astype(jnp.int32) for i in range(1, DECADES)), start=jnp.zeros(a.shape, jnp.int32)
    )
    parts = jax.lax.shift_left(jnp.ones_like(decade), decade + fine)
    at = jnp.floor((a / _tens(decade) - 0.1) / 0.9 * parts.astype(jnp.float32) - 0.5).astype(jnp.int32)
    q = parts - fine + jnp.clip(at, 0, parts - 1)
    return jnp.where(a < _lowest(0, fine), 0, jnp.minimum(q, _top(signed) - 1))


def _lowest(decade: int, fine: int) -> float:
    """The smallest magnitude of a decade."""
    return 10.0 ** (decade - DECADES + 1) * (0.1 + 0.45 / 2 ** (decade + fine))


def _tens(decade: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """The upper end of a decade."""
    value = jnp.full(decade.shape, 10.0 ** (1 - DECADES), jnp.float32)
    for i in range(1, DECADES):
        value = jnp.where(decade >= i, 10.0 ** (i - DECADES + 1), value)
    return value


def _widen(scales: Float32[Array, "..."], block: Block) -> Float32[Array, "..."]:
    """The scale of each entry."""
    axis, size = block
    wide = jnp.broadcast_to(
        jnp.expand_dims(scales, axis + 1), (*scales.shape[: axis + 1], size, *scales.shape[axis + 1 :])
    )
    return wide.reshape(*scales.shape[:axis], scales.shape[axis] * size, *scales.shape[axis + 1 :])


def _block(length: int) -> int:
    """The largest block, of at most BLOCK entries, that divides an axis."""
    return max(size for size in range(1, min(length, BLOCK) + 1) if length % size == 0)


def _local_axis(name: str, ndim: int) -> int:
    """The axis that the default rules give to heads, feed-forward or nobody (`parallel.specs`)."""
    if ndim != 2:
        return max(ndim - 2, 0)
    layer = name.removesuffix(".weight").split(".")
    dense = next((DENSE[end] for n in (2, 3, 4) if (end := ".".join(layer[-n:])) in DENSE), OTHER)
    return 1 - dense.index("embed")
