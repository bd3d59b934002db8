"""Moments in bfloat16: rounded so that they are right on average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int, UInt32

EXACT = "params0"
"""Prodigy's first weights: what matters is how little the weights have moved from them."""


class RoundedState(NamedTuple):
    """The state of an optimizer whose moments are kept in bfloat16."""

    updates: Int[Array, ""]
    """Done so far; they draw the rounding."""
    inner: Any


def rounded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` with its moments kept in bfloat16, rounded stochastically; each update is computed in float32.

    To the nearest, a second moment would stand still: AdamW's step towards the new square is at most 0.1% of it, and
    neighbours in bfloat16 are 0.4 to 0.8% apart. Rounded up as often as the distance says, it moves right on average
    (Zamirai et al. 2020, "Revisiting BFloat16 Training"). Single numbers and Prodigy's first weights stay as they are.
    """

    def narrow(path: Any, x: Any) -> Any:
        return x.astype(jnp.bfloat16) if is_moment(path, x) else x

    def init(params: Any) -> RoundedState:
        return RoundedState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(narrow, optimizer.init(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        inner = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state.inner)
        updates, inner = optimizer.update(updates, inner, params)
        leaves, structure = jax.tree_util.tree_flatten_with_path(inner)
        kept = [stochastic_round(x, state.updates, i) if is_moment(p, x) else x for i, (p, x) in enumerate(leaves)]
        return updates, RoundedState(state.updates + 1, jax.tree.unflatten(structure, kept))

    return optax.GradientTransformation(init, update)


def is_moment(path: Any, x: Any) -> bool:
    """Whether an array of an optimizer's state is one of its moments."""
    is_exact = any(getattr(part, "name", None) == EXACT for part in path)
    return x.ndim > 0 and jnp.issubdtype(x.dtype, jnp.floating) and not is_exact


def stochastic_round(x: Float32[Array, "..."], count: Int[Array, ""], stream: int) -> BFloat16[Array, "..."]:
    """float32 to one of its two neighbours in bfloat16, the nearer one the more often; `count` and `stream` draw."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (hashed(x.shape, count, stream) >> 16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def hashed(shape: tuple[int, ...], count: Int[Array, ""], stream: int) -> UInt32[Array, "..."]:
    """Noise of all 32 bits that follows from `count` and `stream`.

    It is an integer hash of an entry's index (Wellons 2018, `lowbias32`): it costs no memory and fuses with the update.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mix(index ^ _mix(count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(stream)))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
