"""How models compute on these devices: their attention, and what is said of it."""

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial

from sdxl_eqx.arrays import Attend
from sdxl_eqx.config import AttentionConfig, GenerateConfig, TrainConfig
from sdxl_eqx.kernels.choose import choose
from sdxl_eqx.kernels.sharded import Sharded
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel.specs import Layout

log = logging.getLogger("sdxl_eqx")

VAE_HEAD = 512
"""Width of the one head of the VAE's attention."""

Config = TrainConfig | GenerateConfig


def attention_compute(config: Config, unet: UNetConfig, layout: Layout) -> Compute:
    """How the UNet's blocks are computed on these devices, without computing anything again.

    Raises:
        ValueError: where the attention asked for cannot serve, or the mesh does not divide the heads.
    """
    attention, devices, parallel = config.attention, layout.mesh.devices, config.parallel
    # The mid block, at the last level, always has attention.
    levels = [i for i, has in enumerate(unet.attention_levels) if has or i == len(unet.attention_levels) - 1]
    heads = sorted({unet.heads[i] for i in levels})
    shared = _heads_axes(config, layout)
    if any(n % layout.size(shared) for n in heads):
        flags = [
            f"--{network}-{axis}-parallelism {size}"
            for axis in shared
            for network in ("ici", "dcn")
            if (size := getattr(parallel, f"{network}_{axis}_parallelism")) != 1
        ]
        raise ValueError(
            f"{', '.join(flags)}: the {layout.size(shared)} devices of {' x '.join(shared)} share attention's heads, "
            f"so they must divide this UNet's {' and '.join(map(str, heads))}; let them be "
            f"{' or '.join(map(str, _divisors(heads)))}."
        )
    attend, sentence = choose(
        attention.attention,
        devices.flat[0].platform,
        share=_share(config, layout, heads=layout.named("activation_heads")),
        dtype=config.model.activations_dtype,
        head_width=max(unet.block_out_channels[i] // unet.heads[i] for i in levels),
        block_sizes=config.flash_block_sizes,
        mask_padding=attention.mask_padding_tokens,
        min_seq_length=attention.flash_min_seq_length,
        split_heads=attention.split_head_dim,
    )
    log.info("%s", sentence)
    unroll = attention.scan_unroll if isinstance(attention, AttentionConfig) else 1
    return _on(layout, Compute(attend, scan_unroll=unroll))


def encoding_compute(config: Config, layout: Layout) -> Compute:
    """How VAE and text encoders are computed, in float32: long attention by a kernel where there is one."""
    share = _share(config, layout, heads=())
    attend, _ = choose("auto", layout.mesh.devices.flat[0].platform, share=share, dtype="float32", head_width=VAE_HEAD)
    return _on(layout, Compute(attend))


def _on(layout: Layout, compute: Compute) -> Compute:
    """On the devices of a mesh."""
    if layout.mesh.size == 1:
        return compute
    gather = layout.gather if layout.shares_weights else None
    return dataclasses.replace(compute, gather=gather, place=layout.place)


def _share(config: Config, layout: Layout, *, heads: tuple[str, ...]) -> Callable[[Attend], Attend] | None:
    """What puts an attention implementation on the mesh, if it is more than one device."""
    if layout.mesh.size == 1:
        return None
    return partial(
        Sharded,
        mesh=layout.mesh,
        batch=layout.named("activation_batch"),
        heads=heads,
        length=layout.named("activation_length"),
        uniform=config.attention.attention_sharding_uniform,
    )


def _heads_axes(config: Config, layout: Layout) -> tuple[str, ...]:
    """The axes that share heads in self-attention."""
    uniform = config.attention.attention_sharding_uniform
    return layout.axes("activation_heads") + (() if uniform else layout.axes("activation_length"))


def _divisors(heads: list[int]) -> list[int]:
    """What divides every number of heads."""
    common = math.gcd(*heads)
    return [n for n in range(1, common + 1) if common % n == 0]
