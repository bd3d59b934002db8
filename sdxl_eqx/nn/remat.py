"""What the backward pass keeps of a block: policies for `jax.checkpoint`, said once for every model."""

import math
from typing import Any, Literal

import jax

from sdxl_eqx.kernels.residuals import keep_attention

Remat = Literal["none", "dots", "attention", "full", "offload"]

PRODUCT = "product"
"""The name (`jax.ad_checkpoint.checkpoint_name`) of a product in 8 bits that is to be kept: its sums, once scaled."""

GATHERS = "sharding_constraint"
"""The primitive that brings the shards of a weight together. Its result is as large as the whole weight: never kept."""

_TO_HOST = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")(
    jax.lax.dot_general_p, dimension_numbers=(((), ()), ((), ()))
)


def keep_all(primitive: Any, *_: Any, **__: Any) -> bool:
    """Everything but gathered weights."""
    return primitive.name != GATHERS


def keep_products(primitive: Any, *avals: Any, **params: Any) -> bool:
    """The results of matrix products, convolutions and attention kernels, which are dear to compute again.

    Two kinds of matrix product are not kept: those with a batch, which are the scores of attention without a kernel,
    and those that widen, as the first of a feed-forward does: 8 times its input, for a tenth of the UNet's products.
    """
    if primitive.name == "name" and params["name"] == PRODUCT:
        return True
    if primitive is not jax.lax.dot_general_p:
        return primitive is jax.lax.conv_general_dilated_p or keep_attention(primitive, *avals, **params)
    (_, contracted), (_, batch) = params["dimension_numbers"]
    weight = avals[1].shape
    return not batch and not widens(weight, math.prod(weight[i] for i in contracted))


def widens(weight: tuple[int, ...], width: int) -> bool:
    """Whether the result of a product by a weight of that shape, over `width` inputs, is larger than what went in."""
    return math.prod(weight) > width * width


def offload_products(primitive: Any, *avals: Any, **params: Any) -> Any:
    """As `keep_products`, in the host's memory."""
    return _TO_HOST if keep_products(primitive, *avals, **params) else False


POLICIES = {
    "none": keep_all,
    "dots": keep_products,
    "attention": keep_attention,
    "full": None,
    "offload": offload_products,
}
"""The policy of each choice; None keeps nothing but a block's inputs."""
