"""A model from whatever people have: what it says it is, and its weights on the devices."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from sdxl_eqx.config import DiffusionSchedulerConfig, ModelConfig, ModelSourceConfig
from sdxl_eqx.data.assets import located
from sdxl_eqx.data.tokenizer import Tokenizers, bundled_tokenizers, load_tokenizers, tokenize
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.hf_config import WRONG
from sdxl_eqx.models.sdxl import Encoders, cast
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.parallel.specs import Layout, put
from sdxl_eqx.weights.model import PARTS, Model
from sdxl_eqx.weights.open import Source, open_model
from sdxl_eqx.weights.read import fill
from sdxl_eqx.weights.skeletons import skeleton
from sdxl_eqx.weights.tensors import Tensors

log = logging.getLogger("sdxl_eqx")

C = TypeVar("C")

SEEN = 32
"""Tensors of a UNet that its fingerprint is made of: a tenth of a gigabyte of SDXL's is read."""

MODEL_FLAG, UNET_FLAG = "--pretrained-model-name-or-path", "--unet-checkpoint"


@dataclass(frozen=True)
class ModelShapes:
    """The shapes of a model's parts, and its schedule."""

    unet: UNetConfig
    vae: VAEConfig
    text: CLIPTextConfig
    text_2: CLIPTextConfig
    schedule: ScheduleConfig

    @classmethod
    def sdxl_base(cls, scheduler: DiffusionSchedulerConfig) -> "ModelShapes":
        """stabilityai/stable-diffusion-xl-base-1.0, with what is changed of its schedule."""
        changed = scheduler.changed()
        schedule = ScheduleConfig.from_json({**ScheduleConfig().to_json(), **changed})
        text, text_2 = CLIPTextConfig.sdxl_base(), CLIPTextConfig.sdxl_base_2()
        return cls(UNetConfig.sdxl_base(), VAEConfig.sdxl_base(), text, text_2, schedule)

    def encoder_shapes(self) -> Encoders:
        """VAE and text encoders, float32 shapes in place of arrays."""
        key = jr.key(0)
        return eqx.filter_eval_shape(
            lambda: Encoders(CLIPText(self.text, key=key), CLIPText(self.text_2, key=key), VAE(self.vae, key=key))
        )

    def check_resolution(self, resolution: int) -> None:
        """Check that the levels of VAE and UNet divide a picture's side.

        Raises:
            ValueError: with what they divide by.
        """
        multiple = self.vae.downscale * 2 ** (len(self.unet.block_out_channels) - 1)
        if resolution % multiple:
            raise ValueError(
                f"--resolution {resolution}: this model divides sides by {multiple}; use a multiple of {multiple}."
            )


@dataclass(frozen=True)
class ModelParts(ModelShapes):
    """A model, read but for its weights."""

    name: str
    """File or folder, for errors."""
    variant: str
    model: Model
    tokenizers: Tokenizers
    scheduler: dict[str, Any]
    """What diffusers' `scheduler_config.json` says, with what is changed of it."""

    @classmethod
    def read(
        cls, config: ModelSourceConfig, scheduler: DiffusionSchedulerConfig, *, token: str, with_weights: bool = True
    ) -> "ModelParts":
        """Read the configs and tokenizers of the model that the config names, and check that they go together.

        Without `with_weights` the Hub is asked for no more than these, but for another UNet.

        Raises:
            ValueError: naming the file or flag, the value and the remedy.
        """
        token = token or os.environ.get("HF_TOKEN", "")
        name = config.pretrained_model_name_or_path
        source = Source(located(name), MODEL_FLAG, config.revision, token, config.variant, from_pt=config.from_pt)
        is_new = isinstance(config, ModelConfig) and config.train_new_unet
        other_unet = is_new or config.unet_checkpoint
        parts = [part for part in PARTS if part != "unet" or not other_unet] if with_weights else []
        model = open_model(source, parts=parts)
        if not model.configs.keys() - {"unet"}:
            raise ValueError(
                f"{MODEL_FLAG} {name!r}: holds a UNet alone; name a whole model there, and this with {UNET_FLAG}."
            )
        if config.unet_checkpoint:
            other = Source(located(config.unet_checkpoint), UNET_FLAG, token=token, from_pt=config.from_pt)
            model = _with_unet(model, other)
        if isinstance(config, ModelConfig) and config.train_new_unet and config.norm_num_groups > 0:
            unet = {**model.configs["unet"], "norm_num_groups": config.norm_num_groups}
            model = dataclasses.replace(model, configs={**model.configs, "unet": unet})
        changed = scheduler.changed()
        configs = _Configs(source.name, model)
        parts = cls(
            name=source.name,
            variant=config.variant,
            model=model,
            unet=configs.read("unet", UNetConfig.from_json),
            vae=configs.read("vae", VAEConfig.from_json),
            text=configs.read("text_encoder", partial(CLIPTextConfig.from_json, projection=False)),
            text_2=configs.read("text_encoder_2", partial(CLIPTextConfig.from_json, projection=True)),
            schedule=configs.read("scheduler", lambda found: ScheduleConfig.from_json({**found, **changed})),
            scheduler={**model.configs["scheduler"], **changed},
            tokenizers=load_tokenizers(model.tokenizers) if model.tokenizers else bundled_tokenizers(),
        )
        parts.check(inpainting=not isinstance(config, ModelConfig))
        return parts

    @cached_property
    def fingerprint(self) -> str:
        """Tells the weights of the UNet's files from others of the same shapes, by some of them; '' without files."""
        tensors = self.model.parts.get("unet", {})
        seen = sorted(tensors)[:: max(len(tensors) // SEEN, 1)]
        return _fingerprint(seen, [tensors[key].read() for key in seen]) if seen else ""

    def check(self, *, inpainting: bool = False) -> None:
        """Check that the parts fit each other; a UNet for `inpainting` sees a mask and a picture too.

        Raises:
            ValueError: naming the two that do not.
        """
        context = self.text.hidden_size + self.text_2.hidden_size
        latent = self.vae.latent_channels
        seen = self.unet.in_channels if inpainting and self.unet.in_channels == 2 * latent + 1 else latent
        added = (self.text_2.projection_dim or 0) + 6 * self.unet.addition_time_embed_dim
        for what, has, wants in (
            ("cross_attention_dim, the width of both text encoders", self.unet.cross_attention_dim, context),
            ("projection_class_embeddings_input_dim", self.unet.projection_class_embeddings_input_dim, added),
            ("in_channels, the VAE's latent_channels", self.unet.in_channels, seen),
            ("out_channels, the VAE's latent_channels", self.unet.out_channels, latent),
        ):
            if has != wants:
                raise ValueError(
                    f"{self.name}: its UNet's config has {what}: {has}, the other parts make it {wants}; "
                    "they are not of one SDXL base model (the refiner cannot be trained alone)."
                )

    def tokenize(self, prompts: Sequence[str], chunks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Ids of both tokenizers, each `[b, 77 x chunks]`."""
        first, second = (tokenize(tokenizer, prompts, chunks)[0] for tokenizer in self.tokenizers)
        return first, second

    def tensors(self, part: str, *, flag: str) -> Tensors:
        """The weights of a part.

        Raises:
            ValueError: where the model has none, naming the flag that makes it new.
        """
        if part not in self.model.parts:
            which = f" of variant {self.variant}" if self.variant else ""
            or_new = f", or {flag}" if flag and not self.variant else ""
            raise ValueError(f"{self.name}: has no weights of {part}{which}; give a model that has{or_new}.")
        return self.model.parts[part]

    def encoders(self, config: ModelSourceConfig, layout: Layout, *, key: PRNGKeyArray) -> Encoders:
        """VAE and text encoders in float32, laid out over the mesh."""
        keys = jr.split(key, 2)
        may_be_new = isinstance(config, ModelConfig) and config.new_text_encoders

        def part(name: str, *, make: Callable[..., Any] | None = None) -> Any:
            if make is not None and name not in self.model.parts:
                return jax.jit(make, out_shardings=layout.shardings(jax.eval_shape(make)))()
            tensors = self.tensors(name, flag="--new-text-encoders" if name != "vae" else "")
            shapes = skeleton(name, self.model.configs[name])
            return _fill(shapes, tensors, layout, dtype=np.float32, source=f"{self.name} ({name})")

        def text(name: str, shape: CLIPTextConfig, text_key: PRNGKeyArray) -> Any:
            return part(name, make=(lambda: CLIPText(shape, key=text_key)) if may_be_new else None)

        return Encoders(
            text_encoder=text("text_encoder", self.text, keys[0]),
            text_encoder_2=text("text_encoder_2", self.text_2, keys[1]),
            vae=part("vae"),
        )

    def new_unet(self, config: ModelConfig, layout: Layout, *, key: PRNGKeyArray) -> UNet:
        """The UNet to start from, in weights_dtype, laid out over the mesh: the model's, or a random one."""
        dtype = jax.numpy.dtype(config.weights_dtype)

        if not config.train_new_unet:
            return self.stored_unet(config, layout, dtype=dtype)

        def make(k: PRNGKeyArray) -> UNet:
            return cast(UNet(self.unet, key=k), dtype)

        return jax.jit(make, out_shardings=layout.shardings(jax.eval_shape(make, key)))(key)

    def stored_unet(self, config: ModelSourceConfig, layout: Layout, *, dtype: Any) -> UNet:
        """The model's UNet in `dtype`, laid out over the mesh."""
        tensors = self.tensors("unet", flag="--train-new-unet" if isinstance(config, ModelConfig) else "")
        source = f"{config.unet_checkpoint or self.name} (unet)"
        return _fill(skeleton("unet", self.model.configs["unet"]), tensors, layout, dtype=dtype, source=source)


def fill_part(part: str, model: Model, layout: Layout, *, dtype: Any, source: str) -> Any:
    """A part of a model in `dtype`, laid out over the mesh.

    Raises:
        ValueError: where its tensors are not those that its config asks for.
    """
    shapes = skeleton(part, model.configs[part])
    return _fill(shapes, model.parts[part], layout, dtype=dtype, source=f"{source} ({part})")


def _fill(shapes: Any, tensors: Tensors, layout: Layout, *, dtype: Any, source: str) -> Any:
    """A model filled with tensors, laid out over the mesh; no more than one array of it is in memory at a time."""
    where = iter(jax.tree.leaves(layout.shardings(shapes)))
    return fill(shapes, tensors, dtype=dtype, source=source, put=lambda _, x: put(x, next(where)))


def _with_unet(model: Model, source: Source) -> Model:
    """The model with another UNet, and the schedule that it was trained for if it says so; the rest stays."""
    other = open_model(source, parts=("unet",), fallback={k: v for k, v in model.configs.items() if k == "unet"})
    if "unet" not in other.parts:
        has = ", ".join(other.parts or other.configs)
        raise ValueError(f"{source.flag} {source.name!r}: has no UNet but {has}; give one that has.")
    changed = model.with_part("unet", other)
    was, now = (m.configs.get("scheduler", {}).get("prediction_type") for m in (model, changed))
    if was != now:
        log.info("%s: a UNet of %s (the model's: %s); training and samples follow it", source.name, now, was)
    return changed


@dataclass(frozen=True)
class _Configs:
    """The JSON configs of a model, and where it lies."""

    name: str
    model: Model

    def read(self, part: str, make: Callable[[dict[str, Any]], C]) -> C:
        """The typed config of a part."""
        file = Path(self.name) / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if part not in self.model.configs:
            if self.model.parts.keys() <= {"vae", "controlnet"}:
                raise ValueError(f"{self.name}: holds {', '.join(self.model.configs)} alone; give a whole model.")
            if Path(self.name).is_file():
                hint = "; put one in: scripts/convert_weights.py --vae" if part == "vae" else ""
                raise ValueError(f"{self.name}: has no {part}; give a whole model{hint}.")
            raise ValueError(f"{file}: missing; a diffusers folder of SDXL has it.")
        try:
            return make(self.model.configs[part])
        except WRONG as error:
            raise ValueError(f"{file}: is not of SDXL ({error!r}); fetch the model's own.") from None


def vae_fingerprint(vae: VAE, config: VAEConfig) -> str:
    """Names what a VAE, its arrays in this process's memory, would make of any picture."""
    return _fingerprint([repr(config)], vae)


def text_fingerprint(encoders: Sequence[CLIPText], parts: ModelParts) -> str:
    """Names what both text encoders, their arrays in this process's memory, would make of any caption."""
    words = [repr(parts.text), repr(parts.text_2)]
    for tokenizer in parts.tokenizers:
        words += [tokenizer.backend_tokenizer.to_str(), str(tokenizer.pad_token_id)]
    return _fingerprint(words, encoders)


def _fingerprint(words: Sequence[str], weights: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for word in words:
        digest.update(word.encode())
    for leaf in jax.tree.leaves(weights):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
