"""Attention on a mesh of devices: each computes its own shard. The only `shard_map` of the package."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sdxl_eqx.arrays import Attend
from sdxl_eqx.kernels.blocks import pad_length, round_up

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Sharded:
    """`attend` on each device's shard: samples over `batch`, heads over `heads`, queries over `length`.

    Keys and values are gathered over `length`, so that every query sees all of them. Where not `uniform`,
    self-attention (as many queries as keys) has its heads over `length` too, and its sequence whole. A causal mask
    counts from the first query, so causal attention is whole on each of `length`. Axes that the mesh does not have are
    left out.
    """

    attend: Attend
    mesh: Mesh
    batch: Axes = ("data", "fsdp")
    heads: Axes = ("tensor",)
    length: Axes = ("context",)
    uniform: bool = True

    def __call__(
        self,
        query: Float[Array, "b l n d"],
        key: Float[Array, "b s n d"],
        value: Float[Array, "b s n d"],
        *,
        causal: bool = False,
    ) -> Float[Array, "b l n d"]:
        """Attention, its result sharded like the queries.

        Raises:
            ValueError: where the mesh's axes do not divide the batch or the heads.
        """
        b, l, n, _ = query.shape
        batch, heads = self._present(self.batch), self._present(self.heads)
        length = () if causal else self._present(self.length)
        if not self.uniform and l == key.shape[1]:
            heads, length = (*heads, *length), ()
        if b % self._size(batch):
            raise ValueError(
                f"attention: a batch of {b} does not divide over {self._size(batch)} devices "
                f"({' x '.join(batch)}); take a multiple of it, or fewer devices on those axes and more on context."
            )
        if n % self._size(heads):
            raise ValueError(
                f"attention: {n} heads do not divide over {self._size(heads)} devices ({' x '.join(heads)}); set "
                "--ici-tensor-parallelism and --dcn-tensor-parallelism to divide them (SDXL has 10 and 20)"
                f"{'' if self.uniform else ', and context with them, or leave out --no-attention-sharding-uniform'}."
            )
        gathered = length if key.shape[1] % self._size(length) == 0 else ()

        def shard(query: Array, key: Array, value: Array) -> Array:
            if self._size(gathered) > 1:  # here and not before, so that the gradient is a reduce-scatter
                key, value = (jax.lax.all_gather(x, gathered, axis=1, tiled=True) for x in (key, value))
            return self.attend(query, key, value, causal=causal)

        queries, keys = P(batch, length, heads), P(batch, gathered, heads)
        # check_vma: the kernels do not say over which axes their results vary.
        y = jax.shard_map(shard, mesh=self.mesh, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)(
            pad_length(query, round_up(l, self._size(length))), key, value
        )
        return y[:, :l]

    def _present(self, axes: Axes) -> Axes:
        """Those of the axes that the mesh has."""
        return tuple(name for name in axes if name in self.mesh.shape)

    def _size(self, axes: Axes) -> int:
        """Devices along axes of the mesh."""
        return math.prod(self.mesh.shape[name] for name in axes)
