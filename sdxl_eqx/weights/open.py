"""Any model that people have, opened by what it is: mapped, and not read until its tensors are asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_eqx.models.controlnet import ControlNetConfig
from sdxl_eqx.models.hf_config import WRONG
from sdxl_eqx.models.vae import VAEConfig
from sdxl_eqx.weights import ldm
from sdxl_eqx.weights.destination import NATIVE
from sdxl_eqx.weights.folder import ALONE, read_folder, read_part
from sdxl_eqx.weights.hub import find
from sdxl_eqx.weights.model import PARTS, Model
from sdxl_eqx.weights.native import item_tensors, read_native
from sdxl_eqx.weights.read import STRANGERS, read_json
from sdxl_eqx.weights.run import CHECKPOINTS, find_checkpoint
from sdxl_eqx.weights.single_file import known, read_single_file, stored_configs
from sdxl_eqx.weights.tensors import Tensors, open_file

Configs = Mapping[str, dict[str, Any]]
"""JSON configs by part."""


@dataclass(frozen=True)
class Source:
    """Where a model is and which of its files are meant."""

    name: str
    """File, folder or Hub id."""
    flag: str
    """Named in errors."""
    revision: str = "main"
    token: str = ""
    variant: str = ""
    from_pt: bool = True
    """Whether PyTorch-layout files are read where there are Flax files too."""
    step: int | None = None
    """Of a run's checkpoint; None is the newest."""
    ema: bool = True
    """A run's average, if it has one, instead of its weights."""


def open_model(
    source: Source, *, parts: Sequence[str] = PARTS, configs: Configs | None = None, fallback: Configs | None = None
) -> Model:
    """The model that `source` names: every format that is read here, told apart by what is in it.

    Only the weights of `parts` are fetched from the Hub, and looked at in a folder. Of a safetensors file, `configs`
    take the place of what it says of itself, and `fallback` the place of what its shapes tell.

    Raises:
        ValueError: for what cannot be read, saying what it is.
    """
    path = find(
        source.name, flag=source.flag, revision=source.revision, token=source.token, variant=source.variant,
        parts=parts, flax=not source.from_pt,
    )  # fmt: skip
    if path.is_file():
        return open_safetensors(path, configs=configs, fallback=fallback)
    if (path / NATIVE).is_file():
        return read_native(path)
    if (path / CHECKPOINTS).is_dir():
        found = find_checkpoint(path, step=source.step)
        configs = {"unet": found.saved.unet, **found.saved.beside}
        folders = {"unet": found.item(ema=source.ema), **found.beside(ema=source.ema)}
        tensors = {part: item_tensors(folder, part, configs[part]) for part, folder in folders.items()}
        return Model(tensors, {**configs, **_schedule(path, found.saved.config)})
    return read_folder(path, variant=source.variant, flax=not source.from_pt, parts=(*parts, "controlnet"))


def _schedule(run: Path, flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a run says of the schedule that its UNet was trained for: by its export, or by its flags."""
    exported = run / "export" / "scheduler" / "scheduler_config.json"
    if exported.is_file():
        return {"scheduler": read_json(exported)}
    changed = flags.get("diffusion_scheduler_config")
    said = {key: value for key, value in changed.items() if value} if isinstance(changed, dict) else {}
    return {"scheduler": said} if said else {}


def open_safetensors(file: Path, *, configs: Configs | None = None, fallback: Configs | None = None) -> Model:
    """A safetensors file: a whole model in one, or one part of one, in the layout of Stability AI or of diffusers.

    A part's config is the one of `configs`, of its own metadata, of `config.json` beside it, of `fallback`, or the
    published one that its shapes tell.

    Raises:
        ValueError: for what is no such file, saying what it is.
    """
    tensors, metadata = open_file(file)
    for is_it, part, guess in KINDS:
        if is_it(tensors):
            near, stored = _beside(file, part), stored_configs(metadata, file)
            config = {**known(tensors), **guess(), **(fallback or {}), **near, **stored, **(configs or {})}[part]
            if part == "unet" and not any(key.startswith("add_embedding.") for key in tensors):
                raise ValueError(f"{file}: a UNet of Stable Diffusion 1 or 2, without add_embedding; SDXL is needed.")
            if part == "vae" and "encoder.down.0.block.0.norm1.weight" in tensors:
                try:
                    renamed = ldm.vae_from_file(_of_vae(tensors), VAEConfig.from_json(config))
                    return Model({part: renamed}, {part: config})
                except WRONG as error:
                    raise ValueError(f"{file}: the config of its VAE is damaged ({error!r}).") from None
            published, ignored = read_part(part, [file])
            configs = {part: config, **({"scheduler": stored["scheduler"]} if "scheduler" in stored else {})}
            return Model({part: published}, configs, tuple(ignored))
    _refuse(tensors, file)
    return read_single_file(file, configs=configs, fallback=fallback)


def _beside(file: Path, part: str) -> dict[str, dict[str, Any]]:
    """The config of a part that lies beside its file, as in a diffusers folder."""
    beside = file.parent / "config.json"
    config = read_json(beside) if beside.is_file() else {}
    return {part: config} if ALONE.get(str(config.get("_class_name"))) == part else {}


def _of_vae(tensors: Tensors) -> Tensors:
    """Without what training left in the file of a VAE."""
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(STRANGERS)}


def _is_controlnet(tensors: Tensors) -> bool:
    return "controlnet_cond_embedding.conv_in.weight" in tensors


def _is_unet(tensors: Tensors) -> bool:
    return "conv_in.weight" in tensors and "conv_norm_out.weight" in tensors


def _is_vae(tensors: Tensors) -> bool:
    return "decoder.conv_in.weight" in tensors


KINDS: Sequence[tuple[Callable[[Tensors], bool], str, Callable[[], dict[str, dict[str, Any]]]]] = (
    (_is_controlnet, "controlnet", lambda: {"controlnet": ControlNetConfig.sdxl_base().to_json()}),
    (_is_unet, "unet", dict),
    (_is_vae, "vae", lambda: {"vae": VAEConfig.sdxl_base().to_json()}),
)
"""Files of one part: how each is known, which part it is, and the config that is taken for one that says none."""


def _refuse(tensors: Tensors, file: Path) -> None:
    """Say what a file is that is not a model.

    Raises:
        ValueError: where it is known to be something else.
    """
    if tensors.keys() & {"clip_g", "clip_l", "emb_params"}:
        raise ValueError(f"{file}: is an embedding (textual inversion), which is not read.")
    for what, words in (
        ("a LoRA; scripts/convert_weights.py MODEL OUT --lora puts it into a model", ("lora_", ".lora.")),
        ("a ControlNet in another layout; diffusers' is read", ("control_model.", "input_hint_block.", "lllite_")),
        ("a model of Flux or Stable Diffusion 3; SDXL is needed", ("double_blocks.", "joint_blocks.")),
    ):
        key = next((key for key in tensors if any(word in key for word in words)), None)
        if key is not None:
            raise ValueError(f"{file}: is {what} (it has {key}).")
