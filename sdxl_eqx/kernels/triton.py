"""Flash attention on a GPU: JAX's Triton kernel (Pallas), for any lengths."""

from math import gcd

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha
from jaxtyping import Array, Float

from sdxl_eqx.config import FlashBlockSizes
from sdxl_eqx.kernels.blocks import pad_length, round_up

SMALLEST = 16
"""The least number of rows that Triton multiplies."""

WIDEST_HEAD = 128
"""Wider ones do not fit a GPU's shared memory with these blocks."""


def triton(
    query: Float[Array, "b l n d"],
    key: Float[Array, "b s n d"],
    value: Float[Array, "b s n d"],
    *,
    causal: bool,
    block_sizes: FlashBlockSizes,
    mask_padding: bool,
    interpret: bool,
) -> Float[Array, "b l n d"]:
    """Attention by the Triton kernel, sequences padded up to its blocks; the padding of the keys has weight 0.

    The kernel's backward pass wants as many blocks of queries as of keys, so many queries of few keys are cut into
    chunks, each with all of the keys. Its segment ids are the same for queries and keys, so padded keys are told by
    one more coordinate of the heads: 1 in a query, 0 in a real key, and so low in a padded one that nothing is left.

    Raises:
        ValueError: where heads are wider than 128, blocks are no powers of two, or a causal mask would be cut.
    """
    b, l, n, d = query.shape
    s = key.shape[1]
    refuse_on_gpu(d)
    sizes, l_padded, s_padded = triton_blocks(block_sizes, l, s, d)
    blocks = s_padded // _set(sizes.block_kv_dkv)
    rows = blocks * _set(sizes.block_q_dq)
    chunks = l_padded // rows
    if causal and chunks > 1:
        raise ValueError(f"attention flash: on a GPU no causal mask of {l} queries to {s} keys; use dot_product.")
    query, key, value = pad_length(query, l_padded), pad_length(key, s_padded), pad_length(value, s_padded)
    if mask_padding and s_padded > s:
        extra = round_up(d + 1, SMALLEST) - d
        query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))) for x in (query, key, value))
        query = query.at[..., d].set(1)
        key = key.at[:, s:, :, d].set(jnp.finfo(key.dtype).min / 2)
    query = query.reshape(b * chunks, rows, *query.shape[2:])
    key, value = (jnp.repeat(x, chunks, axis=0) for x in (key, value))
    y: Array = mha(query, key, value, None, sm_scale=d**-0.5, causal=causal, block_sizes=sizes, interpret=interpret)
    return y.reshape(b, l_padded, n, -1)[:, :l, :, :d]


def refuse_on_gpu(d: int) -> None:
    """Says no to heads that the kernel is too wide for.

    Raises:
        ValueError: where heads are wider than 128.
    """
    if d > WIDEST_HEAD:
        raise ValueError(f"attention flash: on a GPU heads are at most {WIDEST_HEAD} wide, not {d}; use dot_product.")


def triton_blocks(asked: FlashBlockSizes, l: int, s: int, d: int) -> tuple[BlockSizes, int, int]:
    """The blocks for `l` queries and `s` keys of width `d`, and both lengths padded up to them.

    Raises:
        ValueError: where a size is no power of two, or below 16, or of what this kernel does not have.
    """
    for name in ("block_kv_compute", "block_kv_dkv_compute"):
        if getattr(asked, name):
            raise ValueError(f"flash_block_sizes {name}: is of a TPU's kernel, a GPU's has no such part; leave it out.")
    if asked.use_fused_bwd_kernel is False:
        raise ValueError("flash_block_sizes use_fused_bwd_kernel=False: a GPU has the fused one alone; leave it out.")
    for name, size in asked.asked().items():
        if size < SMALLEST or size & (size - 1):
            raise ValueError(f"flash_block_sizes {name}={size}: on a GPU a power of two from {SMALLEST} on.")
    backward = 64 if d <= 64 else 32
    block_kv_dkv = min(asked.block_kv_dkv or backward, _power_of_two(s))
    s_padded = round_up(s, block_kv_dkv)
    blocks = s_padded // block_kv_dkv
    block_q_dq = min(asked.block_q_dq or block_kv_dkv, _power_of_two(-(-l // blocks)))
    rows = blocks * block_q_dq
    sizes = BlockSizes(
        block_q=gcd(asked.block_q or 128, rows),
        block_k=gcd(asked.block_kv or 128, s_padded),
        block_q_dkv=gcd(asked.block_q_dkv or backward, rows),
        block_kv_dkv=block_kv_dkv,
        block_q_dq=block_q_dq,
        block_kv_dq=gcd(asked.block_kv_dq or backward, s_padded),
    )
    return sizes, round_up(l, rows), s_padded


def _power_of_two(length: int) -> int:
    """The first power of two that holds `length`, from 16 on."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def _set(size: int | None) -> int:
    """A size that JAX's type allows to be left out and `triton_blocks` sets."""
    assert size is not None
    return size
