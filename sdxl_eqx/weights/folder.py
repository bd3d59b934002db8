"""A model as a diffusers folder, read and written tensor by tensor."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdxl_eqx.weights.model import PARTS, Model
from sdxl_eqx.weights.read import clip_key, read_json, weight_files
from sdxl_eqx.weights.tensors import Tensors, open_file, write_file

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.42.0",
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""`model_index.json` of SDXL base."""

OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the VAE's attention in files from before diffusers 0.13."""


def read_folder(folder: Path, *, variant: str = "") -> Model:
    """A diffusers folder, whole or only some of its parts, mapped and not read.

    Raises:
        ValueError: where a part is damaged, incomplete or pickled, or there is none.
    """
    parts: dict[str, Tensors] = {}
    configs: dict[str, dict[str, Any]] = {}
    left_out = []
    for part in PARTS:
        if not (folder / part / "config.json").is_file():
            continue
        files = weight_files(folder / part, variant=variant)
        if not files:
            which = f" of variant {variant}" if variant else ""
            raise ValueError(f"{folder / part}: has a config but no safetensors{which}; fetch them.")
        configs[part] = read_json(folder / part / "config.json")
        parts[part], ignored = read_part(part, files)
        left_out += [f"{part}.{key}" for key in ignored]
    if not parts:
        raise ValueError(f"{folder}: no diffusers folder; it has none of {', '.join(PARTS)} with a config.json.")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        configs["scheduler"] = read_json(scheduler)
    index = folder / "model_index.json"
    tokenizers = any((folder / name).is_dir() for name in ("tokenizer", "tokenizer_2"))
    return Model(
        parts,
        configs,
        tuple(left_out),
        tokenizers=folder if tokenizers else None,
        index=read_json(index) if index.is_file() else None,
    )


def read_part(part: str, files: Sequence[Path]) -> tuple[Tensors, list[str]]:
    """(tensors of one part in the published names, keys left out).

    Raises:
        ValueError: for keys held twice.
    """
    tensors: Tensors = {}
    ignored = []
    for file in files:
        for stored, tensor in open_file(file)[0].items():
            key = _published(part, stored)
            if stored.rpartition(".")[2] == "position_ids":
                ignored.append(stored)
            elif key in tensors:
                raise ValueError(f"{file}: {key} is held twice by {', '.join(str(f) for f in files)}.")
            else:
                tensors[key] = tensor
    return tensors, ignored


def _published(part: str, key: str) -> str:
    if part.startswith("text_encoder"):
        return clip_key(key)
    words = key.split(".")
    if part == "vae" and "attentions" in words and words[-2] in OLD_VAE:
        words[-2] = OLD_VAE[words[-2]]
    return ".".join(words)


def write_folder(
    model: Model, folder: Path, *, save_tokenizers: Callable[[Path], None], overwrite: bool = False
) -> None:
    """Write a model as a diffusers folder, which appears under its name when it is whole.

    `save_tokenizers` writes `tokenizer/` and `tokenizer_2/`. With `overwrite` a folder that was there is replaced.

    Raises:
        OSError: where it cannot be written; nothing is left, and what was there stays.
    """
    building = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(building, ignore_errors=True)
    try:
        for part, tensors in model.parts.items():
            stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            write_file(tensors, building / part / f"{stem}.safetensors", metadata={"format": "pt"})
            write_json(model.configs[part], building / part / "config.json")
        if "scheduler" in model.configs:
            write_json(model.configs["scheduler"], building / "scheduler" / "scheduler_config.json")
        if "text_encoder_2" in model.parts:
            write_json(model.index or INDEX, building / "model_index.json")
            save_tokenizers(building)
        if overwrite and folder.exists():
            folder.rename(old)
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(value: dict[str, Any], file: Path) -> None:
    """A JSON file as diffusers writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
