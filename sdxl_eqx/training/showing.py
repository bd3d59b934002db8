"""Pictures of a run: grids of samples, and how often a caption's picture is the nearest one."""

import logging
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32
from PIL import Image

from sdxl_eqx.config import SampleConfig
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.control import read_control
from sdxl_eqx.data.pictures import picture_size, read_picture
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.transforms import draw_crop, resize_and_crop
from sdxl_eqx.parallel.specs import put
from sdxl_eqx.sampling.conditioning import Prompt
from sdxl_eqx.sampling.drawing import Drawing
from sdxl_eqx.sampling.pipeline import Hint, Manner, Models, generate
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.setup import Run
from sdxl_eqx.weights.adapters import PEFT

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
    net, maps = model.controlnet, np.zeros((0, resolution, resolution, 3), np.float32)
    if net is not None and not isinstance(run.source, LatentRecords):
        maps = first_maps(run.source, min(len(captions), len(run.source)), resolution)
    batches = []
    for at in range(0, len(captions), size):
        # The last batch is filled up, so that one program serves all.
        chosen = [captions[min(i, len(captions) - 1)] for i in range(at, at + size)]
        prompts = [Prompt(caption, sample.negative_prompt or None) for caption in chosen]
        seeds, sides = range(at, at + size), (resolution, resolution)
        hints = () if net is None else (Hint(net, maps[[i % len(maps) for i in seeds]], scale=1.0),)
        batches.append(generate(models, prompts, seeds, sides, manner, drawing, hints=hints))
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


def first_maps(source: Source, n: int, resolution: int) -> Float32[np.ndarray, "n H W 3"]:
    """What a ControlNet sees of the middle crops of the first n samples, in [0, 1]; black of one that is bad."""
    target, maps = (resolution, resolution), np.zeros((n, resolution, resolution, 3), np.float32)
    for i in range(n):
        try:
            data = source.picture(i)
            size = picture_size(lambda limit, data=data: data if limit < 0 else data[:limit], source.name(i))
            top_left = draw_crop(size, target, center_crop=True, rng=np.random.default_rng(0))
            maps[i] = read_control(source, i, size, target, top_left, flip=False) / np.float32(255)
        except BadSample as error:
            log.warning("%s", error)
    return maps


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
    what, load, with_it = _results(run, f"{place}/export")
    return (
        f"\ndone: {place}\n  samples/     pictures drawn while training\n"
        f"  checkpoints/ to resume{' or load with load_unet' if run.config.trains == 'unet' else ''}\n"
        f"  export/      {what} in {dtype}\n  tensorboard/ tensorboard --logdir {place}/tensorboard\n"
        f"Load it: {load}\n"
        f"Draw with it: python scripts/generate.py --pretrained-model-name-or-path {with_it} --prompt ...\n"
        f"Train on, with more --max-train-steps:\n{again}"
    )


def _results(run: Run, export: str) -> tuple[str, str, str]:
    """(what the export is, how diffusers loads it, what scripts/generate.py is given to draw with it)."""
    model = shlex.quote(run.config.model.pretrained_model_name_or_path)
    place, dtype = shlex.quote(export), f"torch_dtype=torch.{run.config.checkpoint.export_dtype}"
    if run.config.trains == "lora":
        what = "LoRA for diffusers, and for kohya, ComfyUI and A1111"
        options = f"--lora-config.lora-model-name-or-path {place} --lora-config.weight-name {PEFT}"
        return what, f"pipeline.load_lora_weights({export!r}, weight_name={PEFT!r})", f"{model} {options}"
    if run.config.trains == "controlnet":
        options = f"--controlnet-model-name-or-path {place} --controlnet-image FILE"
        return "diffusers ControlNet", f"ControlNetModel.from_pretrained({export!r}, {dtype})", f"{model} {options}"
    load = f"StableDiffusionXLPipeline.from_pretrained({export!r}, {dtype})"
    return "diffusers folder", load, shlex.quote(run.folder.place)
