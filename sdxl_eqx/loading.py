"""The parts of a run's model: what the model folder says they are, and their weights on the devices."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from sdxl_eqx.config import DiffusionSchedulerConfig, ModelConfig
from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.tokenizer import Tokenizers, load_tokenizers, tokenize
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.sdxl import Encoders, cast
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.parallel.specs import replicated, shardings
from sdxl_eqx.weights.names import Place
from sdxl_eqx.weights.read import clip_key, model_folder, read_json, read_model, weight_files

C = TypeVar("C")


@dataclass(frozen=True)
class ModelParts:
    """A model folder, read but for its weights."""

    folder: Path
    unet: UNetConfig
    vae: VAEConfig
    text: CLIPTextConfig
    text_2: CLIPTextConfig
    schedule: ScheduleConfig
    tokenizers: Tokenizers

    @classmethod
    def read(cls, config: ModelConfig, scheduler: DiffusionSchedulerConfig, *, token: str) -> "ModelParts":
        """Read the configs and tokenizers of the folder that the config names, and check that they go together.

        Raises:
            ValueError: naming the file or flag, the value and the remedy.
        """
        name = config.pretrained_model_name_or_path
        token = token or os.environ.get("HF_TOKEN", "")
        folder = (
            resolve(name) if name.startswith("asset:") else model_folder(name, revision=config.revision, token=token)
        )
        changed = {k: v for k, v in dataclasses.asdict(scheduler).items() if v}
        parts = cls(
            folder=folder,
            unet=_config(UNetConfig.from_json, folder / "unet"),
            vae=_config(VAEConfig.from_json, folder / "vae"),
            text=_config(partial(CLIPTextConfig.from_json, projection=False), folder / "text_encoder"),
            text_2=_config(partial(CLIPTextConfig.from_json, projection=True), folder / "text_encoder_2"),
            schedule=ScheduleConfig.from_json({**read_json(folder / "scheduler" / "scheduler_config.json"), **changed}),
            tokenizers=load_tokenizers(folder),
        )
        parts.check()
        return parts

    def check(self) -> None:
        """Check that the parts fit each other.

        Raises:
            ValueError: naming the two that do not.
        """
        context = self.text.hidden_size + self.text_2.hidden_size
        added = (self.text_2.projection_dim or 0) + 6 * self.unet.addition_time_embed_dim
        for what, has, wants in (
            ("cross_attention_dim, the width of both text encoders", self.unet.cross_attention_dim, context),
            ("projection_class_embeddings_input_dim", self.unet.projection_class_embeddings_input_dim, added),
            ("in_channels, the VAE's latent_channels", self.unet.in_channels, self.vae.latent_channels),
            ("out_channels, the VAE's latent_channels", self.unet.out_channels, self.vae.latent_channels),
        ):
            if has != wants:
                raise ValueError(
                    f"{self.folder}: unet/config.json has {what}: {has}, the other parts make it {wants}; "
                    "they are not of one SDXL base model (the refiner cannot be trained alone)."
                )

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of both tokenizers, each `[b, 77]`."""
        first, second = (tokenize(tokenizer, prompts)[0] for tokenizer in self.tokenizers)
        return first, second

    def files(self, part: str, *, new: bool, flag: str) -> list[Path]:
        """The weight files of a part; [] where it is to be new.

        Raises:
            ValueError: where the folder has none, naming the flag that makes it new.
        """
        files = [] if new else weight_files(self.folder / part)
        if not files and not new:
            raise ValueError(f"{self.folder / part}: has no safetensors; give a folder that has, or {flag}.")
        return files

    def encoders(self, config: ModelConfig, mesh: Mesh, *, key: PRNGKeyArray) -> Encoders:
        """VAE and text encoders in float32, whole on every device."""
        keys = jr.split(key, 2)

        def part(
            name: str, make: Callable[..., Any], shape: Any, rename: Callable[[str], str], new: bool, part_key: Any
        ) -> Any:
            files = self.files(name, new=new and not weight_files(self.folder / name), flag="--new-text-encoders")
            if not files:
                return jax.jit(lambda k: make(shape, key=k), out_shardings=replicated(mesh))(part_key)
            skeleton = eqx.filter_eval_shape(make, shape, key=part_key)

            def put(_: Place, array: np.ndarray) -> jax.Array:
                return jax.device_put(array, replicated(mesh))

            return read_model(skeleton, files, dtype=np.float32, rename=rename, put=put)

        new = config.new_text_encoders
        return Encoders(
            text_encoder=part("text_encoder", CLIPText, self.text, clip_key, new, keys[0]),
            text_encoder_2=part("text_encoder_2", CLIPText, self.text_2, clip_key, new, keys[1]),
            vae=part("vae", VAE, self.vae, str, False, keys[0]),
        )

    def new_unet(self, config: ModelConfig, mesh: Mesh, *, key: PRNGKeyArray) -> UNet:
        """The UNet to start from, in weights_dtype, laid out over the mesh: the folder's, or a random one."""
        dtype = jax.numpy.dtype(config.weights_dtype)
        files = self.files("unet", new=config.train_new_unet, flag="--train-new-unet")

        def make(k: PRNGKeyArray) -> UNet:
            return cast(UNet(self.unet, key=k), dtype)

        skeleton = jax.eval_shape(make, key)
        layout = shardings(skeleton, mesh)
        if not files:
            return jax.jit(make, out_shardings=layout)(key)
        where = iter(jax.tree.leaves(layout))
        return read_model(skeleton, files, dtype=dtype, put=lambda _, array: jax.device_put(array, next(where)))


def _config(read: Callable[[dict[str, Any]], C], folder: Path) -> C:
    """The config of a part."""
    try:
        return read(read_json(folder / "config.json"))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'}: has no {error}; fetch the model's own.") from None


def fingerprint(encoders: Encoders, parts: ModelParts) -> str:
    """Names what the encoders would make of any picture and caption: their weights, configs and tokenizers."""
    digest = hashlib.blake2b(digest_size=16)
    for config in (parts.vae, parts.text, parts.text_2):
        digest.update(repr(config).encode())
    for tokenizer in parts.tokenizers:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        digest.update(str(tokenizer.pad_token_id).encode())
    for leaf in jax.tree.leaves(encoders):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
