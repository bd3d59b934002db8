"""What trains at a run's first step, and what does not train at all, on the devices."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.specs import put
from sdxl_eqx.training.checkpoint import flatten
from sdxl_eqx.training.networks import Networks, new_controlnet, replace_encoders, split, with_changes
from sdxl_eqx.training.program import Program
from sdxl_eqx.training.targets import lora_shape
from sdxl_eqx.weights.adapters import from_lora, parts_of
from sdxl_eqx.weights.lora import LoRA, read_lora
from sdxl_eqx.weights.model import Model

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class Beginning:
    """The model that a run begins with."""

    config: TrainConfig
    program: Program
    unet: UNet | None
    """None where a checkpoint has it."""
    encoders: Encoders | None
    """None where batches are encoded already."""

    def trained(self, *, key: PRNGKeyArray) -> Networks:
        """What trains, before the first step."""
        assert self.unet is not None  # a run that begins has one
        config = self.config
        if config.trains == "unet":
            trained = split(Networks(self.unet, self.encoders), config)[0]
            if not config.text.train_text_encoder:
                return trained
            # Copies: the state is donated, and the cache is still to be encoded with the ones that are here.
            copied = jax.tree.map(lambda x: x.copy(), trained.encoders)
            return replace_encoders(trained, copied)

        def make(networks: Networks) -> Networks:
            controlnet = new_controlnet(networks.unet, key=key) if config.trains == "controlnet" else None
            networks = Networks(networks.unet, networks.encoders, controlnet)
            return split(with_changes(networks, config, key=key), config)[0]

        networks = Networks(self.unet, self.encoders)
        where = self.program.layout.shardings(eqx.filter_eval_shape(make, networks))
        return jax.jit(make, out_shardings=where)(networks)

    def read_init(self, model: Model) -> LoRA | None:
        """The LoRA file to go on from, if one is asked for; `model` is what the files say of the model.

        Raises:
            ValueError: where it is no LoRA of this model.
            OSError: where it cannot be read.
        """
        if not self.config.lora.lora_init or self.config.trains != "lora":
            return None
        file = Path(self.config.lora.lora_init)
        if not file.is_file():
            raise ValueError(f"--lora-init {file}: is no file; give a LoRA's .safetensors.")
        try:
            return read_lora(file, model)
        except ValueError as error:
            raise ValueError(f"--lora-init {error}") from None

    def going_on(self, trained: Networks, lora: LoRA) -> Networks:
        """What trains, as a file has it. Every process must call it.

        Raises:
            ValueError: where the file does not fit what trains.
        """
        file, host = Path(self.config.lora.lora_init), hosts.to_host(trained)
        filled = hosts.together(
            partial(from_lora, lora, parts_of(host.unet, host.encoders), lora_shape(self.config.lora), file)
        )
        log.info("going on from %s: %d of its layers train", file, len(lora.layers))
        arrays = [array for part in filled.values() for array in jax.tree.leaves(part)]
        where = [x.sharding for x in jax.tree.leaves(trained)]
        return jax.tree.unflatten(jax.tree.structure(trained), [put(*pair) for pair in zip(arrays, where, strict=True)])

    def frozen(self) -> Networks:
        """What does not train."""
        shapes = self.program.frozen()
        arrays: dict[str, Any] = flatten(Networks(self.unet, self.encoders) if self.unet is not None else self.encoders)
        start = "" if self.unet is not None else "encoders."
        found = [arrays[path.removeprefix(start)] for path in flatten(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), found)
