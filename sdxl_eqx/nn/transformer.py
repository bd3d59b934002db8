"""The UNet's transformer: blocks of one stage stacked on axis 0 and run by one scan."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from sdxl_eqx.arrays import Attend
from sdxl_eqx.nn.attention import Attention
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.linear import Linear
from sdxl_eqx.nn.norm import GroupNorm, LayerNorm


class GEGLU(eqx.Module):
    """`h * gelu(gate)`, both halves of one dense layer (Shazeer 2020), with the exact GELU."""

    proj: Linear

    def __init__(self, c_in: int, c_out: int, *, key: PRNGKeyArray):
        self.proj = Linear(c_in, 2 * c_out, key=key)

    def __call__(self, x: Float[Array, "b l c_in"]) -> Float[Array, "b l c_out"]:
        h, gate = jnp.split(self.proj(x), 2, axis=-1)
        return h * jax.nn.gelu(gate, approximate=False)


class FeedForward(eqx.Module):
    """GEGLU to four times the width and back; `net` keeps diffusers' numbering, where 1 is a dropout."""

    net: tuple[GEGLU, None, Linear]

    def __init__(self, c: int, *, key: PRNGKeyArray):
        up_key, down_key = jr.split(key)
        self.net = (GEGLU(c, 4 * c, key=up_key), None, Linear(4 * c, c, key=down_key))

    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        return self.net[2](self.net[0](x))


class TransformerBlock(eqx.Module):
    """Self-attention, cross-attention and feed-forward, each with its residual (diffusers `BasicTransformerBlock`)."""

    norm1: LayerNorm
    attn1: Attention
    norm2: LayerNorm
    attn2: Attention
    norm3: LayerNorm
    ff: FeedForward

    def __init__(self, c: int, c_context: int, heads: int, *, key: PRNGKeyArray):
        self_key, cross_key, ff_key = jr.split(key, 3)
        self.norm1, self.norm2, self.norm3 = LayerNorm(c), LayerNorm(c), LayerNorm(c)
        self.attn1 = Attention(c, c, heads, key=self_key)
        self.attn2 = Attention(c, c_context, heads, key=cross_key)
        self.ff = FeedForward(c, key=ff_key)

    def __call__(
        self, x: Float[Array, "b l c"], context: Float[Array, "b s e"], attend: Attend
    ) -> Float[Array, "b l c"]:
        y = self.norm1(x)
        x = x + self.attn1(y, y, attend)
        x = x + self.attn2(self.norm2(x), context, attend)
        return x + self.ff(self.norm3(x))


class Transformer(eqx.Module):
    """The transformer stage over a grid (diffusers `Transformer2DModel`): norm, dense in, blocks, dense out, residual.

    `transformer_blocks` is one block whose every array has a leading axis of depth; `names.py` says how files see it.
    """

    norm: GroupNorm
    proj_in: Linear
    transformer_blocks: TransformerBlock
    proj_out: Linear

    def __init__(self, c: int, c_context: int, heads: int, depth: int, *, groups: int, key: PRNGKeyArray):
        in_key, blocks_key, out_key = jr.split(key, 3)
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.proj_in = Linear(c, c, key=in_key)
        self.transformer_blocks = jax.vmap(lambda k: TransformerBlock(c, c_context, heads, key=k))(
            jr.split(blocks_key, depth)
        )
        self.proj_out = Linear(c, c, key=out_key)

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b s e"], compute: Compute
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = compute.run((self.norm, self.proj_in), x).reshape(b, h * w, c)
        y = run_stack(self.transformer_blocks, y, context, compute.attend, compute=compute)
        return x + compute.run(self.proj_out, y).reshape(b, h, w, c)


def run_stack(stack: Callable[..., Array], x: Array, *args: Any, compute: Compute) -> Array:
    """`x` through each slice of the module `stack` along axis 0: `x = slice(x, *args)`, by one scan."""

    def block(x: Array, one: Callable[..., Array]) -> tuple[Array, None]:
        return compute.run(one, x, *args, scanned=True), None

    y, _ = jax.lax.scan(block, x, stack, unroll=compute.scan_unroll)
    return y
