"""Few-step models (SDXL Lightning, Hyper-SD): how they want to be drawn with, by the names of their files."""

import dataclasses
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_eqx.config import GenerateConfig

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class FewSteps:
    """How a few-step model is drawn with."""

    steps: int
    scheduler: dict[str, Any]
    """Keys of diffusers' `scheduler_config.json`."""
    timesteps: tuple[int, ...] = ()


def few_steps(file: str) -> FewSteps | None:
    """What the authors of a file say of it (the model cards of ByteDance/SDXL-Lightning and ByteDance/Hyper-SD); None
    for a file that names no number of steps."""
    name = Path(file).name.lower()
    match = re.search(r"(\d+)-?steps?", name)
    if match is None:
        return None
    steps = int(match[1])
    if "hyper" in name:
        # Of one step they are drawn at 800, where the last of the picture's layout is decided.
        if steps == 1:
            return FewSteps(1, {"_class_name": "LCMScheduler"}, (800,))
        return FewSteps(steps, {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"})
    scheduler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    if steps == 1 and "x0" in name:
        scheduler["prediction_type"] = "sample"
    return FewSteps(steps, scheduler)


def as_asked(config: GenerateConfig, few: FewSteps) -> GenerateConfig:
    """The config with the steps that a few-step model was made for and without guidance, where it says nothing else."""
    picture, default = config.picture, GenerateConfig().picture
    changes: dict[str, Any] = {}
    if picture.num_inference_steps == default.num_inference_steps:
        changes["num_inference_steps"] = few.steps
    if picture.guidance_scale == default.guidance_scale:
        changes["do_classifier_free_guidance"] = False
    picture = dataclasses.replace(picture, **changes)
    guided = "with" if picture.do_classifier_free_guidance else "without"
    log.info("%s: %d steps %s guidance", config.loaded.lightning_ckpt, picture.num_inference_steps, guided)
    return dataclasses.replace(config, picture=picture)
