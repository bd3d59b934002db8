"""What a run shows and leaves: samples, caption retrieval and the export."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.parallel import hosts
from sdxl_eqx.sampling.grid import grid
from sdxl_eqx.training.errors import RunError
from sdxl_eqx.training.exporting import export
from sdxl_eqx.training.metrics import MetricsWriter
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.showing import (
    caption_retrieval,
    draw_captions,
    first_captions,
    sample_prompts,
    save_pictures,
)
from sdxl_eqx.training.state import TrainState
from sdxl_eqx.training.stop import Stop

log = logging.getLogger("sdxl_eqx")


def show(run: Run, n: int, state: TrainState, writer: MetricsWriter) -> None:
    """Draw a grid of samples; with an average, one of its and one of the raw weights."""
    sample = run.config.sample
    if sample.samples_per_grid == 0:
        return
    prompts = sample_prompts(sample, run.source, sample.samples_per_grid)
    raw = () if state.ema is None else (("_raw", state.trained),)
    for ending, trained in (("", state.best), *raw):
        pictures = _drawn(run, trained, prompts)
        if pictures is None or not hosts.is_first():
            continue
        sheet = grid(pictures)
        file = run.folder.samples / f"step_{n:06d}{ending}.png"
        with _without("samples"):
            file.parent.mkdir(exist_ok=True)
            sheet.save(file)
            log.info("step %d: samples in %s", n, file)
        writer.picture(f"samples{ending}", np.asarray(sheet), n)


@contextmanager
def _without(what: str) -> Iterator[None]:
    """What training can do without: a full disk is said, and costs nothing else."""
    try:
        yield
    except OSError as error:
        log.error("no %s: %s", what, error)


def _drawn(run: Run, trained: Networks, prompts: Sequence[str]) -> np.ndarray | None:
    """Pictures of prompts; None, said loudly, where the weights no longer give any."""
    try:
        return draw_captions(run, trained, prompts)
    except ValueError as error:
        log.error("no samples: %s", error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        log.error("no samples: out of memory; lower --per-device-batch-size or --resolution.")
    return None


def finish(run: Run, step: int, state: TrainState, writer: MetricsWriter, stop: Stop) -> float | None:
    """The last samples, caption retrieval, which it returns, and the export; a signal ends it between two of them.

    Raises:
        RunError: where the export could not be written.
    """
    show(run, step, state, writer)
    retrieval = None if stop.now() else _retrieve(run, step, state, writer)
    if stop.now():
        return retrieval
    try:
        export(run, step, state.best)
    except (ValueError, OSError) as error:
        remedy = "free space and run the same again" if isinstance(error, OSError) else "then run the same again"
        raise RunError(f"the export could not be written ({error}); {remedy}.") from error
    return retrieval


def _retrieve(run: Run, step: int, state: TrainState, writer: MetricsWriter) -> float | None:
    """Caption retrieval, its pictures and its record."""
    source, n = run.source, min(run.config.sample.caption_retrieval, len(run.source))
    if isinstance(source, LatentRecords) or n == 0:  # of latents there are no captions
        return None
    pictures = _drawn(run, state.best, first_captions(source, n))
    if pictures is None:
        return None
    if hosts.is_first():
        with _without("pictures of caption retrieval"):
            save_pictures(pictures, run.folder.evaluation)
    retrieval = caption_retrieval(pictures, source, run.config.data.resolution)
    writer.write(step, {"eval/caption_retrieval": retrieval})
    log.info(
        "caption retrieval %.4f: of %d captions drawn, %d are nearest to their own picture (%s)",
        retrieval, n, round(retrieval * n), run.folder.evaluation,
    )  # fmt: skip
    return retrieval
