"""Which arrays of the networks train."""

from functools import partial

import equinox as eqx
import jax
import jax.random as jr
import pytest
from tiny_step import TEXT, TEXT_2, UNET, VAE_CONFIG

from sdxl_eqx.config import LoraTrainingConfig, TextEncoderConfig, TrainConfig
from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.training.networks import Networks, path_of, split, with_changes
from sdxl_eqx.training.targets import check_targets


@pytest.fixture(scope="module")
def networks() -> Networks:
    """The shapes of a whole model."""
    key = jr.key(0)
    return eqx.filter_eval_shape(
        lambda: Networks(
            UNet(UNET, key=key), Encoders(CLIPText(TEXT, key=key), CLIPText(TEXT_2, key=key), VAE(VAE_CONFIG, key=key))
        )
    )


def asked(*targets: str, text: bool = True) -> TrainConfig:
    """A LoRA of such layers."""
    return TrainConfig(lora=LoraTrainingConfig(lora_rank=2, lora_targets=targets), text=TextEncoderConfig(text))


def trained(networks: Networks, config: TrainConfig) -> set[str]:
    """The paths of what trains."""
    changed = eqx.filter_eval_shape(partial(with_changes, config=config, key=jr.key(0)), networks)
    return {path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(split(changed, config)[0])}


@pytest.mark.parametrize("targets", [("attention", "convolution"), ("to_q", "q_proj", "conv_in"), ("*",)])
def test_a_lora_of_the_text_encoders_too_changes_nothing_of_the_vae(networks, targets):
    paths = trained(networks, asked(*targets))
    assert {path.partition(".")[0] for path in paths} == {"unet", "encoders"}
    assert not [path for path in paths if path.startswith("encoders.vae")]
    assert {path.split(".")[1] for path in paths if path.startswith("encoders")} == {"text_encoder", "text_encoder_2"}


def test_targets_must_name_a_layer_of_the_text_encoders_where_these_train(networks):
    said = r"--lora-targets to_q to_k: none is a layer of the text encoders.*add attention or q_proj, or leave --train-"
    with pytest.raises(ValueError, match=said):
        check_targets(asked("to_q", "to_k"), networks)
    check_targets(asked("to_q", "q_proj"), networks)
    check_targets(asked("to_q", "to_k", text=False), networks)


def test_a_target_that_nothing_is_named_by_is_refused(networks):
    with pytest.raises(ValueError, match=r"--lora-targets to_x: no layer that trains has such a name; give attention"):
        check_targets(asked("attention", "to_x"), networks)
