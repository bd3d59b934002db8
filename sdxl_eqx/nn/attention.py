"""Multi-head attention between two sequences, and over a picture's grid."""

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from sdxl_eqx.arrays import Attend
from sdxl_eqx.nn.linear import Linear
from sdxl_eqx.nn.norm import GroupNorm


class Attention(eqx.Module):
    """Multi-head attention of `x` to `context` (diffusers `Attention`): no bias but at the output."""

    to_q: Linear
    to_k: Linear
    to_v: Linear
    to_out: tuple[Linear]
    heads: int = eqx.field(static=True)

    def __init__(self, c: int, c_context: int, heads: int, *, use_bias: bool = False, key: PRNGKeyArray):
        q_key, k_key, v_key, out_key = jr.split(key, 4)
        self.to_q = Linear(c, c, use_bias=use_bias, key=q_key)
        self.to_k = Linear(c_context, c, use_bias=use_bias, key=k_key)
        self.to_v = Linear(c_context, c, use_bias=use_bias, key=v_key)
        self.to_out = (Linear(c, c, key=out_key),)
        self.heads = heads

    def __call__(
        self, x: Float[Array, "b l c"], context: Float[Array, "b s e"], attend: Attend
    ) -> Float[Array, "b l c"]:
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        y = attend(*(a.reshape(*a.shape[:2], self.heads, -1) for a in (query, key, value)))
        return self.to_out[0](y.reshape(x.shape))


class GridAttention(eqx.Module):
    """Single-head self-attention over the positions of a grid, with a residual (the VAE's; diffusers `Attention`)."""

    group_norm: GroupNorm
    to_q: Linear
    to_k: Linear
    to_v: Linear
    to_out: tuple[Linear]

    def __init__(self, c: int, groups: int, *, eps: float, key: PRNGKeyArray):
        q_key, k_key, v_key, out_key = jr.split(key, 4)
        self.group_norm = GroupNorm(groups, c, eps=eps)
        self.to_q, self.to_k, self.to_v = Linear(c, c, key=q_key), Linear(c, c, key=k_key), Linear(c, c, key=v_key)
        self.to_out = (Linear(c, c, key=out_key),)

    def __call__(self, x: Float[Array, "b h w c"], attend: Attend) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        query, key, value = (to(y)[:, :, None, :] for to in (self.to_q, self.to_k, self.to_v))
        y = attend(query, key, value)[:, :, 0, :]
        return x + self.to_out[0](y).reshape(b, h, w, c)
