"""The networks of a step, and which of their arrays train."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.models.controlnet import ControlNet
from sdxl_eqx.models.sdxl import Encoders, cast
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.nn.lora import FIELDS, add_lora
from sdxl_eqx.nn.quantize import stored_in_int8
from sdxl_eqx.training.targets import is_target, lora_shape

TEXT = "encoders.text_encoder"
"""How the paths of both text encoders begin."""


class Networks(eqx.Module):
    """All that a step computes with; where some of the arrays are meant, None stands for the others."""

    unet: UNet
    encoders: Encoders | None
    """None where batches are encoded already."""
    controlnet: ControlNet | None = None
    """That which trains, if one does."""


def path_of(path: Any) -> str:
    """A path of a tree as attributes with dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_trained(path: str, config: TrainConfig) -> bool:
    """Whether the array at that path of Networks trains."""
    if config.trains == "lora":
        return path.rpartition(".")[2] in FIELDS
    if config.trains == "controlnet":
        return path.startswith("controlnet.")
    return path.startswith("unet.") or (config.text.train_text_encoder and path.startswith(TEXT))


def split(networks: Networks, config: TrainConfig) -> tuple[Networks, Networks]:
    """(what trains, what does not); `join` puts them together."""
    trained = jax.tree_util.tree_map_with_path(lambda path, _: is_trained(path_of(path), config), networks)
    return eqx.partition(networks, trained)


def join(trained: Networks, frozen: Networks) -> Networks:
    """The networks of both parts."""
    return eqx.combine(trained, frozen)


def replace_encoders(networks: Networks, encoders: Encoders | None) -> Networks:
    """The networks with other encoders."""
    return Networks(networks.unet, encoders, networks.controlnet)


def network_shapes(shapes: ModelShapes, config: TrainConfig) -> Networks:
    """The shapes of all that a step computes with, in the dtypes that they are stored in."""
    encoders = None if config.is_text_cached else shapes.encoder_shapes()
    return denoiser_shapes(shapes.unet, config, encoders)


def denoiser_shapes(config_of_unet: UNetConfig, config: TrainConfig, encoders: Encoders | None = None) -> Networks:
    """The shapes of what denoises, beside the encoders that are given."""
    dtype, key = jnp.dtype(config.model.weights_dtype), jr.key(0)

    def make() -> Networks:
        unet = cast(UNet(config_of_unet, key=key), dtype)
        if config.trains == "lora" and config.lora.int8_base:
            unet = stored_in_int8(unet)
        controlnet = new_controlnet(unet, key=key) if config.trains == "controlnet" else None
        return Networks(unet, None, controlnet)

    networks = replace_encoders(eqx.filter_eval_shape(make), encoders)
    return eqx.filter_eval_shape(partial(with_changes, config=config, key=key), networks)


def new_controlnet(unet: UNet, *, key: PRNGKeyArray) -> ControlNet:
    """The ControlNet that training begins with, in float32."""
    return cast(ControlNet.from_unet(unet, key=key), jnp.float32)


def with_changes(networks: Networks, config: TrainConfig, *, key: PRNGKeyArray) -> Networks:
    """The networks with a LoRA of no effect yet in each target, if LoRA is to train."""
    if config.trains != "lora":
        return networks
    encoders = networks.encoders if config.text.train_text_encoder else None
    adapted = add_lora(Networks(networks.unet, encoders), partial(is_target, config), lora_shape(config.lora), key=key)
    return Networks(adapted.unet, adapted.encoders or networks.encoders, networks.controlnet)
