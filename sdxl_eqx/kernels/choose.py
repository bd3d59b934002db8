"""Which attention runs: one asked for by name, or the best for the backend; never another one in its place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from sdxl_eqx.arrays import Attend, DtypeName
from sdxl_eqx.config import FlashBlockSizes
from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.cudnn import cudnn, cudnn_flash_te, import_te, refuse_unsupported
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.splash import refuse_on_tpu
from sdxl_eqx.kernels.triton import refuse_on_gpu

AttentionName = Literal["auto", "dot_product", "flash", "cudnn", "cudnn_flash_te"]

LONG = 2048
"""From so many queries and keys on, `auto` takes flash on a TPU, for its memory: at the 4096 of SDXL's first level of
transformers at 1024 px (3952 at 832x1216) XLA needs about 1 GB an image for scores, flash 40 to 80 MB; at the 1024 of
the second level it is 80 to 160 MB, at the 77 of texts less than flash. Which is faster is not measured."""


@dataclass(frozen=True)
class FromLength:
    """`attend` where queries and keys are both at least `length`, else `below`."""

    attend: Attend
    below: Attend
    length: int

    def __call__(
        self,
        query: Float[Array, "b l n d"],
        key: Float[Array, "b s n d"],
        value: Float[Array, "b s n d"],
        *,
        causal: bool = False,
    ) -> Float[Array, "b l n d"]:
        long = min(query.shape[1], key.shape[1]) >= self.length
        return (self.attend if long else self.below)(query, key, value, causal=causal)


@dataclass(frozen=True)
class Folded:
    """`attend` with the heads folded into the batch."""

    attend: Attend

    def __call__(
        self,
        query: Float[Array, "b l n d"],
        key: Float[Array, "b s n d"],
        value: Float[Array, "b s n d"],
        *,
        causal: bool = False,
    ) -> Float[Array, "b l n d"]:
        b, l, n, d = query.shape
        folded = (x.swapaxes(1, 2).reshape(b * n, x.shape[1], 1, d) for x in (query, key, value))
        return self.attend(*folded, causal=causal).reshape(b, n, l, d).swapaxes(1, 2)


def choose(
    name: str,
    backend: str,
    *,
    share: Callable[[Attend], Attend] | None = None,
    dtype: DtypeName = "bfloat16",
    head_width: int = 64,
    block_sizes: FlashBlockSizes | None = None,
    mask_padding: bool = True,
    min_seq_length: int = 0,
    split_heads: bool = True,
) -> tuple[Attend, str]:
    """The attention to run on a backend (the platform of the devices: cpu, gpu, tpu), and a sentence that says so.

    `share` makes of an implementation one that runs on a mesh (`Sharded`). `min_seq_length` is of flash: it takes over
    from so many queries and keys on, and dot_product serves below. Without `split_heads` heads are folded into the
    batch.

    Raises:
        ValueError: where the one asked for cannot serve on this backend, with this dtype or this head width.
    """
    if name not in get_args(AttentionName):
        raise ValueError(f"attention {name}: unknown; one of {', '.join(get_args(AttentionName))}.")
    want = _Wanted(backend, jnp.dtype(dtype), head_width, block_sizes or FlashBlockSizes(), mask_padding)
    attend, why = want.best() if name == "auto" else want.named(name)
    from_length = 0
    if isinstance(attend, Flash):
        from_length = min_seq_length or (LONG if name == "auto" else 0)
        if from_length:
            why += f"; dot_product below {from_length} queries or keys"
        if not mask_padding:
            why += "; zeros that pad the keys are attended to"
    elif name == "auto" and (want.block_sizes != FlashBlockSizes() or not mask_padding or min_seq_length):
        why += "; the flags of flash have no effect on it"

    def whole(attend: Attend) -> Attend:
        attend = attend if split_heads else Folded(attend)
        return attend if share is None else share(attend)

    attend = FromLength(whole(attend), whole(dot_product), from_length) if from_length else whole(attend)
    return attend, f"attention {name}: {why}."


@dataclass(frozen=True)
class _Wanted:
    """What a choice is made for."""

    backend: str
    dtype: jnp.dtype
    head_width: int
    block_sizes: FlashBlockSizes
    mask_padding: bool

    def best(self) -> tuple[Attend, str]:
        """What `auto` stands for, and why."""
        try:
            if self.backend == "gpu":
                attend, _ = self.named("cudnn")
                return (
                    attend,
                    "cudnn, published as some 5 times as fast as unfused attention on an H100, and no scores in memory",
                )
            if self.backend == "tpu":
                refuse_on_tpu(self.dtype, self.head_width)
        except ValueError as error:
            reason = str(error).removesuffix(".")
            return dot_product, f"dot_product by XLA ({reason})"
        if self.backend == "tpu":
            attend, what = self._flash()
            return attend, f"flash ({what}), which keeps no scores in memory, where they are many"
        return dot_product, f"dot_product by XLA, for a {self.backend} has no kernel"

    def named(self, name: str) -> tuple[Attend, str]:
        """The one asked for, and what it is.

        Raises:
            ValueError: where it cannot serve.
        """
        if name == "dot_product":
            return dot_product, "by XLA"
        if name == "flash":
            return self._flash()
        if self.backend != "gpu":
            raise ValueError(f"attention {name}: needs an NVIDIA GPU, and this is a {self.backend}; use auto.")
        refuse_unsupported(name, self.dtype, self.head_width)
        if name == "cudnn":
            return cudnn, "through JAX"
        import_te()
        return cudnn_flash_te, "by Transformer Engine"

    def _flash(self) -> tuple[Flash, str]:
        """Flash for the backend, and which kernel that is."""
        if self.backend == "tpu":
            refuse_on_tpu(self.dtype, self.head_width)
            return Flash("splash", self.block_sizes, self.mask_padding), "JAX's splash kernel"
        if self.backend == "gpu":
            refuse_on_gpu(self.head_width)
            return Flash("triton", self.block_sizes, self.mask_padding), "JAX's Triton kernel"
        if self.backend == "cpu":
            refuse_on_tpu(self.dtype, self.head_width)
            kernel = Flash("splash", self.block_sizes, self.mask_padding, interpret=True)
            return kernel, "JAX's splash kernel in the interpreter, for tests: very slow"
        raise ValueError(f"attention flash: has kernels for tpu and gpu, none for {self.backend}; use auto.")
