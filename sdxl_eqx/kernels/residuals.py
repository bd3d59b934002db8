"""What attention keeps for its backward pass, so that a policy of rematerialization can keep it too."""

from typing import Any

RESIDUAL = "attention"
"""The name (`jax.ad_checkpoint.checkpoint_name`) of the result and its log-sum-exp in splash and Transformer Engine."""

CUDNN = "dot_product_attention_fwd_wrapper"
"""JAX's primitive for cuDNN's forward pass, which gives both and no name."""


def keep_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: no forward kernel runs twice (dot_product and the Triton kernel have no say)."""
    return primitive.name == CUDNN or (primitive.name == "name" and params["name"] == RESIDUAL)
