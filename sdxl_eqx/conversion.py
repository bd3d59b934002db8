"""Models from one file format to another: what `scripts/convert_weights.py` does."""

import contextlib
import ctypes
import dataclasses
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from sdxl_eqx.data.assets import located, resolve
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.weights.destination import NATIVE
from sdxl_eqx.weights.folder import read_folder, write_folder
from sdxl_eqx.weights.hub import find
from sdxl_eqx.weights.index import index_of
from sdxl_eqx.weights.lora import merge, read_lora, write_kohya, write_peft
from sdxl_eqx.weights.model import PARTS, Model
from sdxl_eqx.weights.native import write_native
from sdxl_eqx.weights.open import Source, open_model
from sdxl_eqx.weights.read import read_json
from sdxl_eqx.weights.run import CHECKPOINTS, find_checkpoint
from sdxl_eqx.weights.single_file import known, write_single_file
from sdxl_eqx.weights.skeletons import check, skeleton_places
from sdxl_eqx.weights.tensors import DTYPES, Tensor

log = logging.getLogger("sdxl_eqx")

LORA_FORMATS = ("kohya", "peft")
ONE_FILE = ("single-file", *LORA_FORMATS)


@dataclass(frozen=True)
class ConvertConfig:
    """Convert SDXL weights between file formats, tensor by tensor, bit for bit unless --dtype or --lora is given."""

    src: Annotated[str, tyro.conf.Positional]
    """Diffusers folder, Hub id, .safetensors file (whole model, UNet, VAE or ControlNet alone; a LoRA for --to kohya
    and peft), a run's folder, a folder in the native format, or `asset:NAME`."""
    dst: Annotated[str, tyro.conf.Positional]
    """Folder (diffusers, native) or .safetensors file (the others) to write."""
    to: Literal["diffusers", "single-file", "native", "kohya", "peft"] = "diffusers"
    """Format to write: diffusers' folder; one file for ComfyUI and A1111; this project's own, in Orbax; a LoRA for
    kohya's scripts and ComfyUI; a LoRA for diffusers."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    """Dtype of the floating-point tensors."""
    unet: str = ""
    """Another UNet to put in, such as SDXL Lightning's: file, folder, Hub id or run."""
    vae: str = ""
    """Another VAE to put in, or one for a single file that has none: file, folder or Hub id."""
    lora: tuple[str, ...] = ()
    """LoRA files to merge into the weights, in float32."""
    lora_scale: tuple[float, ...] = ()
    """Strength of each of them; 1 where none is given."""
    variant: str = ""
    """Word in the names of a folder's files, such as fp16."""
    revision: str = "main"
    """Branch, tag or commit on the Hub."""
    from_pt: bool = True
    """Read PyTorch-layout files (safetensors); otherwise Flax ones (.msgpack) where there are any."""
    step: int | None = None
    """Of a run: the checkpoint to take; the newest by default."""
    ema: bool = True
    """Of a run: take the moving average, if it has one, instead of the raw weights."""
    config_from: str = ""
    """Diffusers folder whose JSON configs describe a file that is not shaped like SDXL base or refiner."""
    overwrite: bool = False
    """Replace DST if it is there: a file, or a folder that holds a model."""


def convert(config: ConvertConfig) -> None:
    """Read, check, write.

    Raises:
        ValueError: for input that cannot be read, or a destination that is there.
        OSError: where the destination cannot be written. Nothing of it is left.
    """
    dst = Path(config.dst).resolve()
    _check_destination(config, dst)
    began = time.perf_counter()
    _give_memory_back()
    if config.to in LORA_FORMATS:
        nbytes, what = _convert_lora(config, dst)
    else:
        model = whole_model(config)
        if model.left_out:
            log.info("left out, as no model here has them: %s", ", ".join(model.left_out))
        save = partial(_save_tokenizers, model)
        if config.to == "single-file":
            if model.tokenizers is not None:
                log.info("left out, as a single file holds none: tokenizers; what loads it takes SDXL's own")
            write_single_file(model, dst)
        elif config.to == "native":
            write_native(model, dst, save_tokenizers=save, overwrite=config.overwrite)
        else:
            write_folder(model, dst, save_tokenizers=save, overwrite=config.overwrite)
        nbytes, what = model.nbytes, ", ".join(model.parts)
    log.info("%s: %.2f GB in %.1f s (%s)", dst, nbytes / 1e9, time.perf_counter() - began, what)


def _check_destination(config: ConvertConfig, dst: Path) -> None:
    """Check that DST may be written.

    Raises:
        ValueError: where it is there, of the wrong kind, or what is read lies in it.
    """
    if dst.exists() and not config.overwrite:
        raise ValueError(f"{dst}: is there already; give another name, or --overwrite to replace it.")
    one_file = config.to in ONE_FILE
    if one_file and (dst.suffix != ".safetensors" or dst.is_dir()):
        raise ValueError(f"{dst}: --to {config.to} writes a file, which is named *.safetensors.")
    if not one_file and dst.suffix in (".safetensors", ".ckpt"):
        raise ValueError(f"{dst}: --to {config.to} writes a folder; for one file give --to single-file.")
    if dst.is_dir():
        for name in (config.src, config.unet, config.vae, *config.lora):
            if name and dst in Path(name).resolve().parents:
                raise ValueError(f"{dst}: holds {name}, which is read, so it is not replaced; give another name.")


MMAP_THRESHOLD = -3
"""glibc's name of the size from which memory is had from the system and given back to it."""


def _give_memory_back() -> None:
    """Have freed arrays leave the process; glibc would keep those of up to 32 MB, hundreds of them by the end."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**20)


def whole_model(config: ConvertConfig) -> Model:
    """What is to be written: the model that `config.src` names, with all that is put in, checked but not read.

    Raises:
        ValueError: for what cannot be read, saying what it is.
    """
    configs = _configs_from(config.config_from)
    put_in = {part: name for part, name in (("unet", config.unet), ("vae", config.vae)) if name}
    model = _open(config, config.src, "SRC", configs=configs, parts=[part for part in PARTS if part not in put_in])
    if put_in and "controlnet" in model.configs:
        raise ValueError(f"{config.src}: a ControlNet, which has no {' and no '.join(put_in)} to replace.")
    for part, name in put_in.items():
        fallback = {**model.configs, **(configs or {})}
        other = _open(config, name, f"--{part}", fallback=fallback, parts=(part,))
        if part not in other.parts:
            has = ", ".join(other.parts or other.configs)
            raise ValueError(f"--{part} {name!r}: has no {part} but {has}; give a file that has.")
        check(dataclasses.replace(other, parts={part: other.parts[part]}), name)
        model = model.with_part(part, other)
    empty = [part for part in model.configs if part != "scheduler" and part not in model.parts]
    if empty:
        of = f" of variant {config.variant}" if config.variant else ""
        raise ValueError(f"{config.src}: {', '.join(empty)}: has a config but no safetensors{of}; fetch them.")
    check(model, config.src)
    target = None if config.dtype == "keep" else np.dtype(DTYPES[DTYPE_NAMES[config.dtype]])
    if config.lora:
        # With another dtype to come, the sum is rounded once, to that.
        model = _with_loras(model.cast(np.dtype(np.float32)) if target else model, config)
    elif config.lora_scale:
        raise ValueError("--lora-scale: there is no --lora; give the files.")
    return model.cast(target) if target else model


DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

USED = {"file": {"config_from"}, "folder": {"variant", "from_pt"}, "native": set(), "run": {"step", "ema"}}
"""Of the flags that say how SRC is read, those that mean something for each kind of it."""


def _check_used(config: ConvertConfig, source: Path) -> None:
    """Check that no flag is given that SRC has no use for.

    Raises:
        ValueError: naming it.
    """
    kind = (
        "file" if source.is_file()
        else "native" if (source / NATIVE).is_file()
        else "run" if (source / CHECKPOINTS).is_dir()
        else "folder"
    )  # fmt: skip
    known = USED[kind] if source.exists() else {"revision", "variant", "from_pt", "config_from"}
    if config.unet or config.vae:
        known = known | {"ema", "from_pt", "config_from"}  # of what is put in
    for name in ("config_from", "variant", "from_pt", "step", "ema", "revision"):
        value, default = getattr(config, name), ConvertConfig.__dataclass_fields__[name].default
        if value != default and name not in known:
            flag = name.replace("_", "-")
            what = {"file": "a file", "native": "a folder in the native format", "run": "a run"}.get(kind, "a folder")
            raise ValueError(f"--{flag} {value!r}: has no meaning for SRC, {what}; leave it out.")


def _open(
    config: ConvertConfig,
    name: str,
    flag: str,
    *,
    configs: Mapping[str, Any] | None = None,
    fallback: Mapping[str, Any] | None = None,
    parts: Sequence[str],
) -> Model:
    """A model by name; a run with the parts that it was trained with."""
    # The revision, the variant and the step are those of SRC alone.
    own = {"revision": config.revision, "variant": config.variant, "step": config.step} if flag == "SRC" else {}
    source = Source(located(name), flag, from_pt=config.from_pt, ema=config.ema, **own)
    if flag == "SRC":
        _check_used(config, Path(source.name))
    model = open_model(source, parts=parts, configs=configs, fallback=fallback)
    run = Path(source.name)
    return _of_run(run, config, model) if flag == "SRC" and (run / CHECKPOINTS).is_dir() else model


def _of_run(run: Path, config: ConvertConfig, unet: Model) -> Model:
    """A run's UNet with the parts that it was trained with: those of the model it began from, else of its export."""
    found = find_checkpoint(run, step=config.step)
    flags = found.saved.config
    absent = {
        "pretrained_model_name_or_path",
        "revision",
        "diffusion_scheduler_config",
        "caption_dropout",
    } - flags.keys()
    if absent:
        raise ValueError(f"{run}: its config lacks {', '.join(sorted(absent))}; take another checkpoint with --step.")
    log.info("%s: step %d, %s", run, found.step, found.item(ema=config.ema).name)
    begun = Source(
        located(flags["pretrained_model_name_or_path"]), "the run's --pretrained-model-name-or-path",
        flags["revision"], variant=flags.get("variant", ""), from_pt=flags.get("from_pt", True),
    )  # fmt: skip
    try:
        model = open_model(begun, parts=[part for part in PARTS if part != "unet"])
        absent = [part for part in PARTS if part != "unet" and part not in model.parts]
        why = f"{begun.name} has no {', '.join(absent)}" if absent else ""
    except ValueError as error:
        model, why = Model({}, {}), str(error)
    if why:
        export = run / "export"
        if not export.is_dir():
            raise ValueError(f"{run}: {why}, and the run has no export/ to take them from; finish the run first.")
        log.info("%s; the parts beside the UNet are those of %s", why, export)
        model = read_folder(export)
    changed = {key: value for key, value in flags["diffusion_scheduler_config"].items() if value}
    scheduler = ScheduleConfig.from_json({**model.configs.get("scheduler", {}), **changed}).to_json()
    return dataclasses.replace(
        model,
        parts={**unet.parts, **{part: x for part, x in model.parts.items() if part not in unet.parts}},
        configs={**model.configs, **unet.configs, "scheduler": scheduler},
        index=index_of(caption_dropout=flags["caption_dropout"]),
    )


def _with_loras(model: Model, config: ConvertConfig) -> Model:
    """The model with the LoRAs merged that the flags name."""
    scales = config.lora_scale or (1.0,) * len(config.lora)
    if len(scales) != len(config.lora):
        raise ValueError(f"--lora-scale: has {len(scales)} numbers for {len(config.lora)} files; give one for each.")
    files = [find(name, flag="--lora") for name in config.lora]
    for file in files:
        if not file.is_file():
            raise _lora_folder(file)
    loras = [read_lora(file, model) for file in files]
    return merge(model, list(zip(loras, scales, strict=True))) if loras else model


def _lora_folder(folder: Path) -> ValueError:
    inside = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"such as {folder / inside[0]}" if inside else "of which it has none"
    return ValueError(f"{folder}: a folder; give a LoRA's .safetensors file, {hint}.")


def _convert_lora(config: ConvertConfig, dst: Path) -> tuple[int, str]:
    """(bytes, what it was) of a LoRA written in another format."""
    used = ("src", "dst", "to", "overwrite", "revision", "config_from")
    fields = {field.name: field.default for field in dataclasses.fields(config) if field.name not in used}
    given = [name for name, default in fields.items() if getattr(config, name) != default]
    if given:
        name = given[0].replace("_", "-")
        raise ValueError(f"--{name}: is for models, and --to {config.to} writes a LoRA; leave it out.")
    base = _names_of({**known({}), **(_configs_from(config.config_from) or {})})
    file = find(config.src, flag="SRC", revision=config.revision)
    if not file.is_file():
        raise _lora_folder(file)
    lora = read_lora(file, base)
    if config.to == "kohya":
        write_kohya(lora, UNetConfig.from_json(base.configs["unet"]), dst)
    else:
        write_peft(lora, dst)
    ranks = sorted({layer.rank for layer in lora.layers.values()})
    nbytes = sum(layer.down.nbytes + layer.up.nbytes for layer in lora.layers.values())
    return nbytes, f"LoRA of {len(lora.layers)} layers, rank {', '.join(map(str, ranks))}"


def _names_of(configs: dict[str, dict[str, Any]]) -> Model:
    """A model without weights: its keys and shapes are what a LoRA's names are looked up in."""

    def nothing() -> np.ndarray:
        raise AssertionError("this model has names alone")

    parts = {
        part: {
            key: Tensor(place.shape, np.dtype(np.float32), nothing)
            for place in skeleton_places(part, configs[part])
            for key in place.keys
        }
        for part in PARTS
        if part in configs
    }
    return Model(parts, configs)


def _configs_from(folder: str) -> dict[str, dict[str, Any]] | None:
    """The JSON configs of a diffusers folder; None where none is named."""
    if not folder:
        return None
    place = resolve(folder)
    configs = {part: read_json(place / part / "config.json") for part in PARTS if (place / part).is_dir()}
    if not configs:
        raise ValueError(f"--config-from {folder}: no diffusers folder; it has none of {', '.join(PARTS)}.")
    scheduler = place / "scheduler" / "scheduler_config.json"
    return {**configs, **({"scheduler": read_json(scheduler)} if scheduler.is_file() else {})}


def _save_tokenizers(model: Model, folder: Path) -> None:
    """The model's own tokenizers, file by file, or SDXL's."""
    # Imported here: transformers takes a second, which not every conversion needs.
    from sdxl_eqx.data.tokenizer import FOLDERS, bundled_tokenizers, save_tokenizers

    if model.tokenizers is None:
        save_tokenizers(bundled_tokenizers(), folder)
        return
    for name in FOLDERS:
        for file in sorted((model.tokenizers / name).glob("*")):
            if file.is_file():
                (folder / name).mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name / file.name)  # not its mode: it may be read-only
