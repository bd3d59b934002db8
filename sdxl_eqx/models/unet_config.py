"""The shape of SDXL's UNet, base and refiner."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import PRNGKeyArray

from sdxl_eqx.models.hf_config import require
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

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text."""
        return self.projection_class_embeddings_input_dim - self.number_of_time_ids * self.addition_time_embed_dim

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
