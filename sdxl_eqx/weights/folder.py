"""A model as a diffusers folder, read and written tensor by tensor."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdxl_eqx.weights.destination import appearing
from sdxl_eqx.weights.flax import read_flax
from sdxl_eqx.weights.hub import FLAX
from sdxl_eqx.weights.index import INDEX_NAME, complete_index
from sdxl_eqx.weights.model import PARTS, Model
from sdxl_eqx.weights.read import LEFT_OUT, STRANGERS, clip_key, read_json, weight_files
from sdxl_eqx.weights.tensors import Tensors, open_file, write_file

log = logging.getLogger("sdxl_eqx")

ALONE = {"UNet2DConditionModel": "unet", "ControlNetModel": "controlnet", "AutoencoderKL": "vae"}
"""Parts by the class that a folder of one alone names."""

OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the VAE's attention in files from before diffusers 0.13."""


def read_folder(
    folder: Path, *, variant: str = "", flax: bool = False, parts: Sequence[str] = (*PARTS, "controlnet")
) -> Model:
    """A diffusers folder, mapped and not read: whole, some of its parts, or one UNet or ControlNet alone.

    A part that has no weights, or is not among `parts`, is among the configs alone. With `flax`, a part's Flax weights
    are taken where it has them.

    Raises:
        ValueError: where a part is damaged, incomplete or pickled, or there is none.
    """
    index = read_json(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else None
    places = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    absent = [part for part in parts if part not in places and part in PARTS and any((index or {}).get(part) or ())]
    if absent:
        raise ValueError(f"{folder / INDEX_NAME}: names {absent[0]}, and there is no {absent[0]}/; fetch it.")
    if not places and (folder / "config.json").is_file():
        kind = str(read_json(folder / "config.json").get("_class_name"))
        if kind not in ALONE:
            raise ValueError(
                f"{folder}: holds one part alone (_class_name {kind}); read alone are {', '.join(ALONE)}. Give the "
                "whole model's folder."
            )
        places = {ALONE[kind]: folder}
    if not places:
        raise ValueError(f"{folder}: no diffusers folder; it has none of {', '.join(PARTS)}.")
    found: dict[str, Tensors] = {}
    configs: dict[str, dict[str, Any]] = {}
    left_out = []
    for part, place in places.items():
        configs[part] = read_json(place / "config.json")
        if part not in parts:
            continue
        msgpack = place / FLAX[part] if flax and part in FLAX else None
        if msgpack is not None and msgpack.is_file():
            found[part], ignored = read_flax(msgpack, part, configs[part])
        else:
            files = weight_files(place, variant=variant)
            if not files:
                continue
            if flax:
                log.info("%s: no Flax weights, so safetensors are read", place)
            found[part], ignored = read_part(part, files)
        left_out += [f"{part}.{key}" for key in ignored]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        configs["scheduler"] = read_json(scheduler)
    tokenizers = any((folder / name).is_dir() for name in ("tokenizer", "tokenizer_2"))
    return Model(
        found,
        configs,
        tuple(left_out),
        tokenizers=folder if tokenizers else None,
        index=index,
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
            if stored.rpartition(".")[2] in LEFT_OUT or stored.startswith(STRANGERS):
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
        ValueError: for numbers that are not finite; the same holds.
    """
    with appearing(folder, overwrite=overwrite) as building:
        for part, tensors in model.parts.items():
            place = building if part == "controlnet" else building / part
            stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            write_file(tensors, place / f"{stem}.safetensors", metadata={"format": "pt"})
            write_json(model.configs[part], place / "config.json")
        if "scheduler" in model.configs:
            write_json(model.configs["scheduler"], building / "scheduler" / "scheduler_config.json")
        if "text_encoder_2" in model.parts:
            index, lost = complete_index(model)
            if lost:
                log.info("left out, as no conversion writes them: %s", ", ".join(lost))
            write_json(index, building / INDEX_NAME)
            save_tokenizers(building)


def write_json(value: dict[str, Any], file: Path) -> None:
    """A JSON file as diffusers writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
