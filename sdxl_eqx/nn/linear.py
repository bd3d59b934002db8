"""The dense layer."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Float32, Int8, PRNGKeyArray

Dot = Callable[[Any, Any, Any], Any]
"""A matrix product with the first three arguments of `jax.lax.dot_general`; equal and hashed by what it computes."""


class Int8Weight(eqx.Module):
    """A weight that does not train, as whole numbers from -127 to 127 and a scale for each output."""

    values: Int8[Array, "*depth c_out c_in"]
    scale: Float32[Array, "*depth c_out 1"]

    @classmethod
    def of(cls, weight: Float[Array, "*depth c_out c_in"]) -> "Int8Weight":
        """A weight, rounded to the nearest of them: each is off by at most 1/254 of its output's largest."""
        weight = weight.astype(jnp.float32)
        largest = jnp.max(jnp.abs(weight), axis=-1, keepdims=True)
        scale = jnp.where(largest > 0, largest / 127, 1.0)
        return cls(jnp.round(weight / scale).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """That of the scales, in which the weight is made again."""
        return self.scale.dtype

    def astype(self, dtype: Any) -> Float[Array, "*depth c_out c_in"]:
        """The weight as numbers of a floating dtype."""
        return (self.values * self.scale).astype(dtype)


class Linear(eqx.Module):
    """`x @ weight.T + bias`, over the last axis; the layout and the initial values of `torch.nn.Linear`.

    `dot` computes the product: `quantize.py` has those that round what they multiply.
    """

    weight: Float[Array, "c_out c_in"] | Int8Weight
    bias: Float[Array, " c_out"] | None
    dot: Dot = eqx.field(static=True)

    def __init__(self, c_in: int, c_out: int, *, use_bias: bool = True, key: PRNGKeyArray):
        weight_key, bias_key = jr.split(key)
        bound = 1 / math.sqrt(c_in)
        self.weight = jr.uniform(weight_key, (c_out, c_in), jnp.float32, -bound, bound)
        self.bias = jr.uniform(bias_key, (c_out,), jnp.float32, -bound, bound) if use_bias else None
        self.dot = jax.lax.dot_general

    def __call__(self, x: Float[Array, "*b c_in"]) -> Float[Array, "*b c_out"]:
        y = self.dot(x, self.weight, (((x.ndim - 1,), (1,)), ((), ())))
        return y if self.bias is None else y + self.bias.reshape((1,) * (y.ndim - 1) + (-1,))
