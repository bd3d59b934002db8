"""Fused attention by cuDNN on NVIDIA GPUs: through JAX, and through Transformer Engine."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdxl_eqx.kernels.blocks import pad_length, round_up
from sdxl_eqx.kernels.residuals import RESIDUAL

INSTALL_TE = "pip install --no-build-isolation -e '.[te]' (transformer-engine 2.11 or newer, beside JAX for CUDA)"


def cudnn(
    query: Float[Array, "b l n d"],
    key: Float[Array, "b s n d"],
    value: Float[Array, "b s n d"],
    *,
    causal: bool = False,
) -> Float[Array, "b l n d"]:
    """Attention by cuDNN's flash kernels, through `jax.nn.dot_product_attention`.

    JAX 0.10.2 refuses odd lengths when it takes gradients (it counts its empty placeholder as a bias), so those are
    padded by one, and the length of the keys says that their last one is none.

    Raises:
        ValueError: where cuDNN has no kernel for the dtype or the head width, or JAX has no cuDNN.
    """
    refuse_unsupported("cudnn", query.dtype, query.shape[-1])
    b, l, s = query.shape[0], query.shape[1], key.shape[1]
    lengths = jnp.full(b, s, jnp.int32) if s % 2 else None
    query, key, value = (pad_length(x, round_up(x.shape[1], 2)) for x in (query, key, value))
    try:
        y = jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, is_causal=causal, implementation="cudnn"
        )
        return y[:, :l]
    except NotImplementedError as error:
        raise ValueError(f"attention cudnn: {error} Use --attention dot_product.") from error
    except RuntimeError as error:
        raise ValueError(
            f"attention cudnn: {error} Install JAX for CUDA (pip install -e '.[cuda13]'), or use another attention."
        ) from error


def cudnn_flash_te(
    query: Float[Array, "b l n d"],
    key: Float[Array, "b s n d"],
    value: Float[Array, "b s n d"],
    *,
    causal: bool = False,
) -> Float[Array, "b l n d"]:
    """Attention by Transformer Engine's fused kernels (cuDNN): as MaxDiffusion's, but it never falls back to unfused.

    Raises:
        ValueError: where Transformer Engine is missing, or has no kernel for the dtype or the head width.
    """
    refuse_unsupported("cudnn_flash_te", query.dtype, query.shape[-1])
    te, sharding = import_te()

    def fused(query: Array, key: Array, value: Array) -> Array:
        lengths = tuple(jnp.full(x.shape[0], x.shape[1], jnp.int32) for x in (query, key))
        return te.fused_attn(
            (query, key, value),
            bias=None,
            sequence_descriptor=te.SequenceDescriptor.from_seqlens(lengths),
            seed=None,
            attn_bias_type=te.AttnBiasType.NO_BIAS,
            attn_mask_type=te.AttnMaskType.CAUSAL_MASK if causal else te.AttnMaskType.NO_MASK,
            qkv_layout=te.QKVLayout.BSHD_BSHD_BSHD,
            softmax_type=te.AttnSoftmaxType.VANILLA_SOFTMAX,
            scaling_factor=query.shape[-1] ** -0.5,
            dropout_probability=0.0,
            is_training=True,
            context_checkpoint_name=RESIDUAL,
        )

    # Transformer Engine asks for a mesh resource while either pass is traced: an empty one, for a shard is all it sees.
    @jax.custom_vjp
    def guarded(query: Array, key: Array, value: Array) -> Array:
        with sharding.global_shard_guard(sharding.MeshResource()):
            return fused(query, key, value)

    def forward(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
        with sharding.global_shard_guard(sharding.MeshResource()):
            return jax.vjp(fused, query, key, value)

    def backward(pullback: Any, gradient: Array) -> tuple[Array, Array, Array]:
        with sharding.global_shard_guard(sharding.MeshResource()):
            return pullback(gradient)

    guarded.defvjp(forward, backward)
    return guarded(query, key, value)


def import_te() -> tuple[Any, Any]:
    """Transformer Engine's modules of attention and of sharding, imported only when they are asked for.

    Raises:
        ValueError: where it is missing, or older than 2.11.
    """
    try:
        from transformer_engine.jax import attention, sharding  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"attention cudnn_flash_te: needs Transformer Engine ({error}): {INSTALL_TE}; or use cudnn."
        ) from error
    if not hasattr(attention, "AttnSoftmaxType"):
        raise ValueError(f"attention cudnn_flash_te: this Transformer Engine is too old: {INSTALL_TE}; or use cudnn.")
    return attention, sharding


def refuse_unsupported(name: str, dtype: jnp.dtype, d: int) -> None:
    """Says no to what cuDNN's flash attention has no kernel for; older than Hopper it also has none above 128.

    Raises:
        ValueError: where the dtype is not bfloat16 or float16, or the head width not a multiple of 8 up to 256.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"attention {name}: takes bfloat16 and float16, not {dtype}; use --activations-dtype bfloat16, "
            "or --attention dot_product."
        )
    if d % 8 or d > 256:
        raise ValueError(f"attention {name}: takes heads of a multiple of 8 up to 256 wide, not {d}; use dot_product.")
