"""Pictures of a run: grids of samples, and how often a caption's picture is the nearest one."""

import logging
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from sdxl_eqx.config import SampleConfig
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.pictures import read_picture
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.transforms import draw_crop, resize_and_crop
from sdxl_eqx.parallel.specs import put
from sdxl_eqx.sampling.conditioning import Prompt
from sdxl_eqx.sampling.drawing import Drawing
from sdxl_eqx.sampling.pipeline import Manner, Models, generate
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.setup import Run

log = logging.getLogger("sdxl_eqx")


def draw_captions(run: Run, trained: Networks, captions: Sequence[str]) -> np.ndarray:
    """Pictures `[n, H, W, 3]` of captions, with seeds 0, 1, 2 and on, at most a training batch at a time."""
    sample = run.config.sample
    resolution = run.config.data.resolution
    manner = Manner(
        steps=sample.num_inference_steps,
        guidance_scale=sample.guidance_scale if sample.do_classifier_free_guidance else 1.0,
        guidance_rescale=sample.guidance_rescale,
    )
    drawing = Drawing(
        run.program.dtype, run.program.compute, run.program.encoding, run.layout if run.mesh.size > 1 else None
    )
    model = run.model(trained)
    encoders = jax.tree.map(put, model.encoders, run.layout.shardings(model.encoders))
    tokenize = partial(run.parts.tokenize, chunks=run.config.data.caption_chunks)
    # As the export says it: with dropout the model has learned the encoded empty prompt.
    zeros = run.config.data.caption_dropout == 0
    models = Models(model.unet, encoders, tokenize, Scheduler.from_json(run.parts.scheduler), zeros_for_absent=zeros)
    size = min(-(-len(captions) // drawing.shares) * drawing.shares, run.batch_size)
    batches = []
    for at in range(0, len(captions), size):
        # The last batch is filled up, so that one program serves all.
        chosen = [captions[min(i, len(captions) - 1)] for i in range(at, at + size)]
        prompts = [Prompt(caption, sample.negative_prompt or None) for caption in chosen]
        batches.append(generate(models, prompts, range(at, at + size), (resolution, resolution), manner, drawing))
    return np.concatenate(batches)[: len(captions)]


def sample_prompts(config: SampleConfig, source: Source | LatentRecords, n: int) -> list[str]:
    """The prompts of n samples: the prompt, or the data set's first captions in turn where it is ''."""
    if config.prompt or isinstance(source, LatentRecords):
        return [config.prompt] * n
    captions = first_captions(source, min(n, len(source)))
    return [captions[i % len(captions)] for i in range(n)]


def first_captions(source: Source, n: int) -> list[str]:
    """The first caption of each of the first n samples; '' of one that cannot be used."""
    captions = []
    for i in range(n):
        try:
            captions.append(source.captions(i)[0])
        except BadSample as error:
            log.warning("%s", error)
            captions.append("")
    return captions


def caption_retrieval(pictures: np.ndarray, source: Source, resolution: int) -> float:
    """For what share of the first captions the drawn picture's nearest training picture (L2 on pixels) is their own.

    Training pictures are taken in their middle crop; those that cannot be read are passed over.
    """
    drawn = pictures.astype(np.float32)
    best, nearest = np.full(len(drawn), np.inf), np.full(len(drawn), -1)
    rng = np.random.default_rng(0)
    target = (resolution, resolution)
    for i in range(len(source)):
        try:
            picture = read_picture(source.picture(i), source.name(i), target=target)
        except BadSample:
            continue
        square, _ = resize_and_crop(picture, target, draw_crop(picture.size, target, center_crop=True, rng=rng))
        distance = np.square(drawn - square.astype(np.float32)).sum(axis=(1, 2, 3))
        closer = distance < best
        best[closer], nearest[closer] = distance[closer], i
    return float(np.mean(nearest == np.arange(len(drawn))))


def save_pictures(pictures: np.ndarray, folder: Path) -> None:
    """`00.png`, `01.png` and on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:02d}.png")


def farewell(run: Run, step: int, *, was_stopped: bool) -> str:
    """What a run leaves and how to go on, for the person who ran it."""
    place, dtype = run.folder.place, run.config.checkpoint.export_dtype
    again = f"python scripts/train.py --config {shlex.quote(str(run.folder.config))}"
    if "://" in place:
        root, _, name = place.rpartition("/")
        again = f"python scripts/train.py --base-output-directory {root} --run-name {name} ... (the same flags)"
    if was_stopped:
        return f"saved at step {step}; continue with:\n{again}"
    return (
        f"\ndone: {place}\n  samples/     pictures drawn while training\n"
        "  checkpoints/ to resume or load with load_unet\n"
        f"  export/      diffusers folder in {dtype}\n  tensorboard/ tensorboard --logdir {place}/tensorboard\n"
        f"Load it: StableDiffusionXLPipeline.from_pretrained({place + '/export'!r}, torch_dtype=torch.{dtype})\n"
        f"Draw with it: python scripts/generate.py --pretrained-model-name-or-path {shlex.quote(place)} --prompt ...\n"
        f"Train on, with more --max-train-steps:\n{again}"
    )
