"""The UNet of Stable Diffusion XL, base and refiner."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from sdxl_eqx.models.unet_config import UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.conv import Conv2d, Downsample, Upsample
from sdxl_eqx.nn.embedding import TimestepEmbedding, sinusoid
from sdxl_eqx.nn.norm import GroupNorm
from sdxl_eqx.nn.resnet import ResNetBlock
from sdxl_eqx.nn.transformer import Transformer


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
            x = compute.run(resnet, x, temb)
            if self.attentions is not None:
                x = self.attentions[i](x, context, compute)
            outputs.append(x)
        if self.downsamplers is not None:
            outputs.append(compute.run(self.downsamplers[0], x))
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
        x = compute.run(self.resnets[0], x, temb)
        x = self.attentions[0](x, context, compute)
        return compute.run(self.resnets[1], x, temb)


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
            x = compute.run(resnet, jnp.concatenate([x, skip], axis=-1), temb)
            if self.attentions is not None:
                x = self.attentions[i](x, context, compute)
        return x if self.upsamplers is None else compute.run(self.upsamplers[0], x, size)


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
    *,
    compute: Compute,
) -> Float[Array, "b t"]:
    """The sum of time and `text_time` embeddings; the sinusoids in float32, whatever the weights' dtype."""
    dtype = time_embedding.linear_1.weight.dtype
    b = pooled.shape[0]
    time = sinusoid(timestep, config.block_out_channels[0]).astype(dtype)
    sizes = sinusoid(time_ids.reshape(-1), config.addition_time_embed_dim).reshape(b, -1)
    added = jnp.concatenate([pooled.astype(dtype), sizes.astype(dtype)], axis=-1)
    return compute.run(time_embedding, time) + compute.run(add_embedding, added)


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
        x: Float[Array, "b h w c_in"],
        timestep: Float[Array, " b"],
        context: Float[Array, "b s e"],
        pooled: Float[Array, "b p"],
        time_ids: Float[Array, "b i"],
        *,
        control: Control | None = None,
        compute: Compute = Compute(),
    ) -> Float[Array, "b h w c_out"]:
        """Predict noise (or velocity) in latents `x`.

        `timestep` is from 0 to 999; `context` the text of both encoders; `pooled` that of the second; `time_ids` are
        (original height, width, crop top, left, target height, width) in pixels; `control` what ControlNets make of the
        same inputs. The result has x's dtype.

        Raises:
            ValueError: for a `control` of a UNet of another depth.
        """
        temb = self.embed(timestep, pooled, time_ids, compute=compute).astype(x.dtype)
        context = context.astype(x.dtype)
        skips = [compute.run(self.conv_in, x)]
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
        return compute.run((self.conv_norm_out, jax.nn.silu, self.conv_out), y)

    def embed(
        self,
        timestep: Float[Array, " b"],
        pooled: Float[Array, "b p"],
        time_ids: Float[Array, "b i"],
        *,
        compute: Compute = Compute(),
    ) -> Float[Array, "b t"]:
        """The function `embed` by this model's layers."""
        return embed(self.time_embedding, self.add_embedding, self.config, timestep, pooled, time_ids, compute=compute)
