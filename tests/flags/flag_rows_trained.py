"""Rows of what trains instead of the whole UNet, or beside it."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from flag_row import Row, Rows, caught, program, seen, stand_in
from flag_rows_data import folder, inputs
from flag_rows_training import Silent

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.nn.linear import Int8Weight
from sdxl_eqx.nn.lora import LoraConv2d, LoraLinear
from sdxl_eqx.training.beginning import Beginning
from sdxl_eqx.training.networks import path_of, split
from sdxl_eqx.training.optimizer import rates
from sdxl_eqx.training.program import Program
from sdxl_eqx.weights.model import Model

# LoRA


def layers(config: TrainConfig) -> dict[str, Any]:
    """The layers with a change, by the ends of their paths."""

    def is_changed(x: Any) -> bool:
        return isinstance(x, LoraLinear | LoraConv2d)

    found = jax.tree_util.tree_leaves_with_path(program(config).networks(), is_leaf=is_changed)
    return {path_of(path).partition("transformer_blocks.")[2]: x for path, x in found if is_changed(x)}


def of_change(field: str) -> Any:
    """What the changes have in common."""
    return lambda config: {getattr(layer.lora, field) for layer in layers(config).values()}


def begun(config: TrainConfig) -> str:
    """The LoRA file that a run goes on from, or ''."""
    begin = Beginning(config, stand_in(Program), object.__new__(Silent), None)
    found = caught(
        "sdxl_eqx.training.beginning.read_lora",
        lambda: begin.read_init(stand_in(Model)),
    )
    return found.given[0].name if found else ""


ATTENTION = {f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")}
RANK = {"lora_rank": 4}
LORA: Rows = {
    "lora_rank": Row(4, of_change("rank"), set(), {4}),
    "lora_alpha": Row(2, of_change("strength"), {1.0}, {0.5}, RANK),
    "lora_targets": Row(["to_q", "feed_forward"], lambda c: {*layers(c)}, ATTENTION | {"ff.net.0.proj", "ff.net.2"},
                        {"attn1.to_q", "attn2.to_q", "ff.net.0.proj", "ff.net.2"}, RANK),
    "lora_init": Row(str(Path(__file__)), begun, "", Path(__file__).name, RANK),
    "lora_dropout": Row(0.25, of_change("dropout"), {0.0}, {0.25}, RANK),
    "use_rslora": Row(True, of_change("strength"), {1.0}, {2.0}, RANK),
    "use_dora": Row(True, lambda c: {x.lora_magnitude is not None for x in layers(c).values()}, {False}, {True}, RANK),
    "int8_base": Row(True, lambda c: {isinstance(x.weight, Int8Weight) for x in layers(c).values()}, {False}, {True},
                     RANK),
}  # fmt: skip

# Text encoders and ControlNet


def trained(config: TrainConfig) -> set[str]:
    """The networks of which arrays train."""
    leaves = jax.tree_util.tree_leaves_with_path(split(program(config).networks(), config)[0])
    return {path_of(path).removeprefix("encoders.").partition(".")[0] for path, _ in leaves}


def text(config: TrainConfig) -> tuple[set[str], bool, bool]:
    """(the networks that train, whether text is cached, whether the step trains its encoders)."""
    return trained(config), program(config).is_encoded, program(config).step_config.trains_text


def text_rate(config: TrainConfig) -> Any:
    """The learning rate of the UNet, and that of the text encoders."""
    schedules = rates(config, total_steps=100, batch_size=8)
    return pytest.approx([float(np.asarray(schedule(0))) for schedule in schedules if schedule is not None], rel=1e-5)


CONTROLNET = {"train_controlnet": True}
NETWORKS: Rows = {
    "train_text_encoder": Row(
        True, text, ({"unet"}, True, False), ({"unet", "text_encoder", "text_encoder_2"}, False, True)
    ),
    "text_encoder_learning_rate": Row(1e-3, text_rate, [4e-7, 4.25e-6], [4e-7, 1e-3], {"train_text_encoder": True}),
    "train_controlnet": Row(True, trained, {"unet"}, {"controlnet"}),
    "conditioning_image_column": Row("map", folder("condition_column"), "conditioning_image", "map", CONTROLNET),
    "controlnet_conditioning_dropout": Row(
        0.25, lambda c: program(c).step_config.control_dropout, 0.0, 0.25, CONTROLNET
    ),
}

# DreamBooth


def of_class(name: str = "") -> Any:
    """What the folder of the class is asked for; '' where there is none."""

    def observe(config: TrainConfig) -> Any:
        found = caught("sdxl_eqx.training.inputs.ImageFolder", lambda: inputs(config))
        return "" if found is None else found.named[name] if name else found.given[0]

    return observe


def class_weight(config: TrainConfig) -> float:
    """Of the loss of the class."""
    target = "sdxl_eqx.training.inputs.beside_class"
    return seen(target, lambda: inputs(config), training__inputs___open_class=Mock()).given[3]


DOG = {"class_prompt": "a dog"}
CLASS = {"class_data_dir": "dogs", **DOG}
DREAMBOOTH: Rows = {
    "instance_prompt": Row("a photo of sks dog", folder("caption"), "", "a photo of sks dog"),
    "class_data_dir": Row("dogs", of_class(), "", "dogs", along=DOG),
    "class_prompt": Row("a cat", of_class("caption"), "a dog", "a cat", CLASS),
    "prior_loss_weight": Row(0.5, class_weight, 1.0, 0.5, CLASS),
    "num_class_images": Row(3, of_class("max_samples"), 100, 3, CLASS),
}

# Quantization


def products(config: TrainConfig) -> tuple[str, int]:
    """(how products are rounded, in how many parts a weight's gradient is)."""
    of_step = program(config).step_config
    return of_step.quantization, of_step.quantization_shards


QUANTIZATION: Rows = {
    "quantization": Row("fp8", products, ("", 1), ("fp8", 1)),
    "use_qwix_quantization": Row(True, products, ("", 1), ("int8", 1)),
    "quantization_local_shard_count": Row(4, products, ("int8", 1), ("int8", 4), {"quantization": "int8"}),
}

ROWS: Rows = {**LORA, **NETWORKS, **DREAMBOOTH, **QUANTIZATION}
