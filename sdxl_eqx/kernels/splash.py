"""Flash attention on a TPU: JAX's splash kernel, for any lengths."""

from math import lcm

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as jax_splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as jax_mask
from jaxtyping import Array, Float

from sdxl_eqx.config import FlashBlockSizes
from sdxl_eqx.kernels.blocks import pad_length, round_up
from sdxl_eqx.kernels.residuals import RESIDUAL

LANES = 128
"""Numbers in a row of a TPU's registers: every block is a multiple of it."""

WIDEST_HEAD = 512
"""Heads up to that of the VAE were compiled for v5e, v5p and v6e."""


def splash(
    query: Float[Array, "b l n d"],
    key: Float[Array, "b s n d"],
    value: Float[Array, "b s n d"],
    *,
    causal: bool,
    block_sizes: FlashBlockSizes,
    mask_padding: bool,
    interpret: bool,
) -> Float[Array, "b l n d"]:
    """Attention by the splash kernel, sequences padded up to its blocks; segment ids hide the padding of the keys.

    Raises:
        ValueError: where the kernel does not compile for the dtype or the head width, or blocks do not fit together.
    """
    l, s, n, d = query.shape[1], key.shape[1], query.shape[2], query.shape[3]
    refuse_on_tpu(query.dtype, d)
    sizes = splash_blocks(block_sizes, l, s, widest_block(query.dtype, d))
    l_padded = round_up(l, lcm(sizes.block_q, sizes.block_q_dkv or 1, sizes.block_q_dq or 1))
    s_padded = round_up(s, lcm(sizes.block_kv, sizes.block_kv_dkv or 1, sizes.block_kv_dq or 1))
    mask = (jax_mask.CausalMask if causal else jax_mask.FullMask)((l_padded, s_padded))
    kernel = jax_splash.make_splash_mha(
        jax_mask.MultiHeadMask([mask] * n),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUAL,
        interpret=interpret,
    )
    segments = None
    if mask_padding and s_padded > s:
        # Padded queries are of the segment of the real keys: a row without any key would have no softmax.
        real = (jnp.arange(s_padded) < s).astype(jnp.int32)
        segments = jax_splash.SegmentIds(q=jnp.ones(l_padded, jnp.int32), kv=real)
    # The kernel has no scale. In bfloat16 a factor of 1/8 (d = 64) is exact; others are rounded once, from float32.
    query = (query.astype(jnp.float32) * d**-0.5).astype(query.dtype)
    heads_first = (
        pad_length(x, length).swapaxes(1, 2) for x, length in ((query, l_padded), (key, s_padded), (value, s_padded))
    )
    y: Array = jax.vmap(kernel, in_axes=(0, 0, 0, None))(*heads_first, segments)  # pyright: ignore[reportAssignmentType]
    return y.swapaxes(1, 2)[:, :l]


def refuse_on_tpu(dtype: jnp.dtype, d: int) -> None:
    """Says no to what the kernel does not compile for.

    Raises:
        ValueError: where the dtype is not bfloat16 or float32, or heads are wider than 512.
    """
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"attention flash: on a TPU takes bfloat16 and float32, not {dtype}; use --activations-dtype bfloat16, or "
            "--attention dot_product."
        )
    if d > WIDEST_HEAD:
        raise ValueError(f"attention flash: on a TPU heads are at most {WIDEST_HEAD} wide, not {d}; use dot_product.")


def widest_block(dtype: jnp.dtype, d: int) -> int:
    """The block that is fastest on v6e (axlearn #958) where vector memory holds it, else a half or a quarter of it."""
    return max(LANES, min(1024, 1024 * 256 // (dtype.itemsize * max(d, LANES))))


def splash_blocks(asked: FlashBlockSizes, l: int, s: int, widest: int) -> jax_splash.BlockSizes:
    """The blocks for `l` queries and `s` keys; those of the backward pass are by default those of the forward pass.

    Raises:
        ValueError: where a size is no multiple of 128, or a block of keys no multiple of its part, or where sizes are
            given for a kernel that the fused backward pass does not have.
    """
    for name, size in asked.asked().items():
        if size <= 0 or size % LANES:
            raise ValueError(f"flash_block_sizes {name}={size}: on a TPU a multiple of {LANES} above 0.")
    for name, block, part in (
        ("block_kv", asked.block_kv, asked.block_kv_compute),
        ("block_kv_dkv", asked.block_kv_dkv, asked.block_kv_dkv_compute),
    ):
        if block and part and block % part:
            raise ValueError(f"flash_block_sizes {name}={block}: must be a multiple of {name}_compute={part}.")
    q = _block(asked.block_q, l, widest)
    kv, kv_compute = _key_block(asked.block_kv, asked.block_kv_compute, s, widest)
    kv_dkv_compute = asked.block_kv_dkv_compute or asked.block_kv_compute
    kv_dkv, kv_dkv_compute = _key_block(asked.block_kv_dkv or kv, kv_dkv_compute, s, widest)
    has_dq = asked.block_q_dq is not None or asked.block_kv_dq is not None
    fused = asked.use_fused_bwd_kernel
    if fused and has_dq:
        raise ValueError(
            "flash_block_sizes use_fused_bwd_kernel: has no kernel for the queries alone; leave out block_q_dq and "
            "block_kv_dq."
        )
    if fused is None:  # it writes one gradient of the queries for each block of keys: better only where there is one
        fused = not has_dq and kv_dkv >= s
    return jax_splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv_compute,
        block_q_dkv=_block(asked.block_q_dkv or q, l, widest),
        block_kv_dkv=kv_dkv,
        block_kv_dkv_compute=kv_dkv_compute,
        block_q_dq=None if fused else _block(asked.block_q_dq or q, l, widest),
        block_kv_dq=None if fused else _block(asked.block_kv_dq or kv, s, widest),
        use_fused_bwd_kernel=fused,
    )


def _block(asked: int | None, length: int, widest: int) -> int:
    """The block asked for, or the least that covers the length in the fewest blocks; no more than the length needs."""
    size = asked or -(-length // -(-length // widest))
    return min(round_up(size, LANES), round_up(length, LANES))


def _key_block(block: int | None, part: int | None, length: int, widest: int) -> tuple[int, int]:
    """A block of keys, and the part of it that is worked on at once, which divides it."""
    size = _block(block, length, widest)
    part = min(part or size, round_up(length, LANES))
    return round_up(size, part), part
