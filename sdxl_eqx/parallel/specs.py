"""Where each array lies on the mesh, from its path and shape alone; models know nothing of it."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.experimental.layout import Layout as ArrayLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from sdxl_eqx.config import ParallelConfig
from sdxl_eqx.weights.names import is_stacked

T = TypeVar("T")

Axes = tuple[str, ...]

SMALL = 2**14
"""Arrays (slices of a stack) of fewer elements stay whole on every device: gathering them costs more than they take."""

WIDE, NARROW = ("heads", "embed"), ("embed", "heads")
DENSE = {
    **dict.fromkeys(("attn1.to_q", "attn2.to_q", "attn1.to_k", "attn2.to_k", "attn1.to_v", "attn2.to_v"), WIDE),
    **dict.fromkeys(("attn1.to_out.0", "attn2.to_out.0"), NARROW),
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), WIDE),
    "self_attn.out_proj": NARROW,
    **dict.fromkeys(("ff.net.0.proj", "mlp.fc1"), ("mlp", "embed")),
    **dict.fromkeys(("ff.net.2", "mlp.fc2"), ("embed", "mlp")),
}
"""Names of the (output, input) dimensions of dense layers, by the end of their path; those of others are OTHER."""

OTHER = ("", "embed")

WEIGHTS = ("embed", "heads", "mlp", "conv_in", "conv_out")
ACTIVATIONS = ("activation_batch", "activation_heads", "activation_length")
"""The names that rules go by here; MaxDiffusion's others name dimensions that no array has of its own."""


@dataclass(frozen=True)
class Layout:
    """A mesh, and which of its axes share which dimension of weights and activations (`logical_axis_rules`)."""

    mesh: Mesh
    rules: tuple[tuple[str, Axes], ...] = ParallelConfig.logical_axis_rules

    def named(self, name: str) -> Axes:
        """The axes that share the dimension of that name, those of one device too."""
        return dict(self.rules).get(name, ())

    def axes(self, name: str) -> Axes:
        """The axes of more than one device that share the dimension of that name."""
        return tuple(axis for axis in self.named(name) if self.mesh.shape[axis] > 1)

    def size(self, axes: Axes) -> int:
        """How many shares these axes make."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def batch(self) -> Axes:
        """The axes that share the samples of a step."""
        return self.axes("activation_batch")

    def check(self) -> None:
        """Refuse rules under which results would be wrong or a spec would name an axis twice.

        Where samples or weights of convolutions lie over an axis that does not share the batch, XLA (jaxlib 0.10.2)
        gives wrong gradients of convolutions.

        Raises:
            ValueError: with the name and the axis.
        """
        needed = [("data", "data")] if self.mesh.shape["data"] > 1 else []
        needed += [(name, axis) for name in ("embed", "conv_in", "conv_out") for axis in self.axes(name)]
        for name, axis in needed:
            if axis not in self.batch:
                raise ValueError(
                    f"--logical-axis-rules: activation_batch {list(self.named('activation_batch'))} must have the axis "
                    f"{axis} too, which {name if name != axis else 'the mesh'} has devices on; otherwise gradients of "
                    "convolutions would be wrong."
                )
        used = [axis for name in ACTIVATIONS for axis in self.named(name)]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"--logical-axis-rules: {names} must not share an axis; {twice} is in two of them.")

    @property
    def shares_weights(self) -> bool:
        """Whether devices with other samples hold other parts of the weights (fsdp), which are gathered for use."""
        return any(axis in self.batch for name in WEIGHTS for axis in self.axes(name))

    def spec(self, path: str, shape: tuple[int, ...]) -> P:
        """Each dimension over the axes of its name. Axes that do not divide theirs go to the longest one they divide.

        `path` may be that in the whole model or within a layer: only its end counts, and whether it is in a stack,
        whose axis of depth is never shared.
        """
        depth = 1 if is_stacked(path) else 0
        if math.prod(shape[depth:]) < SMALL:
            return P()
        names = ("",) * depth + _names(path, len(shape) - depth)
        shares: list[Axes] = [()] * len(shape)
        left: list[str] = []
        for i, name in enumerate(names):
            for axis in self.axes(name):
                if axis in left or any(axis in axes for axes in shares):
                    continue
                if shape[i] % self.size((*shares[i], axis)) == 0:
                    shares[i] = (*shares[i], axis)
                else:
                    left.append(axis)
        for axis in left:
            divided = [i for i in range(depth, len(shape)) if shape[i] % self.size((*shares[i], axis)) == 0]
            if divided:
                longest = max(divided, key=lambda i: (shape[i] // self.size(shares[i]), i))
                shares[longest] = (*shares[longest], axis)
        return _spec(shares)

    def shardings(self, tree: T) -> T:
        """Where each array of a state (or of its shapes) lies; optimizer moments and averages as their parameter."""

        def one(path: Any, leaf: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return NamedSharding(self.mesh, self.spec(name, tuple(leaf.shape)))

        return jax.tree_util.tree_map_with_path(one, tree)

    def gather(self, layer: T) -> T:
        """A layer whose weights are whole on all devices that share the batch, just before it is used.

        What shares heads and feed-forward stays shared. Gradients go back to their shards by a reduce-scatter.
        """

        def one(path: Any, weight: Any) -> Any:
            if not eqx.is_array(weight):  # an activation function between layers
                return weight
            stored = self.spec(jax.tree_util.keystr(path, simple=True, separator="."), weight.shape)
            used = _spec([_without(axes, self.batch) for axes in stored])
            if used == stored:
                return weight
            return _gather(weight, NamedSharding(self.mesh, stored), NamedSharding(self.mesh, used))

        return jax.tree_util.tree_map_with_path(one, layer)

    def place(self, tree: T) -> T:
        """Activations `[b, h, w, c]`, `[b, l, c]` and `[b, c]` on the devices that compute them.

        Samples are shared by the axes of the batch; rows by all the others, or by none where they do not divide. Never
        by some of them: XLA (jaxlib 0.10.2) then counts the gradient of a 3 x 3 convolution once for each device of
        those that share nothing.
        """

        def one(x: Array) -> Array:
            rows = _without(self.mesh.axis_names, self.batch) if x.ndim > 2 and x.shape[1] % self._others == 0 else ()
            return self._constrain(x, [self.batch, rows])

        return jax.tree.map(one, tree)

    def enter(self, tree: T) -> T:
        """A batch as it was read, spread over whatever axes, in its place."""
        # In two steps: XLA has no direct way from samples on every device to rows of shared samples.
        return self.place(jax.tree.map(lambda x: self._constrain(x, [self.batch]), tree))

    @property
    def _others(self) -> int:
        """Devices that work on the same samples."""
        return self.mesh.size // self.size(self.batch)

    def _constrain(self, x: Array, shares: list[Axes]) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, _spec(shares)))

    @property
    def whole(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, P())


def put(array: Any, sharding: NamedSharding) -> Array:
    """An array that every process has, on the devices; each gets its share alone."""
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _names(path: str, ndim: int) -> Axes:
    """The names of the dimensions of an array, without that of depth."""
    if ndim == 4:
        return ("", "", "conv_in", "conv_out")
    if ndim != 2:
        return ("",) * ndim
    layer = path.removesuffix(".values").removesuffix(".weight").split(".")
    return next((DENSE[end] for n in (2, 3, 4) if (end := ".".join(layer[-n:])) in DENSE), OTHER)


def _spec(shares: list[Axes]) -> P:
    """The spec of these axes for each dimension."""
    while shares and not shares[-1]:
        shares = shares[:-1]
    return P(*((axes[0] if len(axes) == 1 else axes) if axes else None for axes in shares))


def _without(axes: str | Axes | None, others: Axes) -> Axes:
    """What is left of one dimension's axes."""
    every = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in every if axis not in others)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: Array, stored: NamedSharding, used: NamedSharding) -> Array:
    """A weight in its `used` sharding; its gradient in that it is `stored` in."""
    # Both: or XLA has the cast from float32 before it done on the whole weight too, and gathers twice the bytes.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(weight, stored), used)


def _forward(weight: Array, stored: NamedSharding, used: NamedSharding) -> tuple[Array, None]:
    return _gather(weight, stored, used), None


def _backward(stored: NamedSharding, used: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    return (_off_lanes(jax.lax.with_sharding_constraint(gradient, stored), stored),)


def _off_lanes(gradient: Array, stored: NamedSharding) -> Array:
    """The gradient of a convolution whose outputs are in shares, with inputs along the lanes of a TPU's tiles.

    A gradient is scattered by whole tiles alone, so libtpu (0.0.42.1) sums it whole on every chip where its shares cut
    lanes: it chose that for some and not for others. 1 x 1 convolutions are products, whose gradients never were.
    """
    is_on_tpu = next(iter(stored.device_set)).platform == "tpu"
    if is_on_tpu and gradient.ndim == len(stored.spec) == 4 and gradient.shape[:2] != (1, 1):
        return with_layout_constraint(gradient, ArrayLayout((0, 1, 3, 2)))
    return gradient


_gather.defvjp(_forward, _backward)
