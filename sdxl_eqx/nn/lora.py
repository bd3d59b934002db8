"""Low-rank changes of a layer that train while the layer stays as it is (LoRA and DoRA)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from sdxl_eqx.nn.conv import Conv2d
from sdxl_eqx.nn.linear import Linear

M = TypeVar("M")

FIELDS = ("lora_down", "lora_up", "lora_magnitude")
"""The arrays of a change; in a model's tree, no others' names end so."""


@dataclass(frozen=True)
class LoraShape:
    """What the changes of a model have in common.

    The change of a weight is `strength * up @ down` (Hu et al. 2021, section 4.1).
    """

    rank: int
    strength: float
    """alpha / rank, or with rank stabilization alpha / sqrt(rank) (Kalajdzievski 2023)."""
    dropout: float = 0.0
    """Share of the inputs that the change does not see while it trains."""
    dora: bool = False
    """Train the size of each output's weights apart from their direction (Liu et al. 2024)."""


class LoraLinear(Linear):
    """A dense layer and its change; PEFT's `lora.Linear`, whose initial values it has."""

    lora_down: Float[Array, "r c_in"]
    lora_up: Float[Array, "c_out r"]
    lora_magnitude: Float[Array, " c_out"] | None
    """DoRA's size of each output's weights."""
    lora_key: PRNGKeyArray | None
    """What the dropout draws by; None: nothing is dropped."""
    lora: LoraShape = eqx.field(static=True)

    def __init__(self, base: Linear, lora: LoraShape, *, key: PRNGKeyArray):
        self.weight, self.bias, self.dot = base.weight, base.bias, base.dot
        c_out, c_in = base.weight.shape
        bound = 1 / math.sqrt(c_in)
        self.lora_down = jr.uniform(key, (lora.rank, c_in), jnp.float32, -bound, bound)
        self.lora_up = jnp.zeros((c_out, lora.rank))
        self.lora_magnitude = jnp.linalg.norm(base.weight.astype(jnp.float32), axis=1) if lora.dora else None
        self.lora_key, self.lora = None, lora

    def __call__(self, x: Float[Array, "*b c_in"]) -> Float[Array, "*b c_out"]:
        y, seen = super().__call__(x), _dropped(x, self.lora_key, self.lora.dropout)
        over = ((x.ndim - 1,), (1,)), ((), ())
        change = jax.lax.dot_general(jax.lax.dot_general(seen, self.lora_down, over), self.lora_up, over)
        change = change * self.lora.strength
        if self.lora_magnitude is None:
            return y + change
        weight = self.weight.astype(self.lora_up.dtype)  # that of the computation already, where it is no Int8Weight
        whole = weight + self.lora.strength * jax.lax.dot(self.lora_up, self.lora_down)
        factor = _factor(self.lora_magnitude, whole, axes=(1,)).reshape((1,) * (y.ndim - 1) + (-1,))
        plain = y if self.bias is None else y - self.bias.reshape((1,) * (y.ndim - 1) + (-1,))
        if seen is not x:
            plain = self.dot(seen, self.weight, over)
        return y + (factor - 1).astype(y.dtype) * plain + factor.astype(y.dtype) * change


class LoraConv2d(Conv2d):
    """A convolution and its change: one to the rank with the same kernel, then one of 1 x 1; PEFT's `lora.Conv2d`."""

    lora_down: Float[Array, "k k c_in r"]
    lora_up: Float[Array, "1 1 r c_out"]
    lora_magnitude: Float[Array, " c_out"] | None
    """DoRA's size of each output's weights."""
    lora_key: PRNGKeyArray | None
    """What the dropout draws by; None: nothing is dropped."""
    lora: LoraShape = eqx.field(static=True)

    def __init__(self, base: Conv2d, lora: LoraShape, *, key: PRNGKeyArray):
        self.weight, self.bias = base.weight, base.bias
        k, _, c_in, c_out = base.weight.shape
        bound = 1 / math.sqrt(k * k * c_in)
        self.lora_down = jr.uniform(key, (k, k, c_in, lora.rank), jnp.float32, -bound, bound)
        self.lora_up = jnp.zeros((1, 1, lora.rank, c_out))
        weight = base.weight.astype(jnp.float32)
        self.lora_magnitude = jnp.sqrt(jnp.sum(jnp.square(weight), axis=(0, 1, 2))) if lora.dora else None
        self.lora_key, self.lora = None, lora

    def __call__(
        self, x: Float[Array, "b h w c_in"], *, stride: int = 1, padding: tuple[int, int] | None = None
    ) -> Float[Array, "b h2 w2 c_out"]:
        y = super().__call__(x, stride=stride, padding=padding)
        seen = _dropped(x, self.lora_key, self.lora.dropout)
        half = self.weight.shape[0] // 2
        pad = (half, half) if padding is None else padding

        def convolve(x: Array, weight: Array) -> Array:
            dimensions = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, weight, (stride, stride), (pad, pad), dimension_numbers=dimensions
            )  # fmt: skip

        up = self.lora_up.reshape(self.lora_up.shape[2:])
        change = jax.lax.dot_general(convolve(seen, self.lora_down), up, (((3,), (0,)), ((), ())))
        change = change * self.lora.strength
        if self.lora_magnitude is None:
            return y + change
        whole = self.weight + self.lora.strength * jax.lax.dot_general(
            self.lora_down, up, (((3,), (0,)), ((), ()))
        )  # fmt: skip
        factor = _factor(self.lora_magnitude, whole, axes=(0, 1, 2)).reshape(1, 1, 1, -1)
        plain = y - self.bias.reshape(1, 1, 1, -1) if seen is x else convolve(seen, self.weight)
        return y + (factor - 1).astype(y.dtype) * plain + factor.astype(y.dtype) * change


def _dropped(x: Array, key: PRNGKeyArray | None, share: float) -> Array:
    """`x` with that share of its entries 0 and the others made up for it."""
    if key is None or share == 0:
        return x
    return jnp.where(jr.bernoulli(key, 1 - share, x.shape), x / (1 - share), 0)


def _factor(magnitude: Array, whole: Array, *, axes: tuple[int, ...]) -> Array:
    """What brings each output's weights to their magnitude, in float32: bfloat16 has steps of 0.4% near 1.

    Their own size counts as a constant (DoRA, section 4.3).
    """
    square = jnp.sum(jnp.square(jax.lax.stop_gradient(whole).astype(jnp.float32)), axis=axes)
    return magnitude.astype(jnp.float32) / jnp.sqrt(square)


def add_lora(model: M, is_target: Callable[[str], bool], lora: LoraShape, *, key: PRNGKeyArray) -> M:
    """The model with a change, of no effect yet, in each dense layer and convolution whose path is a target.

    Paths are of the model's tree, so the blocks of a stack have one: `mid_block.attentions.0.transformer_blocks.ff`.
    """

    def is_layer(x: Any) -> bool:
        return isinstance(x, Linear | Conv2d)

    leaves, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_layer)
    changed = []
    for i, (path, layer) in enumerate(leaves):
        if is_layer(layer) and is_target(jax.tree_util.keystr(path, simple=True, separator=".")):
            layer = _with_change(layer, lora, key=jr.fold_in(key, i))
        changed.append(layer)
    return jax.tree.unflatten(structure, changed)


def _with_change(layer: Linear | Conv2d, lora: LoraShape, *, key: PRNGKeyArray) -> LoraLinear | LoraConv2d:
    if isinstance(layer, Conv2d):
        return LoraConv2d(layer, lora, key=key)
    if layer.weight.ndim == 2:
        return LoraLinear(layer, lora, key=key)
    return eqx.filter_vmap(lambda one, k: LoraLinear(one, lora, key=k))(layer, jr.split(key, layer.weight.shape[0]))


def with_dropout(model: M, *, key: PRNGKeyArray) -> M:
    """The model whose changes drop some of their inputs, each layer others; itself where none has a dropout."""

    def is_change(x: Any) -> bool:
        return isinstance(x, LoraLinear | LoraConv2d)

    leaves, structure = jax.tree.flatten(model, is_leaf=is_change)
    keyed = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, LoraLinear | LoraConv2d) and leaf.lora.dropout > 0:
            own = jr.fold_in(key, i)
            depth = leaf.weight.shape[0] if leaf.weight.ndim == 3 else 0
            keys = jr.split(own, depth) if depth else own
            leaf = eqx.tree_at(lambda layer: layer.lora_key, leaf, keys, is_leaf=lambda x: x is None)
        keyed.append(leaf)
    return jax.tree.unflatten(structure, keyed)
