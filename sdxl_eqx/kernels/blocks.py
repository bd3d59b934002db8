"""The blocks of the flash kernels, and padding a sequence up to them."""

from dataclasses import dataclass, fields

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class FlashBlockSizes:
    """How many queries and keys a flash kernel takes at a time; none of it changes the result.

    The first three are of the forward pass, `dkv` of the gradients of keys and values, `dq` of the gradient of the
    queries; `compute` is the part of a block of keys that is worked on at once (TPU only). What is None is chosen by
    shape, and nothing is larger than the padded sequence. `use_fused_bwd_kernel` computes all three gradients in one
    kernel, whose memory grows with the number of blocks of keys (TPU; on a GPU it is always so).
    """

    block_q: int | None = None
    block_kv: int | None = None
    block_kv_compute: int | None = None
    block_q_dkv: int | None = None
    block_kv_dkv: int | None = None
    block_kv_dkv_compute: int | None = None
    block_q_dq: int | None = None
    block_kv_dq: int | None = None
    use_fused_bwd_kernel: bool | None = None

    def asked(self) -> dict[str, int]:
        """The sizes that are not left to us."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self) if field.name.startswith("block_")}
        return {name: size for name, size in sizes.items() if size is not None}


def round_up(length: int, multiple: int) -> int:
    """The first multiple that holds `length`."""
    return -(-length // multiple) * multiple


def pad_length(x: Float[Array, "b l n d"], length: int) -> Float[Array, "b length n d"]:
    """`x` with zeros after its end, up to `length` tokens."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
