"""Models from one file format to another: what `scripts/convert_weights.py` does."""

import logging
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.tokenizer import load_tokenizers, save_tokenizers
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.weights.folder import read_folder, read_part, write_folder
from sdxl_eqx.weights.model import PARTS, Model
from sdxl_eqx.weights.names import places
from sdxl_eqx.weights.read import check_keys, model_folder, read_json
from sdxl_eqx.weights.single_file import read_single_file, write_single_file
from sdxl_eqx.weights.tensors import DTYPES, open_file

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class ConvertConfig:
    """Convert SDXL weights between file formats, tensor by tensor, bit for bit unless --dtype is given."""

    src: Annotated[str, tyro.conf.Positional]
    """Diffusers folder, Hub id, single .safetensors file (whole model or UNet alone), or `asset:NAME`."""
    dst: Annotated[str, tyro.conf.Positional]
    """Folder (diffusers) or .safetensors file (single-file) to write."""
    to: Literal["diffusers", "single-file"] = "diffusers"
    """Format to write."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    """Dtype of the floating-point tensors."""
    variant: str = ""
    """Word in the names of a folder's files, such as fp16."""
    revision: str = "main"
    """Branch, tag or commit on the Hub."""
    config_from: str = ""
    """Diffusers folder whose JSON configs describe a single file that is not shaped like SDXL base or refiner."""
    overwrite: bool = False
    """Replace DST if it is there."""


def convert(config: ConvertConfig) -> None:
    """Read, check, write.

    Raises:
        ValueError: for input that cannot be read, or a destination that is there.
    """
    dst = Path(config.dst)
    if dst.exists() and not config.overwrite:
        raise ValueError(f"{dst}: is there already; give another name, or --overwrite to replace it.")
    if config.to == "single-file" and dst.suffix != ".safetensors":
        raise ValueError(f"{dst}: a single file is named *.safetensors.")
    began = time.perf_counter()
    model = open_model(config)
    check(model, config.src)
    if model.left_out:
        log.info("left out, as no model here has them: %s", ", ".join(model.left_out))
    if config.dtype != "keep":
        model = model.cast(np.dtype(DTYPES[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[config.dtype]]))
    if config.to == "single-file":
        write_single_file(model, dst)
    else:
        write_folder(model, dst, save_tokenizers=partial(_save_tokenizers, model), overwrite=config.overwrite)
    seconds = time.perf_counter() - began
    log.info("%s: %.2f GB in %.1f s (%s)", dst, model.nbytes / 1e9, seconds, ", ".join(model.parts))


def open_model(config: ConvertConfig) -> Model:
    """The model that `config.src` names, mapped and checked but not read.

    Raises:
        ValueError: for what cannot be read, saying what it is.
    """
    configs = {}
    if config.config_from:
        other = Path(config.config_from)
        configs = {part: read_json(other / part / "config.json") for part in PARTS if (other / part).is_dir()}
        configs["scheduler"] = read_json(other / "scheduler" / "scheduler_config.json")
    source = Path(config.src)
    if source.is_file():
        if source.suffix in (".bin", ".ckpt", ".pt", ".pth"):
            raise ValueError(
                f"{source}: a PyTorch pickle, which can run code when read and is never loaded. Where you trust it: "
                'python -c "import torch, safetensors.torch as s; d = torch.load(IN, weights_only=True); '
                "s.save_file(d.get('state_dict', d), OUT)\""
            )
        if "conv_in.weight" in open_file(source)[0]:
            return _diffusers_unet(source, configs)
        return read_single_file(source, configs=configs or None)
    if config.src.startswith("asset:"):
        return read_folder(resolve(config.src), variant=config.variant)
    return read_folder(model_folder(config.src, revision=config.revision), variant=config.variant)


def check(model: Model, source: str) -> None:
    """Check every key and shape of a model against its configs.

    Raises:
        ValueError: naming the keys that are missing, unknown or of another shape.
    """
    for part, tensors in model.parts.items():
        config = model.configs[part]
        shapes = jax.eval_shape(partial(_module, part, config))
        check_keys(places(shapes), tensors, source=f"{source} ({part})")


def _module(part: str, config: dict[str, Any]) -> Any:
    key = jax.random.key(0)
    if part == "unet":
        return UNet(UNetConfig.from_json(config), key=key)
    if part == "vae":
        return VAE(VAEConfig.from_json(config), key=key)
    return CLIPText(CLIPTextConfig.from_json(config, projection=part == "text_encoder_2"), key=key)


def _diffusers_unet(file: Path, configs: dict[str, dict]) -> Model:
    beside = file.parent / "config.json"
    if "unet" not in configs and not beside.is_file():
        raise ValueError(f"{file}: a diffusers UNet without config.json beside it; give --config-from DIR.")
    tensors, ignored = read_part("unet", [file])
    return Model({"unet": tensors}, {"unet": configs.get("unet") or read_json(beside)}, tuple(ignored))


def _save_tokenizers(model: Model, folder: Path) -> None:
    """The model's own tokenizers, file by file, or SDXL's."""
    if model.tokenizers is None:
        save_tokenizers(load_tokenizers(folder), folder)
        return
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(model.tokenizers / name, folder / name)
