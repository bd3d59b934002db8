"""Attention on a mesh of devices: each computes its own shard. The only `shard_map` of the package."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sdxl_eqx.arrays import Attend
from sdxl_eqx.kernels.blocks import pad_length, round_up


@dataclass(frozen=True)
class Sharded:
    """`attend` on each device's shard: samples over `batch`, heads over `heads`, queries over `length`.

    Keys and values are gathered over `length`, so that every query sees all of them. Axes that the mesh does not
    have are left out. A causal mask counts from the first query, so causal attention is whole on each of `length`.
    """

    attend: Attend
    mesh: Mesh
    batch: tuple[str, ...] = ("data", "fsdp")
    heads: str = "tensor"
    length: str = "context"

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
        batch = tuple(name for name in self.batch if name in self.mesh.shape)
        heads = self.heads if self.heads in self.mesh.shape else None
        length = self.length if self.length in self.mesh.shape and not causal else None
        shares, by_heads, by_length = self._size(*batch), self._size(heads), self._size(length)
        if b % shares:
            raise ValueError(
                f"attention: a batch of {b} does not divide over {shares} devices ({' x '.join(batch)}); take a "
                "multiple of it, or fewer devices on those axes and more on context."
            )
        if n % by_heads:
            raise ValueError(
                f"attention: {n} heads do not divide over {by_heads} devices; set --ici-{heads}-parallelism and "
                f"--dcn-{heads}-parallelism to divide them (SDXL has 10 and 20)."
            )
        gathered = length if key.shape[1] % by_length == 0 else None

        def shard(query: Array, key: Array, value: Array) -> Array:
            if gathered is not None:  # here and not before, so that the gradient is a reduce-scatter
                key, value = (jax.lax.all_gather(x, gathered, axis=1, tiled=True) for x in (key, value))
            return self.attend(query, key, value, causal=causal)

        queries, keys = P(batch, length, heads), P(batch, gathered, heads)
        # check_vma: the kernels do not say over which axes their results vary.
        y = jax.shard_map(shard, mesh=self.mesh, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)(
            pad_length(query, round_up(l, by_length)), key, value
        )
        return y[:, :l]

    def _size(self, *axes: str | None) -> int:
        """Devices along axes of the mesh."""
        size = 1
        for name in axes:
            size *= self.mesh.shape[name] if name is not None else 1
        return size
