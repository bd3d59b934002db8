"""The autoencoder between pixels and latents."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from sdxl_eqx.models.hf_config import require
from sdxl_eqx.nn.attention import GridAttention
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.conv import Conv2d, Downsample, Upsample
from sdxl_eqx.nn.norm import GroupNorm
from sdxl_eqx.nn.resnet import ResNetBlock

EPS = 1e-6
"""Of every GroupNorm in the autoencoder."""


@dataclass(frozen=True)
class VAEConfig:
    """The shape of an autoencoder, under the names of diffusers' `vae/config.json`."""

    in_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    sample_size: int
    force_upcast: bool

    @classmethod
    def sdxl_base(cls) -> "VAEConfig":
        """The autoencoder of stabilityai/stable-diffusion-xl-base-1.0."""
        return cls(
            in_channels=3,
            latent_channels=4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            norm_num_groups=32,
            scaling_factor=0.13025,
            sample_size=1024,
            force_upcast=True,
        )

    @classmethod
    def tiny(cls) -> "VAEConfig":
        """Small enough to train on a laptop's CPU; its scaling_factor is the bundled weights' own."""
        return dataclasses.replace(
            cls.sdxl_base(),
            block_out_channels=(16, 32, 64, 84),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.7967,
            force_upcast=False,
        )

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Read diffusers' `vae/config.json`.

        Raises:
            ValueError: for a variant that SDXL does not use, with its key and value.
        """
        channels = tuple(config["block_out_channels"])
        require(
            "vae",
            config,
            must={
                "down_block_types": ("DownEncoderBlock2D",) * len(channels),
                "up_block_types": ("UpDecoderBlock2D",) * len(channels),
                "act_fn": "silu",
                "shift_factor": None,
                "latents_mean": None,
                "latents_std": None,
                "mid_block_add_attention": True,
                "use_quant_conv": True,
                "use_post_quant_conv": True,
            },
        )
        if config.get("out_channels", 3) != config.get("in_channels", 3):
            raise ValueError("vae config: in_channels and out_channels must be equal.")
        return cls(
            in_channels=config.get("in_channels", 3),
            latent_channels=config.get("latent_channels", 4),
            block_out_channels=channels,
            layers_per_block=config.get("layers_per_block", 1),
            norm_num_groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
            sample_size=config.get("sample_size", 32),
            force_upcast=config.get("force_upcast", True),
        )

    def to_json(self) -> dict[str, Any]:
        """diffusers' `vae/config.json`; `from_json` reads it back."""
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(self.block_out_channels),
            "force_upcast": self.force_upcast,
            "in_channels": self.in_channels,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_num_groups,
            "out_channels": self.in_channels,
            "sample_size": self.sample_size,
            "scaling_factor": self.scaling_factor,
            "up_block_types": ["UpDecoderBlock2D"] * len(self.block_out_channels),
        }

    @property
    def downscale(self) -> int:
        """Pixels to a side of one latent: 8 for SDXL."""
        return 2 ** (len(self.block_out_channels) - 1)

    def resnet(self, c_in: int, c_out: int, *, key: PRNGKeyArray) -> ResNetBlock:
        """A new residual block without time."""
        return ResNetBlock(c_in, c_out, None, groups=self.norm_num_groups, eps=EPS, key=key)


class Moments(eqx.Module):
    """The diagonal Gaussian posterior over latents, not yet scaled."""

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, "b h w c"]:
        """One draw (Kingma and Welling 2013)."""
        return self.at(jr.normal(key, self.mean.shape, self.mean.dtype))

    def at(self, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The latents at that unit noise."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


class VAEMidBlock(eqx.Module):
    """Residual block, attention over the grid, residual block."""

    resnets: tuple[ResNetBlock, ResNetBlock]
    attentions: tuple[GridAttention]

    def __init__(self, config: VAEConfig, *, key: PRNGKeyArray):
        first_key, attention_key, second_key = jr.split(key, 3)
        c = config.block_out_channels[-1]
        self.resnets = (config.resnet(c, c, key=first_key), config.resnet(c, c, key=second_key))
        self.attentions = (GridAttention(c, config.norm_num_groups, eps=EPS, key=attention_key),)

    def __call__(self, x: Float[Array, "b h w c"], compute: Compute) -> Float[Array, "b h w c"]:
        x = self.attentions[0](self.resnets[0](x), compute.attend)
        return self.resnets[1](x)


class EncoderBlock(eqx.Module):
    """Residual blocks, then a halving that pads below and to the right."""

    resnets: tuple[ResNetBlock, ...]
    downsamplers: tuple[Downsample] | None

    def __init__(self, config: VAEConfig, level: int, *, key: PRNGKeyArray):
        resnets_key, down_key = jr.split(key)
        c_in, c = config.block_out_channels[max(level - 1, 0)], config.block_out_channels[level]
        keys = jr.split(resnets_key, config.layers_per_block)
        self.resnets = tuple(config.resnet(c_in if i == 0 else c, c, key=k) for i, k in enumerate(keys))
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = None if last else (Downsample(c, pad="after", key=down_key),)

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class DecoderBlock(eqx.Module):
    """Residual blocks, then a doubling."""

    resnets: tuple[ResNetBlock, ...]
    upsamplers: tuple[Upsample] | None

    def __init__(self, config: VAEConfig, level: int, *, key: PRNGKeyArray):
        resnets_key, up_key = jr.split(key)
        channels = config.block_out_channels
        c_in, c = channels[min(level + 1, len(channels) - 1)], channels[level]
        keys = jr.split(resnets_key, config.layers_per_block + 1)
        self.resnets = tuple(config.resnet(c_in if i == 0 else c, c, key=k) for i, k in enumerate(keys))
        self.upsamplers = None if level == 0 else (Upsample(c, key=up_key),)

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Encoder(eqx.Module):
    """Pixels to the moments' channels (diffusers `Encoder`)."""

    conv_in: Conv2d
    down_blocks: tuple[EncoderBlock, ...]
    mid_block: VAEMidBlock
    conv_norm_out: GroupNorm
    conv_out: Conv2d

    def __init__(self, config: VAEConfig, *, key: PRNGKeyArray):
        in_key, down_key, mid_key, out_key = jr.split(key, 4)
        channels = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, channels[0], key=in_key)
        self.down_blocks = tuple(
            EncoderBlock(config, i, key=k) for i, k in enumerate(jr.split(down_key, len(channels)))
        )
        self.mid_block = VAEMidBlock(config, key=mid_key)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=EPS)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, key=out_key)

    def __call__(self, x: Float[Array, "b H W c"], compute: Compute) -> Float[Array, "b h w c2"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = compute.run(block, x)
        x = self.mid_block(x, compute)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(eqx.Module):
    """Latents to pixels (diffusers `Decoder`)."""

    conv_in: Conv2d
    mid_block: VAEMidBlock
    up_blocks: tuple[DecoderBlock, ...]
    conv_norm_out: GroupNorm
    conv_out: Conv2d

    def __init__(self, config: VAEConfig, *, key: PRNGKeyArray):
        in_key, mid_key, up_key, out_key = jr.split(key, 4)
        channels = config.block_out_channels
        levels = range(len(channels))
        self.conv_in = Conv2d(config.latent_channels, channels[-1], key=in_key)
        self.mid_block = VAEMidBlock(config, key=mid_key)
        self.up_blocks = tuple(
            DecoderBlock(config, i, key=k) for i, k in zip(reversed(levels), jr.split(up_key, len(levels)), strict=True)
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], eps=EPS)
        self.conv_out = Conv2d(channels[0], config.in_channels, key=out_key)

    def __call__(self, z: Float[Array, "b h w c"], compute: Compute) -> Float[Array, "b H W c3"]:
        y = self.mid_block(self.conv_in(z), compute)
        for block in self.up_blocks:
            y = compute.run(block, y)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(y)))


class VAE(eqx.Module):
    """The KL autoencoder of latent diffusion (Rombach et al. 2022; diffusers `AutoencoderKL`)."""

    encoder: Encoder
    decoder: Decoder
    quant_conv: Conv2d
    post_quant_conv: Conv2d
    config: VAEConfig = eqx.field(static=True)

    def __init__(self, config: VAEConfig, *, key: PRNGKeyArray):
        encoder_key, decoder_key, quant_key, post_key = jr.split(key, 4)
        c = config.latent_channels
        self.encoder = Encoder(config, key=encoder_key)
        self.decoder = Decoder(config, key=decoder_key)
        self.quant_conv = Conv2d(2 * c, 2 * c, 1, key=quant_key)
        self.post_quant_conv = Conv2d(c, c, 1, key=post_key)
        self.config = config

    def encode(self, pixels: Float[Array, "b H W c"], *, compute: Compute = Compute()) -> Moments:
        """Posterior of pixels in [-1, 1], log-variance clipped to [-30, 20]. Multiply a draw by scaling_factor."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(pixels, compute)), 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, z: Float[Array, "b h w c"], *, compute: Compute = Compute()) -> Float[Array, "b H W c3"]:
        """Pixels, about [-1, 1], of latents that were divided by scaling_factor."""
        return self.decoder(self.post_quant_conv(z), compute)
