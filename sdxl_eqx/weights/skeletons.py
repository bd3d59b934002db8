"""What each part of a model must hold: its module's shapes, from its JSON config alone."""

import json
from functools import cache
from typing import Any

import equinox as eqx
import jax.random as jr

from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.controlnet import ControlNet, ControlNetConfig
from sdxl_eqx.models.hf_config import WRONG
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.names import Place, places
from sdxl_eqx.weights.read import check_keys


def skeleton(part: str, config: dict[str, Any]) -> Any:
    """The module of a part with shapes in place of arrays.

    Raises:
        ValueError: for a config of something that SDXL does not use.
    """
    key = jr.key(0)
    try:
        if part == "unet":
            return eqx.filter_eval_shape(UNet, UNetConfig.from_json(config), key=key)
        if part == "vae":
            return eqx.filter_eval_shape(VAE, VAEConfig.from_json(config), key=key)
        if part == "controlnet":
            return eqx.filter_eval_shape(ControlNet, ControlNetConfig.from_json(config), key=key)
        projection = part == "text_encoder_2"
        return eqx.filter_eval_shape(CLIPText, CLIPTextConfig.from_json(config, projection=projection), key=key)
    except WRONG as error:
        raise ValueError(f"{part}: its config is not of SDXL ({error!r}); fetch the model's own config.json.") from None


def skeleton_places(part: str, config: dict[str, Any]) -> list[Place]:
    """Where each array of that part lies in a file.

    Raises:
        ValueError: for a config of something that SDXL does not use.
    """
    return _places(part, json.dumps(config, sort_keys=True))


@cache
def _places(part: str, config: str) -> list[Place]:
    return places(skeleton(part, json.loads(config)))


def check(model: Model, source: str) -> None:
    """Check every key and shape of a model against its configs.

    Raises:
        ValueError: naming the keys that are missing, unknown or of another shape.
    """
    for part, tensors in model.parts.items():
        check_keys(skeleton_places(part, model.configs[part]), tensors, source=f"{source} ({part})")
