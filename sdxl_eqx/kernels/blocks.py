"""Padding a sequence up to the blocks of a kernel."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def round_up(length: int, multiple: int) -> int:
    """The first multiple that holds `length`."""
    return -(-length // multiple) * multiple


def pad_length(x: Float[Array, "b l n d"], length: int) -> Float[Array, "b length n d"]:
    """`x` with zeros after its end, up to `length` tokens."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
