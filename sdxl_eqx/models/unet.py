"""The UNet of Stable Diffusion XL, base and refiner."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from sdxl_eqx.models.hf_config import require
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.conv import Conv2d, Downsample, Upsample
from sdxl_eqx.nn.embedding import TimestepEmbedding, sinusoid
from sdxl_eqx.nn.norm import GroupNorm
from sdxl_eqx.nn.resnet import ResNetBlock
from sdxl_eqx.nn.transformer import Transformer


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a UNet, under the names of diffusers' `unet/config.json` where that is read."""

    sample_size: int
    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    attention_levels: tuple[bool, ...]
    layers_per_block: int
    transformer_layers: tuple[int, ...]
    heads: tuple[int, ...]
    cross_attention_dim: int
    addition_time_embed_dim: int
    projection_class_embeddings_input_dim: int
    norm_num_groups: int
    norm_eps: float

    @classmethod
    def sdxl_base(cls) -> "UNetConfig":
        """stabilityai/stable-diffusion-xl-base-1.0 (Podell et al. 2023)."""
        return cls(
            sample_size=128,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280),
            attention_levels=(False, True, True),
            layers_per_block=2,
            transformer_layers=(1, 2, 10),
            heads=(5, 10, 20),
            cross_attention_dim=2048,
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            norm_num_groups=32,
            norm_eps=1e-5,
        )

    @classmethod
    def sdxl_refiner(cls) -> "UNetConfig":
        """stabilityai/stable-diffusion-xl-refiner-1.0."""
        return dataclasses.replace(
            cls.sdxl_base(),
            block_out_channels=(384, 768, 1536, 1536),
            attention_levels=(False, True, True, False),
            transformer_layers=(4, 4, 4, 4),
            heads=(6, 12, 24, 24),
            cross_attention_dim=1280,
            projection_class_embeddings_input_dim=2560,
        )

    @classmethod
    def tiny(cls) -> "UNetConfig":
        """Small enough to train on a laptop's CPU, with every kind of layer that SDXL has."""
        return dataclasses.replace(
            cls.sdxl_base(),
            sample_size=8,
            block_out_channels=(64, 128),
            attention_levels=(False, True),
            layers_per_block=1,
            transformer_layers=(1, 2),
            heads=(2, 4),
            cross_attention_dim=128,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=112,
            norm_num_groups=16,
        )

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, part: str = "unet") -> "UNetConfig":
        """Read diffusers' `unet/config.json`; errors call it `part`.

        Raises:
            ValueError: for a variant that SDXL does not use, with its key and value.
        """
        names = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
        channels = tuple(config["block_out_channels"])
        levels = len(channels)
        down = tuple(config["down_block_types"])
        if any(name not in names for name in down):
            raise ValueError(f"{part} config: down_block_types {down} must be of {list(names)}.")
        attention = tuple(names[name] for name in down)
        up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
        # attention_head_dim holds head counts: diffusers kept the historic misnomer.
        heads = config.get("num_attention_heads") or config["attention_head_dim"]
        require(
            part,
            config,
            must={
                "up_block_types": up,
                "mid_block_type": "UNetMidBlock2DCrossAttn",
                "act_fn": "silu",
                "addition_embed_type": "text_time",
                "use_linear_projection": True,
                "flip_sin_to_cos": True,
                "freq_shift": 0,
                "center_input_sample": False,
                "resnet_time_scale_shift": "default",
                "time_embedding_type": "positional",
                "class_embed_type": None,
                "dual_cross_attention": False,
                "only_cross_attention": False,
                "conv_in_kernel": 3,
                "conv_out_kernel": 3,
                "downsample_padding": 1,
                "mid_block_scale_factor": 1,
                "encoder_hid_dim": None,
                "reverse_transformer_layers_per_block": None,
            },
        )
        return cls(
            sample_size=config.get("sample_size") or 128,
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            block_out_channels=channels,
            attention_levels=attention,
            layers_per_block=config.get("layers_per_block", 2),
            transformer_layers=_per_level(config.get("transformer_layers_per_block", 1), levels),
            heads=_per_level(heads, levels),
            cross_attention_dim=config["cross_attention_dim"],
            addition_time_embed_dim=config["addition_time_embed_dim"],
            projection_class_embeddings_input_dim=config["projection_class_embeddings_input_dim"],
            norm_num_groups=config.get("norm_num_groups", 32),
            norm_eps=config.get("norm_eps", 1e-5),
        )

    def to_json(self) -> dict[str, Any]:
        """diffusers' `unet/config.json`; `from_json` reads it back."""
        return {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": self.addition_time_embed_dim,
            "attention_head_dim": list(self.heads),
            "block_out_channels": list(self.block_out_channels),
            "cross_attention_dim": self.cross_attention_dim,
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in self.attention_levels],
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": self.in_channels,
            "layers_per_block": self.layers_per_block,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "norm_eps": self.norm_eps,
            "norm_num_groups": self.norm_num_groups,
            "out_channels": self.out_channels,
            "projection_class_embeddings_input_dim": self.projection_class_embeddings_input_dim,
            "sample_size": self.sample_size,
            "transformer_layers_per_block": list(self.transformer_layers),
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.attention_levels)],
            "upcast_attention": False,
            "use_linear_projection": True,
        }

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def number_of_time_ids(self) -> int:
        """Numbers of micro-conditioning beside the pooled text: 6 for the base model, 5 for the refiner."""
        return 5 if self.projection_class_embeddings_input_dim == 1280 + 5 * self.addition_time_embed_dim else 6

    def transformer(self, level: int, *, key: PRNGKeyArray) -> Transformer:
        """A new transformer stage of that level."""
        return Transformer(
            self.block_out_channels[level],
            self.cross_attention_dim,
            self.heads[level],
            self.transformer_layers[level],
            groups=self.norm_num_groups,
            key=key,
        )

    def resnet(self, c_in: int, c_out: int, *, key: PRNGKeyArray) -> ResNetBlock:
        """A new residual block."""
        return ResNetBlock(c_in, c_out, self.time_width, groups=self.norm_num_groups, eps=self.norm_eps, key=key)


def _per_level(value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)


class DownBlock(eqx.Module):
    """Residual blocks, each followed by a transformer where the level has attention, then a halving."""

    resnets: tuple[ResNetBlock, ...]
    attentions: tuple[Transformer, ...] | None
    downsamplers: tuple[Downsample] | None

    def __init__(self, config: UNetConfig, level: int, *, key: PRNGKeyArray):
        resnets_key, attentions_key, down_key = jr.split(key, 3)
        c_in, c = config.block_out_channels[max(level - 1, 0)], config.block_out_channels[level]
        n = config.layers_per_block
        self.resnets = tuple(
            config.resnet(c_in if i == 0 else c, c, key=k) for i, k in enumerate(jr.split(resnets_key, n))
        )
        self.attentions = _transformers(config, level, n, key=attentions_key)
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = None if last else (Downsample(c, pad="around", key=down_key),)

    def __call__(
        self, x: Float[Array, "b h w c_in"], temb: Float[Array, "b t"], context: Float[Array, "b s e"], compute: Compute
    ) -> list[Float[Array, "b _ _ _"]]:
        """The output of each layer; the last one is the block's."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = compute.block(resnet)(x, temb)
            if self.attentions is not None:
                x = self.attentions[i](x, context, compute)
            outputs.append(x)
        if self.downsamplers is not None:
            outputs.append(self.downsamplers[0](x))
        return outputs


class MidBlock(eqx.Module):
    """Residual block, transformer, residual block."""

    resnets: tuple[ResNetBlock, ResNetBlock]
    attentions: tuple[Transformer]

    def __init__(self, config: UNetConfig, *, key: PRNGKeyArray):
        first_key, attention_key, second_key = jr.split(key, 3)
        c = config.block_out_channels[-1]
        self.resnets = (config.resnet(c, c, key=first_key), config.resnet(c, c, key=second_key))
        self.attentions = (config.transformer(len(config.block_out_channels) - 1, key=attention_key),)

    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b t"], context: Float[Array, "b s e"], compute: Compute
    ) -> Float[Array, "b h w c"]:
        x = compute.block(self.resnets[0])(x, temb)
        x = self.attentions[0](x, context, compute)
        return compute.block(self.resnets[1])(x, temb)


class UpBlock(eqx.Module):
    """Like `DownBlock`, with a skip connection concatenated before each residual block, then a doubling."""

    resnets: tuple[ResNetBlock, ...]
    attentions: tuple[Transformer, ...] | None
    upsamplers: tuple[Upsample] | None

    def __init__(self, config: UNetConfig, level: int, *, key: PRNGKeyArray):
        resnets_key, attentions_key, up_key = jr.split(key, 3)
        channels = config.block_out_channels
        c = channels[level]
        below, above = channels[min(level + 1, len(channels) - 1)], channels[max(level - 1, 0)]
        n = config.layers_per_block + 1
        self.resnets = tuple(
            config.resnet((below if i == 0 else c) + (above if i == n - 1 else c), c, key=k)
            for i, k in enumerate(jr.split(resnets_key, n))
        )
        self.attentions = _transformers(config, level, n, key=attentions_key)
        self.upsamplers = None if level == 0 else (Upsample(c, key=up_key),)

    def __call__(
        self,
        x: Float[Array, "b h w c_in"],
        skips: list[Float[Array, "b _ _ _"]],
        temb: Float[Array, "b t"],
        context: Float[Array, "b s e"],
        compute: Compute,
        size: tuple[int, int] | None,
    ) -> Float[Array, "b h2 w2 c_out"]:
        """`skips` are this block's, in the order of use; `size` is that of the next block's skips."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = compute.block(resnet)(jnp.concatenate([x, skip], axis=-1), temb)
            if self.attentions is not None:
                x = self.attentions[i](x, context, compute)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)


def _transformers(config: UNetConfig, level: int, n: int, *, key: PRNGKeyArray) -> tuple[Transformer, ...] | None:
    if not config.attention_levels[level]:
        return None
    return tuple(config.transformer(level, key=k) for k in jr.split(key, n))


class Control(eqx.Module):
    """What ControlNets add to a UNet: to each skip connection, and to the mid block's output (Zhang et al. 2023)."""

    down: tuple[Float[Array, "b _ _ _"], ...]
    mid: Float[Array, "b h w c"]


def embed(
    time_embedding: TimestepEmbedding,
    add_embedding: TimestepEmbedding,
    config: UNetConfig,
    timestep: Float[Array, " b"],
    pooled: Float[Array, "b p"],
    time_ids: Float[Array, "b i"],
) -> Float[Array, "b t"]:
    """The sum of time and `text_time` embeddings; the sinusoids in float32, whatever the weights' dtype."""
    dtype = time_embedding.linear_1.weight.dtype
    b = pooled.shape[0]
    time = sinusoid(timestep, config.block_out_channels[0]).astype(dtype)
    sizes = sinusoid(time_ids.reshape(-1), config.addition_time_embed_dim).reshape(b, -1)
    added = jnp.concatenate([pooled.astype(dtype), sizes.astype(dtype)], axis=-1)
    return time_embedding(time) + add_embedding(added)


class UNet(eqx.Module):
    """SDXL's noise predictor (Podell et al. 2023; diffusers `UNet2DConditionModel` with `text_time` conditioning)."""

    conv_in: Conv2d
    time_embedding: TimestepEmbedding
    add_embedding: TimestepEmbedding
    down_blocks: tuple[DownBlock, ...]
    mid_block: MidBlock
    up_blocks: tuple[UpBlock, ...]
    conv_norm_out: GroupNorm
    conv_out: Conv2d
    config: UNetConfig = eqx.field(static=True)

    def __init__(self, config: UNetConfig, *, key: PRNGKeyArray):
        in_key, time_key, add_key, down_key, mid_key, up_key, out_key = jr.split(key, 7)
        channels = config.block_out_channels
        levels = range(len(channels))
        self.conv_in = Conv2d(config.in_channels, channels[0], key=in_key)
        self.time_embedding = TimestepEmbedding(channels[0], config.time_width, key=time_key)
        self.add_embedding = TimestepEmbedding(
            config.projection_class_embeddings_input_dim, config.time_width, key=add_key
        )
        self.down_blocks = tuple(
            DownBlock(config, i, key=k) for i, k in zip(levels, jr.split(down_key, len(levels)), strict=True)
        )
        self.mid_block = MidBlock(config, key=mid_key)
        self.up_blocks = tuple(
            UpBlock(config, i, key=k) for i, k in zip(reversed(levels), jr.split(up_key, len(levels)), strict=True)
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, key=out_key)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timestep: Float[Array, " b"],
        context: Float[Array, "b s e"],
        pooled: Float[Array, "b p"],
        time_ids: Float[Array, "b i"],
        *,
        control: Control | None = None,
        compute: Compute = Compute(),
    ) -> Float[Array, "b h w c"]:
        """Predict noise (or velocity) in latents `x`.

        `timestep` is from 0 to 999; `context` the text of both encoders; `pooled` that of the second; `time_ids` are
        (original height, width, crop top, left, target height, width) in pixels; `control` what ControlNets make of the
        same inputs. The result has x's dtype.

        Raises:
            ValueError: for a `control` of a UNet of another depth.
        """
        temb = self.embed(timestep, pooled, time_ids).astype(x.dtype)
        context = context.astype(x.dtype)
        skips = [self.conv_in(x)]
        for down in self.down_blocks:
            skips.extend(down(skips[-1], temb, context, compute))
        y = self.mid_block(skips[-1], temb, context, compute)
        if control is not None:
            if len(control.down) != len(skips):
                raise ValueError(f"control must have {len(skips)} residuals, one a skip; got {len(control.down)}.")
            skips = [skip + extra.astype(x.dtype) for skip, extra in zip(skips, control.down, strict=True)]
            y = y + control.mid.astype(x.dtype)
        for up in self.up_blocks:
            used = [skips.pop() for _ in up.resnets]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            y = up(y, used, temb, context, compute, size)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(y)))

    def embed(
        self, timestep: Float[Array, " b"], pooled: Float[Array, "b p"], time_ids: Float[Array, "b i"]
    ) -> Float[Array, "b t"]:
        """The function `embed` by this model's layers."""
        return embed(self.time_embedding, self.add_embedding, self.config, timestep, pooled, time_ids)
