"""Two-dimensional convolution and the changes of resolution built on it."""

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray


class Conv2d(eqx.Module):
    """Convolution of NHWC by HWIO, zero-padded so that stride 1 keeps the size; initial values of `torch.nn.Conv2d`."""

    weight: Float[Array, "k k c_in c_out"]
    bias: Float[Array, " c_out"]

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, *, key: PRNGKeyArray):
        weight_key, bias_key = jr.split(key)
        bound = 1 / math.sqrt(c_in * kernel * kernel)
        self.weight = jr.uniform(weight_key, (kernel, kernel, c_in, c_out), jnp.float32, -bound, bound)
        self.bias = jr.uniform(bias_key, (c_out,), jnp.float32, -bound, bound)

    def __call__(
        self, x: Float[Array, "b h w c_in"], *, stride: int = 1, padding: tuple[int, int] | None = None
    ) -> Float[Array, "b h2 w2 c_out"]:
        """Convolve. `padding` is (before, after) on both spatial axes; by default half the kernel on each side."""
        if self.weight.shape[0] == 1 and stride == 1 and not padding:
            # A matrix product: as a convolution, its gradient on a TPU is reduced whole where weights are shared out.
            weight = self.weight.reshape(self.weight.shape[2:])
            y = jax.lax.dot_general(x, weight, (((3,), (0,)), ((), ())))
            return y + self.bias.reshape(1, 1, 1, -1)
        half = self.weight.shape[0] // 2
        pad = (half, half) if padding is None else padding
        y = jax.lax.conv_general_dilated(
            x, self.weight, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + self.bias.reshape(1, 1, 1, -1)


class Downsample(eqx.Module):
    """Halves the grid by a stride-2 convolution (diffusers `Downsample2D`).

    The UNet pads all around; the VAE's encoder pads below and to the right alone. They share no default.
    """

    conv: Conv2d
    pad: Literal["around", "after"] = eqx.field(static=True)

    def __init__(self, c: int, *, pad: Literal["around", "after"], key: PRNGKeyArray):
        self.conv = Conv2d(c, c, key=key)
        self.pad = pad

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x, stride=2, padding=(1, 1) if self.pad == "around" else (0, 1))


class Upsample(eqx.Module):
    """Doubles the grid: nearest neighbour, then a convolution (diffusers `Upsample2D`)."""

    conv: Conv2d

    def __init__(self, c: int, *, key: PRNGKeyArray):
        self.conv = Conv2d(c, c, key=key)

    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        """`size` (h2, w2) is that of the skip connection to come, where halving had rounded up; twice x's if None."""
        b, h, w, c = x.shape
        y = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        if size is not None and size != (2 * h, 2 * w):
            y = y[:, : size[0], : size[1]]  # PyTorch's nearest neighbour; jax.image.resize centres pixels otherwise
        return self.conv(y)
