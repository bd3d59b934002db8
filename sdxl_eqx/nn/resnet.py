"""The residual block."""

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from sdxl_eqx.nn.conv import Conv2d
from sdxl_eqx.nn.linear import Linear
from sdxl_eqx.nn.norm import GroupNorm


class ResNetBlock(eqx.Module):
    """`skip(x) + conv2(conv1(x) + time)`: the residual block of Stable Diffusion (diffusers `ResnetBlock2D`).

    The VAE's blocks know no time: they have no `time_emb_proj`.
    """

    norm1: GroupNorm
    conv1: Conv2d
    time_emb_proj: Linear | None
    norm2: GroupNorm
    conv2: Conv2d
    conv_shortcut: Conv2d | None

    def __init__(self, c_in: int, c_out: int, c_time: int | None, *, groups: int, eps: float, key: PRNGKeyArray):
        conv1_key, time_key, conv2_key, skip_key = jr.split(key, 4)
        self.norm1 = GroupNorm(groups, c_in, eps=eps)
        self.conv1 = Conv2d(c_in, c_out, key=conv1_key)
        self.time_emb_proj = None if c_time is None else Linear(c_time, c_out, key=time_key)
        self.norm2 = GroupNorm(groups, c_out, eps=eps)
        self.conv2 = Conv2d(c_out, c_out, key=conv2_key)
        self.conv_shortcut = None if c_in == c_out else Conv2d(c_in, c_out, 1, key=skip_key)

    def __call__(
        self, x: Float[Array, "b h w c_in"], temb: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w c_out"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None and temb is not None:
            y = y + self.time_emb_proj(jax.nn.silu(temb))[:, None, None, :]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return skip + y
