"""Dense layers of the UNet's transformer stages in 8 bits: products by Google's qwix, or weights that are stored so."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from sdxl_eqx.nn.linear import Dot, Int8Weight, Linear
from sdxl_eqx.nn.remat import PRODUCT, widens
from sdxl_eqx.nn.transformer import Transformer

T = TypeVar("T")

Quantization = Literal["", "int8", "int8_weights", "fp8"]

VALUES = {"int8": jnp.int8, "int8_weights": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""What activations and weights are rounded to."""

GRADIENTS = {"int8": jnp.int8, "fp8": jnp.float8_e5m2}
"""What gradients are rounded to: of float8 the type with the wider range (Micikevicius et al. 2022)."""


@dataclass(frozen=True)
class EightBit:
    """A `Dot` for `x @ weight.T` of 8-bit numbers: each row of x and each output of the weight has its own scale.

    Scales are float32, sums int32 or float32; the result has x's dtype. int8_weights rounds the weight alone and then
    multiplies as ever, backward too. The others round for both products of the backward pass as well, as
    `dot_general_qt` of qwix does: the scale of what was rounded before goes into the incoming gradient, and that is
    rounded then. Rounding itself has the gradient of the identity (Bengio et al. 2013).
    """

    how: Quantization
    shards: int = 1
    """The gradient of a weight is the sum of those of so many parts of the batch, with scales of their own each, as
    AQT's `contraction_axis_shard_count` has it; 0: it is computed of numbers that are not rounded."""

    def __call__(self, x: Any, weight: Any, dimension_numbers: Any) -> Any:
        """The product.

        Raises:
            ValueError: for another product than that of a dense layer, or a batch that `shards` do not divide.
        """
        if dimension_numbers != (((x.ndim - 1,), (1,)), ((), ())):
            raise ValueError(f"a product in 8 bits must be x @ weight.T; got the dimensions {dimension_numbers}.")
        if self.shards > 1 and x.shape[0] % self.shards:
            raise ValueError(
                f"--quantization-local-shard-count {self.shards}: must divide the batch, of which {x.shape[0]} samples "
                "are multiplied at once; use another, or 1."
            )
        y = _multiply(self, x, weight)
        return y if widens(weight.shape, weight.shape[1]) else checkpoint_name(y, PRODUCT)


@dataclass(frozen=True)
class StoredInt8:
    """A `Dot` for `x @ weight.T` of a weight that is stored in 8 bits and does not train.

    It multiplies in x's dtype. The backward pass makes the weight's numbers again, so that they are never kept.
    """

    def __call__(self, x: Any, weight: Int8Weight, dimension_numbers: Any) -> Any:
        """The product of a dense layer."""
        assert dimension_numbers == (((x.ndim - 1,), (1,)), ((), ()))
        y = _multiply_stored(x, weight)
        return y if widens(weight.shape, weight.shape[1]) else checkpoint_name(y, PRODUCT)


@jax.custom_vjp
def _multiply_stored(x: Array, weight: Int8Weight) -> Array:
    return jax.lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def _stored_backward(weight: Int8Weight, gradient: Array) -> tuple[Array, None]:
    over = (((gradient.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(gradient, weight.astype(gradient.dtype), over), None


_multiply_stored.defvjp(lambda x, weight: (_multiply_stored(x, weight), weight), _stored_backward)


def stored_in_int8(model: T, rounded: Callable[[Any], Int8Weight] = Int8Weight.of) -> T:
    """`model` with the weight of each dense layer of its transformer stages `rounded` to 8 bits, not to be trained."""
    return _of_stages(model, lambda layer: _with(layer, weight=rounded(layer.weight), dot=StoredInt8()))


def dot_of(how: Quantization, shards: int = 1) -> Dot:
    """The product of a choice; those of equal choices are equal, so that nothing is compiled twice.

    Raises:
        ValueError: where qwix is not installed.
    """
    if not how:
        return jax.lax.dot_general
    _qwix()  # now, not in the middle of the first step
    return EightBit(how, shards)


def quantized(model: T, how: Quantization, shards: int = 1) -> T:
    """`model` with that product in each dense layer of its transformer stages; its arrays are the same ones.

    Raises:
        ValueError: where qwix is not installed.
    """
    dot = dot_of(how, shards)
    return _of_stages(model, lambda layer: _with(layer, dot=dot)) if how else model


def _of_stages(model: T, change: Callable[[Linear], Linear]) -> T:
    """`model` with each dense layer of its transformer stages changed."""

    def of_stage(node: Any) -> Any:
        if not isinstance(node, Transformer):
            return node
        is_dense = partial(_is_a, Linear)
        return jax.tree.map(lambda x: change(x) if is_dense(x) else x, node, is_leaf=is_dense)

    return jax.tree.map(of_stage, model, is_leaf=partial(_is_a, Transformer))


def _is_a(kind: type, x: Any) -> bool:
    return isinstance(x, kind)


def _with(layer: Linear, **fields: Any) -> Linear:
    """A dense layer with other fields."""
    layer = copy.copy(layer)
    for name, value in fields.items():
        object.__setattr__(layer, name, value)  # eqx.tree_at does not reach static ones
    return layer


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(dot: EightBit, x: Array, weight: Array) -> Array:
    return _forward(dot, x, weight)[0]


def _forward(dot: EightBit, x: Array, weight: Array) -> tuple[Array, Any]:
    """The product, and what its backward pass needs: the weight as it came, which remat may gather again."""
    qwix = _qwix()
    weight8 = _rounded_weight(dot, weight)
    over = (((x.ndim - 1,), (1,)), ((), ()))
    if dot.how == "int8_weights":
        return jax.lax.dot_general(x, qwix.dequantize(weight8).astype(x.dtype), over), (x, weight)
    x8 = qwix.quantize(x.astype(jnp.float32), VALUES[dot.how], channelwise_axes=range(x.ndim - 1))
    # qwix multiplies int32 by float32.
    with jax.numpy_dtype_promotion("standard"):
        y = qwix.dot_general(x8, weight8, over, preferred_element_type=jnp.float32)
    return y.astype(x.dtype), (x8 if dot.shards else x, weight)


def _backward(dot: EightBit, kept: Any, gradient: Array) -> tuple[Array, Array]:
    """The gradients of x and of the weight."""
    x, weight = kept
    weight8 = _rounded_weight(dot, weight)
    rows = tuple(range(gradient.ndim - 1))
    to_x, to_weight = (((len(rows),), (0,)), ((), ())), ((rows, rows), ((), ()))
    if dot.how == "int8_weights":
        rounded = _qwix().dequantize(weight8).astype(x.dtype)
        return jax.lax.dot_general(gradient, rounded, to_x), jax.lax.dot_general(gradient, x, to_weight)
    g = gradient.astype(jnp.float32)
    of_x = _rounded_product(dot, g * weight8.scale.reshape((1,) * len(rows) + (-1,)), weight8.qvalue, to_x, rows)
    if not dot.shards:
        of_weight = jax.lax.dot_general(gradient, x, to_weight)
    else:
        parts = (dot.shards, -1)
        g = (g * x.scale).reshape(*parts, *g.shape[1:])
        values = x.qvalue.reshape(*parts, *x.shape[1:])
        inside = tuple(range(1, g.ndim - 1))
        of_each = _rounded_product(dot, g, values, ((inside, inside), ((0,), (0,))), (0, g.ndim - 1))
        of_weight = of_each.sum(0)
    return of_x.astype(gradient.dtype), of_weight.astype(weight.dtype)


_multiply.defvjp(_forward, _backward)


def _rounded_weight(dot: EightBit, weight: Array) -> Any:
    """The weight in 8 bits, with a scale for each output."""
    return _qwix().quantize(weight.astype(jnp.float32), VALUES[dot.how], channelwise_axes=(0,))


def _rounded_product(dot: EightBit, gradient: Array, values: Array, over: Any, channels: tuple[int, ...]) -> Array:
    """A gradient, rounded with scales for each index of `channels`, times 8-bit values."""
    qwix = _qwix()
    gradient8 = qwix.quantize(gradient, GRADIENTS[dot.how], channelwise_axes=channels)
    with jax.numpy_dtype_promotion("standard"):
        return qwix.dot_general(gradient8, values, over, preferred_element_type=jnp.float32)


def _qwix() -> Any:
    """The module, imported only where it is asked for: Flax comes with it."""
    try:
        return importlib.import_module("qwix")
    except ModuleNotFoundError as error:
        raise ValueError(f"--quantization: {error}; install it: pip install 'sdxl-eqx[qwix]'") from error
