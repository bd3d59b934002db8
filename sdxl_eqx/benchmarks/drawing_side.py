"""One side of the drawing that is measured, in a process of its own: `python -m ...drawing_side SIDE JSON`.

It draws a first picture, says how long everything took since it began to load, and then draws one for each line it is
given, of a seed. What it says are lines of seconds after `SAID`.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SAID = "sdxl_eqx seconds:"

Draw = Callable[[int], np.ndarray]
"""One picture of a seed, from 0 to 255."""


def ours(asked: dict[str, Any]) -> Draw:
    """This project, begun as scripts/generate.py begins."""
    from sdxl_eqx.config import GenerateConfig
    from sdxl_eqx.flags import merge
    from sdxl_eqx.generation import Pipeline
    from sdxl_eqx.parallel.begin import begin_jax, configure_jax

    values = {
        "pretrained_model_name_or_path": asked["folder"],
        "jax_cache_dir": asked["cache"],
        "activations_dtype": "float32",
        "num_inference_steps": asked["steps"],
        "guidance_scale": asked["guidance_scale"],
        "width": asked["side"],
        "height": asked["side"],
        "skip_jax_distributed_system": True,
        "hardware": "cpu",
    }
    config = merge(GenerateConfig(), values)
    config.check()
    begin_jax(config.machine)
    configure_jax(config.machine, config.model.precision)
    pipeline = Pipeline.of(config)
    return lambda seed: pipeline(asked["prompt"], seeds=seed)[0]


def theirs(asked: dict[str, Any]) -> Draw:
    """diffusers' pipeline, as its documentation has it."""
    import diffusers
    import torch

    lazy: Any = diffusers
    pipe = lazy.StableDiffusionXLPipeline.from_pretrained(
        asked["folder"], torch_dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)

    def draw(seed: int) -> np.ndarray:
        picture = pipe(
            asked["prompt"], num_inference_steps=asked["steps"], guidance_scale=asked["guidance_scale"],
            width=asked["side"], height=asked["side"], generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip
        return np.asarray(picture)

    return draw


SIDES = {"ours": ours, "theirs": theirs}


def main(words: list[str]) -> None:
    """Draw as asked until standard input ends."""
    began = time.perf_counter()
    asked = json.loads(words[1])
    draw = SIDES[words[0]](asked)
    _say(began, draw(0), asked)
    for line in sys.stdin:
        began = time.perf_counter()
        _say(began, draw(int(line)), asked)


def _say(began: float, picture: np.ndarray, asked: dict[str, Any]) -> None:
    """How long a picture took.

    Raises:
        ValueError: where it is none: of another size, or of one colour.
    """
    seconds = time.perf_counter() - began
    if picture.shape != (asked["side"], asked["side"], 3) or picture.std() < 1:
        raise ValueError(f"drew {picture.shape} of deviation {picture.std():.2f}, which is no picture of that size.")
    sys.stdout.write(f"{SAID} {seconds}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
