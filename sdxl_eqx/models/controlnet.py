"""The ControlNet of Stable Diffusion XL: a picture that steers a UNet which stays as it is."""

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from sdxl_eqx.arrays import Scalar
from sdxl_eqx.models.hf_config import require
from sdxl_eqx.models.unet import Control, DownBlock, MidBlock, UNet, UNetConfig, embed
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.conv import Conv2d
from sdxl_eqx.nn.embedding import TimestepEmbedding

NOT_OF_A_CONTROLNET = ("out_channels", "sample_size", "up_block_types")
"""Keys of a UNet's config that diffusers' `ControlNetModel` does not have."""

FROM_UNET = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")
"""Parts that a ControlNet has in common with its UNet, and starts from."""


@dataclass(frozen=True)
class ControlNetConfig:
    """The shape of a ControlNet: its UNet's, and that of the layers that bring a picture to the latents' grid."""

    unet: UNetConfig
    """Its `sample_size` and `out_channels` say nothing of a ControlNet, and files do not hold them."""
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    @classmethod
    def sdxl_base(cls) -> "ControlNetConfig":
        """The ControlNet of stabilityai/stable-diffusion-xl-base-1.0, as diffusers/controlnet-canny-sdxl-1.0 is."""
        return cls(UNetConfig.sdxl_base())

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ControlNetConfig":
        """Read the `config.json` of diffusers' `ControlNetModel`.

        Raises:
            ValueError: for a variant that SDXL does not use, with its key and value.
        """
        part = "controlnet"
        # Older ControlNets, which are not SDXL's, lack these keys; diffusers' defaults then hold.
        config = {"addition_embed_type": None, "use_linear_projection": False, **config}
        require(
            part,
            config,
            must={
                "_class_name": "ControlNetModel",
                "controlnet_conditioning_channel_order": "rgb",
                "encoder_hid_dim_type": None,
                "global_pool_conditions": False,
                "num_class_embeds": None,
            },
        )
        return cls(
            unet=UNetConfig.from_json(config, part=part),
            conditioning_channels=config.get("conditioning_channels", cls.conditioning_channels),
            conditioning_embedding_out_channels=tuple(
                config.get("conditioning_embedding_out_channels", cls.conditioning_embedding_out_channels)
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The `config.json` of diffusers' `ControlNetModel`; `from_json` reads it back."""
        unet = {key: value for key, value in self.unet.to_json().items() if key not in NOT_OF_A_CONTROLNET}
        return unet | {
            "_class_name": "ControlNetModel",
            "conditioning_channels": self.conditioning_channels,
            "conditioning_embedding_out_channels": list(self.conditioning_embedding_out_channels),
            "controlnet_conditioning_channel_order": "rgb",
            "global_pool_conditions": False,
        }

    @property
    def downscale(self) -> int:
        """Pixels of the picture to a side of one latent: 8 for SDXL."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of each of the UNet's skip connections, in the order in which they arise."""
        channels, n = self.unet.block_out_channels, self.unet.layers_per_block
        below = [c for c in channels[:-1] for _ in range(n + 1)]  # each layer, and the halving after them
        return (channels[0], *below, *[channels[-1]] * n)


def zero_conv(c_in: int, c_out: int, kernel: int) -> Conv2d:
    """A convolution that gives zero until it is trained (Zhang et al. 2023, section 3.1)."""
    return jax.tree.map(jnp.zeros_like, Conv2d(c_in, c_out, kernel, key=jr.key(0)))


class ConditioningEmbedding(eqx.Module):
    """A picture as features of the latents' grid, zero at first (diffusers `ControlNetConditioningEmbedding`)."""

    conv_in: Conv2d
    blocks: tuple[Conv2d, ...]
    conv_out: Conv2d

    def __init__(self, config: ControlNetConfig, *, key: PRNGKeyArray):
        in_key, blocks_key = jr.split(key)
        channels = config.conditioning_embedding_out_channels
        self.conv_in = Conv2d(config.conditioning_channels, channels[0], key=in_key)
        widths = [pair for c, wider in itertools.pairwise(channels) for pair in ((c, c), (c, wider))]
        keys = jr.split(blocks_key, len(widths))
        self.blocks = tuple(Conv2d(c_in, c_out, key=k) for (c_in, c_out), k in zip(widths, keys, strict=True))
        self.conv_out = zero_conv(channels[-1], config.unet.block_out_channels[0], 3)

    def __call__(self, image: Float[Array, "b H W c_in"]) -> Float[Array, "b h w c_out"]:
        y = jax.nn.silu(self.conv_in(image))
        for i, block in enumerate(self.blocks):
            y = jax.nn.silu(block(y, stride=1 + i % 2))  # every second one halves the grid
        return self.conv_out(y)


class ControlNet(eqx.Module):
    """A UNet's way down with a picture beside the latents (Zhang et al. 2023; diffusers `ControlNetModel`)."""

    conv_in: Conv2d
    time_embedding: TimestepEmbedding
    add_embedding: TimestepEmbedding
    controlnet_cond_embedding: ConditioningEmbedding
    down_blocks: tuple[DownBlock, ...]
    controlnet_down_blocks: tuple[Conv2d, ...]
    mid_block: MidBlock
    controlnet_mid_block: Conv2d
    config: ControlNetConfig = eqx.field(static=True)

    def __init__(self, config: ControlNetConfig, *, key: PRNGKeyArray):
        in_key, time_key, add_key, image_key, down_key, mid_key = jr.split(key, 6)
        unet = config.unet
        channels = unet.block_out_channels
        self.conv_in = Conv2d(unet.in_channels, channels[0], key=in_key)
        self.time_embedding = TimestepEmbedding(channels[0], unet.time_width, key=time_key)
        self.add_embedding = TimestepEmbedding(unet.projection_class_embeddings_input_dim, unet.time_width, key=add_key)
        self.controlnet_cond_embedding = ConditioningEmbedding(config, key=image_key)
        self.down_blocks = tuple(DownBlock(unet, i, key=k) for i, k in enumerate(jr.split(down_key, len(channels))))
        self.controlnet_down_blocks = tuple(zero_conv(c, c, 1) for c in config.skip_channels)
        self.mid_block = MidBlock(unet, key=mid_key)
        self.controlnet_mid_block = zero_conv(channels[-1], channels[-1], 1)
        self.config = config

    @classmethod
    def from_unet(
        cls,
        unet: UNet,
        *,
        conditioning_channels: int = ControlNetConfig.conditioning_channels,
        conditioning_embedding_out_channels: tuple[int, ...] = ControlNetConfig.conditioning_embedding_out_channels,
        key: PRNGKeyArray,
    ) -> "ControlNet":
        """A ControlNet to train beside `unet`: it starts from copies of the UNet's weights and changes nothing yet.

        Call it under `jax.jit`, or the weights that the copies replace are drawn and held too.
        """
        given = ControlNetConfig(unet.config, conditioning_channels, conditioning_embedding_out_channels)
        # As if read from a file, so that a ControlNet that was saved and read has the same static config.
        new = cls(ControlNetConfig.from_json(given.to_json()), key=key)

        def parts(model: UNet | ControlNet) -> list[Any]:
            return [getattr(model, name) for name in FROM_UNET]

        # Copies, so that a train step may donate them while the frozen UNet lives on.
        return eqx.tree_at(parts, new, jax.tree.map(jnp.copy, parts(unet)))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timestep: Float[Array, " b"],
        context: Float[Array, "b s e"],
        pooled: Float[Array, "b p"],
        time_ids: Float[Array, "b i"],
        image: Float[Array, "b H W c3"],
        *,
        scale: float | Scalar = 1.0,
        compute: Compute = Compute(),
    ) -> Control:
        """What to add to the UNet at latents `x`, times `scale`, in x's dtype.

        `image` is in [0, 1], at 8 times the latents' sides; the other arguments are the UNet's.

        Raises:
            ValueError: where the image's sides are not those that belong to the latents'.
        """
        sides = tuple(self.config.downscale * side for side in x.shape[1:3])
        if image.shape[1:3] != sides:
            raise ValueError(
                f"a ControlNet's image must be {self.config.downscale} times as high and wide as the latents "
                f"{x.shape[1:3]}, so {sides}; it is {image.shape[1:3]}: resize it."
            )
        temb = embed(
            self.time_embedding, self.add_embedding, self.config.unet, timestep, pooled, time_ids, compute=compute
        )
        temb, context = temb.astype(x.dtype), context.astype(x.dtype)
        outputs = [compute.run(self.conv_in, x) + compute.run(self.controlnet_cond_embedding, image.astype(x.dtype))]
        for down in self.down_blocks:
            outputs.extend(down(outputs[-1], temb, context, compute))
        mid = self.mid_block(outputs[-1], temb, context, compute)
        factor = jnp.asarray(scale, x.dtype)
        residuals = [
            factor * compute.run(conv, y) for conv, y in zip(self.controlnet_down_blocks, outputs, strict=True)
        ]
        return Control(tuple(residuals), factor * compute.run(self.controlnet_mid_block, mid))


def sum_controls(controls: Sequence[Control]) -> Control:
    """What several ControlNets add together, each already times its scale (diffusers `MultiControlNetModel`).

    Raises:
        ValueError: where there is none, or they are of UNets of different depth.
    """
    if not controls:
        raise ValueError("sum_controls needs at least one Control, got none; a UNet without any takes control=None.")
    return jax.tree.map(lambda *residuals: functools.reduce(operator.add, residuals), *controls)
