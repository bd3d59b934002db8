"""What `scripts/generate.py` does: every prompt drawn, every picture written with how it was made."""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_eqx.config import GenerateConfig, flat
from sdxl_eqx.generation.load import lora_names
from sdxl_eqx.generation.pipeline import Pipeline, each, prompt_of, strength_of
from sdxl_eqx.parallel import hosts
from sdxl_eqx.sampling.control_image import open_image, open_mask
from sdxl_eqx.sampling.grid import grid
from sdxl_eqx.sampling.parameters import ControlNetUse, Parameters, schedule_type
from sdxl_eqx.sampling.png import grid_file, next_number, picture_file, save_png
from sdxl_eqx.sampling.prompts import PromptLine, read_prompts

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    config: GenerateConfig
    """With what the prompt's line changes."""
    text: str
    seed: int


def lines_of(config: GenerateConfig) -> list[PromptLine]:
    """The prompts that a config names.

    Raises:
        ValueError: where the file of prompts is wrong.
    """
    picture = config.picture
    return read_prompts(picture.prompts_file) if picture.prompts_file else [PromptLine(picture.prompt, 1)]


def jobs_of(config: GenerateConfig, lines: Sequence[PromptLine]) -> list[Job]:
    """All pictures that a config asks for, in order.

    Raises:
        ValueError: where what a line says breaks a rule.
    """
    jobs = []
    for line in lines:
        changed = _changed(config, line)
        first = config.machine.seed if line.seed is None else line.seed
        jobs += [Job(changed, line.prompt, (first + i) % 2**32) for i in range(config.picture.num_images_per_prompt)]
    return jobs


def _changed(config: GenerateConfig, line: PromptLine) -> GenerateConfig:
    """The config with what a line says of its picture."""
    names = {"steps": "num_inference_steps"}
    fields = ("negative_prompt", "prompt_2", "width", "height", "steps", "guidance_scale", "image", "strength")
    said = {names.get(name, name): getattr(line, name) for name in fields if getattr(line, name) is not None}
    changed = dataclasses.replace(config, picture=dataclasses.replace(config.picture, **said))
    try:
        changed.check()
    except ValueError as error:
        raise ValueError(f"{config.picture.prompts_file}, line {line.line}: {error}") from error
    return changed


def batches_of(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs that follow each other and differ in prompt and seed alone, at most `size` at once."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (len(batch) == size or _alike(batch[0]) != _alike(job)):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _alike(job: Job) -> GenerateConfig:
    picture = dataclasses.replace(job.config.picture, prompt="", negative_prompt="", prompt_2="", negative_prompt_2="")
    return dataclasses.replace(job.config, picture=picture)


def draw_pictures(config: GenerateConfig) -> list[Path]:
    """Draw everything that a config asks for; returns the files, all of them whole.

    Raises:
        ValueError: where flags, prompts, pictures or models are wrong; nothing is loaded before what can be checked.
        OSError: where a picture cannot be read or written.
        OutOfMemory: where model or pictures do not fit the devices; pictures before are written.
    """
    lines = lines_of(config)  # once: it may be a pipe
    jobs = jobs_of(config, lines)
    if config.output.grid:
        _check_sheet([(p.height, p.width) for p in (job.config.picture for job in jobs) if p.height and p.width])
    hints = [open_image(where) for where in config.loaded.controlnet_image or ()]
    if len(hints) == 1:
        hints = hints * len(config.loaded.controlnet_model_name_or_path or ())
    images = {where: open_image(where, what="--image") for where in {job.config.picture.image for job in jobs} if where}
    mask = open_mask(config.picture.mask_image) if config.picture.mask_image else None
    began = time.perf_counter()
    pipeline = Pipeline.of(config)
    config = pipeline.config  # with what a few-step model changed
    jobs = jobs_of(config, lines)
    if config.output.grid:
        _check_sheet([size_of(pipeline, job) for job in jobs])
    log.info("loaded in %.1f s", time.perf_counter() - began)
    folder, files, drawn = Path(config.output.images_dir), [], []
    number = next_number(folder)
    for batch in batches_of(jobs, config.output.batch_size or pipeline.drawing.shares):
        asked = batch[0].config
        size = size_of(pipeline, batch[0])
        began = time.perf_counter()
        pictures = pipeline.draw(
            asked, [prompt_of(job.config, job.text) for job in batch], [job.seed for job in batch], size,
            image=images.get(asked.picture.image), mask=mask if asked.picture.image else None, hints=hints,
        )  # fmt: skip
        seconds = (time.perf_counter() - began) / len(batch)
        for job, picture in zip(batch, pictures, strict=True):
            file = picture_file(folder, number, job.seed)
            number += 1
            if hosts.is_first():
                save_png(picture, file, parameters_of(pipeline, job, size), settings_of(job))
            log.info("%s  %.1f s  %s", file, seconds, job.text[:80])
            files.append(file)
            if config.output.grid:
                drawn.append(picture)
    if config.output.grid and hosts.is_first():
        files.append(_sheet(drawn, folder, config))
    return files


def size_of(pipeline: Pipeline, job: Job) -> tuple[int, int]:
    """(height, width) of a picture."""
    return dataclasses.replace(pipeline, config=job.config).size


def settings_of(job: Job) -> dict[str, Any]:
    """The names and values that draw this one picture again, given back with `--config`."""
    picture = dataclasses.replace(job.config.picture, prompt=job.text, prompts_file="", num_images_per_prompt=1)
    machine = dataclasses.replace(job.config.machine, seed=job.seed)
    output = dataclasses.replace(job.config.output, grid=False)
    return flat(dataclasses.replace(job.config, picture=picture, machine=machine, output=output))


def _check_sheet(sizes: Sequence[tuple[int, int]]) -> None:
    if len(set(sizes)) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in dict.fromkeys(sizes))
        raise ValueError(f"--grid: the pictures are of several sizes ({shown}); leave it out, or draw them of one.")


def _sheet(drawn: Sequence[np.ndarray], folder: Path, config: GenerateConfig) -> Path:
    file = grid_file(folder)
    save_png(np.asarray(grid(np.stack(drawn))), file, None, flat(config))
    log.info("%s", file)
    return file


def parameters_of(pipeline: Pipeline, job: Job, size: tuple[int, int]) -> Parameters:
    """How a picture was made, as web UIs know it."""
    config, picture, loaded = job.config, job.config.picture, job.config.loaded
    scheduler = pipeline.models.scheduler
    algorithm = scheduler.algorithm_type if scheduler.name == "DPMSolverMultistepScheduler" else "dpmsolver++"
    refiner = picture.refiner_model_name_or_path
    return Parameters(
        prompt=job.text,
        negative_prompt=picture.negative_prompt if picture.do_classifier_free_guidance else "",
        steps=picture.num_inference_steps,
        sampler=scheduler.name,
        algorithm_type="" if algorithm == "dpmsolver++" else algorithm,
        schedule_type=schedule_type(scheduler.schedule.timestep_spacing, use_karras_sigmas=scheduler.use_karras_sigmas),
        guidance_scale=pipeline.manner(config).guidance_scale,
        guidance_rescale=picture.guidance_rescale,
        seed=job.seed,
        width=size[1],
        height=size[0],
        prompt_2=picture.prompt_2,
        model=_name(config.model.pretrained_model_name_or_path),
        vae=_name(config.model.vae_checkpoint),
        loras=tuple((str(name), float(scale)) for name, scale in lora_names(config.lora_config)),
        controlnets=_controlnets(config),
        denoising_strength=strength_of(picture.strength, has_mask=bool(picture.mask_image)) if picture.image else None,
        refiner=_name(refiner),
        refiner_switch_at=1 - picture.refiner_fraction if refiner else None,
        others=_others(config, loaded.lightning_ckpt),
    )


def _controlnets(config: GenerateConfig) -> tuple[ControlNetUse, ...]:
    names, picture = config.loaded.controlnet_model_name_or_path or (), config.picture
    module, n = "canny" if picture.controlnet_canny else "none", len(names)
    scales = each(config.loaded.controlnet_conditioning_scale, 0.5, n)
    starts, ends = each(picture.control_guidance_start, 0.0, n), each(picture.control_guidance_end, 1.0, n)
    return tuple(
        ControlNetUse(_name(name), module, *numbers) for name, *numbers in zip(names, scales, starts, ends, strict=True)
    )


def _others(config: GenerateConfig, lightning: str) -> tuple[tuple[str, str], ...]:
    said = {"UNet": _name(config.model.unet_checkpoint), "Lightning": lightning}
    return tuple((key, value) for key, value in said.items() if value)


def _name(path: str) -> str:
    """A model's name without folder and suffix."""
    return Path(path).name.removesuffix(".safetensors") if path else ""
