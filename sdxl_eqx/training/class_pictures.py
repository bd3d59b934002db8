"""Pictures of a subject's class that the model itself draws before it is trained."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdxl_eqx.config import (
    AttentionKernelConfig,
    GenerateConfig,
    GenerateModelConfig,
    MachineConfig,
    MeshConfig,
    ModelSourceConfig,
    PictureConfig,
    PromptConfig,
    TrainConfig,
)
from sdxl_eqx.data.dreambooth import check_apart
from sdxl_eqx.data.sources.files import is_local, whole_file
from sdxl_eqx.data.sources.folder import METADATA, is_picture
from sdxl_eqx.generation import Pipeline
from sdxl_eqx.generation.memory import OutOfMemory
from sdxl_eqx.parallel import hosts

log = logging.getLogger("sdxl_eqx")


Draw = Callable[..., UInt8[np.ndarray, "b H W 3"]]
"""Called with a prompt and `seeds` it draws a picture for each seed, as `Pipeline` does."""


def draw_class_pictures(config: TrainConfig, check: Callable[[TrainConfig], Any]) -> int:
    """Draw what class_data_dir lacks to num_class_images with the model that is to be trained; returns how many.

    Pictures are of the model's own size, drawn as the run's samples are, with as many steps and as much guidance. Every
    process must call it at the same time, before the data are opened; what it loads is gone when it returns. Before any
    is drawn, `check` is called with the config of a run without them.

    Raises:
        ValueError: where pictures lack and cannot be drawn, naming the flag and the remedy.
        OSError: where they cannot be written.
    """
    subject = config.dreambooth
    if not subject.class_data_dir:
        return 0
    folder = Path(subject.class_data_dir)
    if not any(hosts.gather_json(hosts.together(partial(_lacking, config)))):
        return 0
    alone = dataclasses.replace(config, dreambooth=dataclasses.replace(subject, class_data_dir="", class_prompt=""))
    hosts.together(partial(check, alone))
    try:
        pipeline = Pipeline.of(_drawing_config(config))
        return make_class_pictures(
            pipeline, folder, subject.class_prompt, subject.num_class_images, config.run.seed,
            at_once=pipeline.drawing.shares,
        )  # fmt: skip
    except OutOfMemory as error:
        raise ValueError(
            f"--class-data-dir {folder}: its pictures cannot be drawn here ({error}); put pictures there, such as "
            "scripts/generate.py draws with its flags for little memory."
        ) from error


def make_class_pictures(draw: Draw, folder: Path, prompt: str, count: int, seed: int, *, at_once: int = 1) -> int:
    """Draw pictures of a prompt until a folder holds `count`; returns how many were drawn.

    Picture i is class_0000i.png, of seed + i. Each is there when it is whole, so that what was interrupted goes on and
    ends with the same pictures. Every process draws, the first one writes.

    Raises:
        OSError: where they cannot be written.
    """
    missing = hosts.gather_json(_missing(folder, count))[0]
    hosts.together(partial(folder.mkdir, parents=True, exist_ok=True))
    if missing:
        log.info("drawing %d pictures of %r into %s", len(missing), prompt, folder)
    for at in range(0, len(missing), at_once):
        numbers = missing[at : at + at_once]
        pictures = draw(prompt, seeds=[(seed + i) % 2**32 for i in numbers])
        hosts.together(partial(_write, folder, numbers, pictures))
    return len(missing)


def picture_names(folder: Path) -> list[str]:
    """The pictures of a local folder and of those in it, as `ImageFolder` finds them; none where there is no folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if _is_seen(path.relative_to(folder)))


def _is_seen(path: Path) -> bool:
    return is_picture(path.name) and not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _missing(folder: Path, count: int) -> list[int]:
    """The numbers of the pictures that are to be drawn."""
    there = set(picture_names(folder))
    free = (i for i in range(len(there) + count) if _file(i) not in there)
    return [i for i, _ in zip(free, range(count - len(there)), strict=False)]


def _file(number: int) -> str:
    return f"class_{number:05d}.png"


def _write(folder: Path, numbers: Sequence[int], pictures: UInt8[np.ndarray, "b H W 3"]) -> None:
    if hosts.is_first():
        for number, picture in zip(numbers, pictures, strict=True):
            with whole_file(folder / _file(number)) as partial_file:
                Image.fromarray(picture).save(partial_file, "PNG")


def _lacking(config: TrainConfig) -> bool:
    """Whether pictures are to be drawn.

    Raises:
        ValueError: they are, and cannot be.
    """
    subject, place = config.dreambooth, config.dreambooth.class_data_dir
    check_apart(place, config.data.train_data_dir)
    if not is_local(place):  # where there are too few, opening it says so
        return False
    folder = Path(place)
    there = len(picture_names(folder))
    if there >= subject.num_class_images:
        return False
    what = f"--class-data-dir {place}: holds {there} pictures, and --num-class-images asks for"
    what = f"{what} {subject.num_class_images}"
    if found := [path for name in METADATA for path in folder.rglob(name)]:
        raise ValueError(f"{what}; its samples are the lines of {found[0]}, to which none are drawn: ask for fewer.")
    for key in ("train_new_unet", "new_text_encoders"):
        if getattr(config.model, key):
            raise ValueError(
                f"{what}; with --{key.replace('_', '-')} the model can draw none yet: put pictures there, or ask for "
                "fewer."
            )
    return True


def _drawing_config(config: TrainConfig) -> GenerateConfig:
    """How the model of a run draws pictures before it is trained."""
    return GenerateConfig(
        machine=_as(MachineConfig, config.run),
        model=GenerateModelConfig(
            **vars(_as(ModelSourceConfig, config.model)), hf_access_token=config.data.hf_access_token
        ),
        attention=_as(AttentionKernelConfig, config.attention),
        flash_block_sizes=config.flash_block_sizes,
        diffusion_scheduler_config=config.diffusion_scheduler_config,
        picture=PictureConfig(
            **{**vars(_as(PromptConfig, config.sample)), "prompt": config.dreambooth.class_prompt},
            caption_chunks=config.data.caption_chunks,
        ),
        parallel=_as(MeshConfig, config.parallel),
    )


def _as(kind: Any, group: Any) -> Any:
    """A group as the one that it extends."""
    return kind(**{field.name: getattr(group, field.name) for field in dataclasses.fields(kind)})
