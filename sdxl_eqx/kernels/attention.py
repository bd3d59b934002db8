"""Attention by XLA: the reference that every other implementation is compared with."""

import jax
from jaxtyping import Array, Float


def dot_product(
    query: Float[Array, "b l n d"],
    key: Float[Array, "b s n d"],
    value: Float[Array, "b s n d"],
    *,
    causal: bool = False,
) -> Float[Array, "b l n d"]:
    """Attention with the whole score matrix in memory, scores and softmax in float32."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="xla")
