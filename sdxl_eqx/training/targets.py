"""Which layers a LoRA changes."""

import fnmatch
import math
import re
from collections.abc import Iterator
from typing import Any

import jax

from sdxl_eqx.config import LoraTrainingConfig, TrainConfig
from sdxl_eqx.nn.conv import Conv2d
from sdxl_eqx.nn.linear import Linear
from sdxl_eqx.nn.lora import LoraShape

GROUPS = {
    "attention": r".*(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)",
    "feed_forward": r".*(ff\.net\.(0\.proj|2)|mlp\.fc[12])",
    "projection": r".*\.proj_(in|out)",
    "convolution": r".*(resnets\.\d+\.conv(1|2|_shortcut)|samplers\.0\.conv)",
}
"""The layers that each word stands for, by their paths."""


def lora_shape(config: LoraTrainingConfig) -> LoraShape:
    """What the changes have in common."""
    alpha = config.lora_alpha or config.lora_rank
    over = math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank
    return LoraShape(config.lora_rank, alpha / over, config.lora_dropout, config.use_dora)


def is_target(config: TrainConfig, path: str) -> bool:
    """Whether the layer at a path of the networks is changed, if its part trains; the VAE never does."""
    return not path.startswith("encoders.vae.") and any(
        _matches(target, path.removeprefix("encoders.")) for target in config.lora.lora_targets or ()
    )


def check_targets(config: TrainConfig, networks: Any) -> None:
    """Check that each target names a layer that trains, and that one is of the text encoders where they train.

    Raises:
        ValueError: with the target that does not, or all where none is.
    """
    layers = [path.removeprefix("encoders.") for path in _layers(networks, text=config.text.train_text_encoder)]
    for target in config.lora.lora_targets or ():
        if not any(_matches(target, path) for path in layers):
            raise ValueError(
                f"--lora-targets {target}: no layer that trains has such a name; give {', '.join(GROUPS)}, or the end "
                f"of a layer's name or a pattern, as to_q or {layers[-1]}."
            )
    texts = [path for path in layers if path.startswith("text_encoder")]
    if texts and not any(_matches(target, path) for target in config.lora.lora_targets or () for path in texts):
        raise ValueError(
            f"--lora-targets {' '.join(config.lora.lora_targets or ())}: none is a layer of the text encoders, which "
            "are to train; add attention or q_proj, or leave --train-text-encoder out."
        )


def _matches(target: str, path: str) -> bool:
    if target in GROUPS:
        return re.fullmatch(GROUPS[target], path) is not None
    return path.endswith(f".{target}") or fnmatch.fnmatchcase(path, target)


def _layers(networks: Any, *, text: bool) -> Iterator[str]:
    """The paths of dense layers and convolutions of the UNet and, if they train, of the text encoders."""

    def is_layer(x: Any) -> bool:
        return isinstance(x, Linear | Conv2d)

    for path, layer in jax.tree_util.tree_leaves_with_path(networks, is_leaf=is_layer):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if is_layer(layer) and (name.startswith("unet.") or (text and name.startswith("encoders.text_encoder"))):
            yield name
