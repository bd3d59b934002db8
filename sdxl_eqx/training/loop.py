"""The loop: from a prepared run to trained weights, pictures and an export."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sdxl_eqx.config import to_yaml
from sdxl_eqx.data.batch import AnyBatch, Batch
from sdxl_eqx.data.pictures import Size
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.tokenizer import save_tokenizers
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.models.sdxl import SDXL, cast
from sdxl_eqx.parallel import hosts
from sdxl_eqx.training.checkpoint import NotSaved
from sdxl_eqx.training.feed import Batches, Feed, feed
from sdxl_eqx.training.flops import unet_training_flops
from sdxl_eqx.training.metrics import MetricsWriter, Watch
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.shapes import StepsByShape
from sdxl_eqx.training.showing import (
    caption_retrieval,
    draw_captions,
    first_captions,
    grid,
    sample_prompts,
    save_pictures,
)
from sdxl_eqx.training.state import TrainState
from sdxl_eqx.training.stop import Stop
from sdxl_eqx.weights.folder import write_folder
from sdxl_eqx.weights.index import index_of
from sdxl_eqx.weights.write import model_of

log = logging.getLogger("sdxl_eqx")

T = TypeVar("T")


class RunError(Exception):
    """The run cannot go on; the message says why, what is safe and what to do."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    signal: int = 0
    """That stopped it, or 0 where it is finished."""
    retrieval: float | None = None


def fit(run: Run) -> Outcome:
    """Train to the last step, or until Ctrl-C or SIGTERM, which save first.

    Raises:
        RunError: with the reason and the last good checkpoint.
    """
    metrics, step = run.config.metrics, int(run.state.step)
    open_writer = partial(
        MetricsWriter, metrics if hosts.is_first() else dataclasses.replace(metrics, write_metrics=False),
        file=run.folder.metrics, tensorboard=run.folder.tensorboard, run_name=run.config.run.run_name, start=step,
        finished=run.folder.finished_step == step,
    )  # fmt: skip
    try:
        data = hosts.together(partial(feed, run))
        writer = hosts.together(open_writer)
    except (ValueError, OSError) as error:
        raise RunError(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        raise _explain(error, run, doing="encoding pictures") from error
    try:
        return _train(run, data, writer)
    except jax.errors.JaxRuntimeError as error:
        raise _explain(error, run) from error
    finally:
        writer.close()


def _train(run: Run, data: Feed, writer: MetricsWriter) -> Outcome:
    """The steps that are left, and what follows the last one."""
    config = run.config
    start = int(run.state.step)
    schedule = Schedule(run.parts.schedule)
    writer.text("config", f"```\n{to_yaml(run.config)}\n```")
    watch = Watch(start=start, total=run.total_steps, log_period=config.metrics.log_period, is_shown=hosts.is_first())
    state = run.state
    batches = Batches(data, is_one=config.data.reuse_example_batch)
    meter = _Meter(run, writer, watch, data)

    with Stop() as stop, jax.sharding.set_mesh(run.mesh), _step(run, data) as step_fn:
        with watch:
            for n in range(start + 1, run.total_steps + 1):
                waited = -batches.waited
                batch = _explained(batches.next, run)
                waited += batches.waited
                shape = _pixels(batch, run)
                state, metrics = step_fn(shape, state, data.frozen, _to_devices(batch, run), schedule)
                # Read while the device works on this step: the loop never waits for the step it just began.
                meter.flush()
                meter.put(n, metrics, shape, waited)
                if stop.now(n):
                    break
                # Samples first: a run that is killed between the two draws them again.
                if _due(n, config.sample.sample_every, run.batch_size) and n < run.total_steps:
                    meter.flush()
                    _show(run, n, state, writer)
                    meter.restart()
                if _due(n, config.checkpoint.checkpoint_every, run.batch_size):
                    _explained(batches.raise_failure, run)
                    meter.flush()
                    _save(run, n, state, batches.next_index)
                    meter.restart()
            meter.flush()
        _explained(batches.raise_failure, run)
        step = int(state.step)
        if not (_save(run, step, state, batches.next_index) and _written(run)):
            raise RunError(f"the checkpoint of step {step}, where the run stopped, could not be saved.")
        retrieval = None if stop.now() else _finish(run, step, state, writer, stop)
    return Outcome(step, stop.signal, retrieval)


@contextmanager
def _step(run: Run, data: Feed) -> Iterator[Callable[..., Any]]:
    """The compiled step on (height and width of its pictures, state, encoders or None, batch, schedule)."""
    jitted = run.program.jit(run.optimizer)
    if len(data.buckets.shapes) == 1:
        yield lambda shape, *args: jitted(*args)
        return
    with StepsByShape(jitted, partial(run.program.arguments, run.optimizer), data.buckets.shapes, run.mesh) as steps:
        yield steps


def _pixels(batch: AnyBatch, run: Run) -> Size:
    """(height, width) of a batch's pictures."""
    if isinstance(batch, Batch):
        return batch.pixels.shape[1], batch.pixels.shape[2]
    _, h, w, _ = batch.mean.shape
    return h * run.parts.vae.downscale, w * run.parts.vae.downscale


def _to_devices(batch: AnyBatch, run: Run) -> AnyBatch:
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(run.program.batch_sharding, x), batch)


def _explained(get: Callable[[], T], run: Run) -> T:
    """`get()`, or what is wrong with the data and the last good checkpoint."""
    try:
        return get()
    except ValueError as error:
        raise RunError(f"{error} {_last_good(run)}") from error


def _due(n: int, every: int, batch_size: int) -> bool:
    """Whether step n is the first at or past a multiple of `every` samples."""
    return every > 0 and n * batch_size // every > (n - 1) * batch_size // every


def _save(run: Run, n: int, state: TrainState, next_batch: int) -> bool:
    """Whether a checkpoint of step n is being written; a full disk costs that one alone, and is said loudly."""
    try:
        run.checkpoints.save(n, state, run.saved(next_batch))
    except (NotSaved, OSError) as error:
        log.error("%s", error)
        return False
    return True


def _written(run: Run) -> bool:
    """Whether what was begun to be saved is whole."""
    try:
        run.checkpoints.wait()
    except NotSaved as error:
        log.error("%s", error)
        return False
    return True


def _last_good(run: Run) -> str:
    try:
        run.checkpoints.wait_here()  # what is said of an error may be said by one process alone
    except NotSaved as error:
        log.error("%s", error)
    step = run.checkpoints.latest()
    return "No checkpoint was written." if step is None else f"The last good checkpoint is that of step {step}."


def _explain(error: Exception, run: Run, *, doing: str = "training") -> Exception:
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
        return error
    batch, remat = run.config.optim.per_device_batch_size, run.program.compute.remat
    what = (
        f"--per-device-batch-size {batch:g} with --remat-policy {remat} does not fit. Halve the batch, use "
        "--remat-policy full, or share the weights with --ici-fsdp-parallelism."
        if doing == "training"
        else f"{doing} of --resolution {run.config.data.resolution} does not fit beside the state; share the weights "
        "with --ici-fsdp-parallelism, take smaller --moments-dtype bfloat16, or a lower resolution."
    )
    return RunError(f"out of memory: {what} {_last_good(run)} ({str(error).splitlines()[0][:200]})")


def _show(run: Run, n: int, state: TrainState, writer: MetricsWriter) -> None:
    """Draw a grid of samples."""
    sample = run.config.sample
    if sample.samples_per_grid == 0:
        return
    prompts = sample_prompts(sample, run.source, sample.samples_per_grid)
    pictures = _drawn(run, state, prompts)
    if pictures is None:
        return
    if not hosts.is_first():
        return
    sheet = grid(pictures)
    file = run.folder.samples / f"step_{n:06d}.png"
    with _without("samples"):
        file.parent.mkdir(exist_ok=True)
        sheet.save(file)
        log.info("step %d: samples in %s", n, file)
    writer.picture("samples", np.asarray(sheet), n)


@contextmanager
def _without(what: str) -> Iterator[None]:
    """What training can do without: a full disk is said, and costs nothing else."""
    try:
        yield
    except OSError as error:
        log.error("no %s: %s", what, error)


def _drawn(run: Run, state: TrainState, prompts: Sequence[str]) -> np.ndarray | None:
    """Pictures of prompts; None, said loudly, where the weights no longer give any."""
    try:
        return draw_captions(run, state.best, prompts)
    except ValueError as error:
        log.error("no samples: %s", error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        log.error("no samples: out of memory; lower --per-device-batch-size or --resolution.")
    return None


def _finish(run: Run, step: int, state: TrainState, writer: MetricsWriter, stop: Stop) -> float | None:
    """The last samples, caption retrieval and the export; a signal ends it between two of them."""
    _show(run, step, state, writer)
    retrieval = None if stop.now() else _retrieve(run, step, state, writer)
    if stop.now():
        return retrieval
    dtype = jnp.dtype(run.config.checkpoint.export_dtype)
    whole = SDXL(state.best, run.encoders)
    if jax.process_count() > 1:  # alone, each tensor is fetched as it is written
        whole = hosts.to_host(cast(whole, dtype))
    try:
        hosts.together(partial(_export, run, step, whole, dtype))
    except (ValueError, OSError) as error:
        raise RunError(f"the export could not be written ({error}); free space and run the same again.") from error
    return retrieval


def _export(run: Run, step: int, whole: SDXL, dtype: Any) -> None:
    """Write the diffusers folder, by the first process, and note that the run is finished."""
    if not hosts.is_first():
        return
    model = model_of(whole, run.parts.schedule.to_json(), dtype=dtype)
    model = dataclasses.replace(model, index=index_of(caption_dropout=run.config.data.caption_dropout))
    tokenizers = partial(save_tokenizers, run.parts.tokenizers)
    write_folder(model, run.folder.export, save_tokenizers=tokenizers, overwrite=True)
    run.folder.finish(step)


def _retrieve(run: Run, step: int, state: TrainState, writer: MetricsWriter) -> float | None:
    """Caption retrieval, its pictures and its record."""
    source, n = run.source, min(run.config.sample.caption_retrieval, len(run.source))
    if isinstance(source, LatentRecords) or n == 0:  # of latents there are no captions
        return None
    pictures = _drawn(run, state, first_captions(source, n))
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


class _Meter:
    """Turns the arrays of a step into a record, one step late."""

    def __init__(self, run: Run, writer: MetricsWriter, watch: Watch, data: Feed):
        self.run, self.writer, self.watch, self.bad = run, writer, watch, data.bad
        self.pending: tuple[int, Any, Size, float] | None = None
        self.clock = time.perf_counter()
        self.began: float | None = None
        self.first = 0
        self.waited = 0.0
        unet, downscale, each = run.parts.unet, run.parts.vae.downscale, run.batch_size / run.mesh.size / 1e12
        self.tflop = {
            (h, w): unet_training_flops(unet, h // downscale, w // downscale) * each for h, w in data.buckets.shapes
        }

    def put(self, n: int, metrics: Any, shape: Size, waited: float) -> None:
        """Remember the metrics of step n, which may still be running, on pictures of a shape that it waited for."""
        self.pending = (n, metrics, shape, waited)

    def restart(self) -> None:
        """Begin the next step's time now: what was drawn or saved since is no part of it, nor of the speed."""
        now = time.perf_counter()
        if self.began is not None:
            self.began += now - self.clock
        self.clock = now

    def flush(self) -> None:
        """Wait for the remembered step and report it.

        Raises:
            RunError: where it is not finite, so that no checkpoint of it is written over a good one.
        """
        if self.pending is None:
            return
        n, metrics, shape, waited = self.pending
        self.pending = None
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        loss, rate = values.pop("learning/loss"), float(np.asarray(self.run.rate(n - 1)))
        self.writer.write(
            n,
            {
                "learning/loss": loss,
                "learning/current_learning_rate": rate,
                **values,
                "perf/step_time_seconds": seconds,
                "perf/images_per_second": self.run.batch_size / seconds,
                "perf/data_wait_seconds": waited,
                "perf/per_device_tflops": self.tflop[shape],
                "perf/per_device_tflops_per_sec": self.tflop[shape] / seconds,
                "data/bad_samples": self.bad.count,
            },
        )
        norm = values["learning/grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"step {n}: loss {loss}, gradient norm {norm}: not finite. Lower --learning-rate, or add "
                f"--opt-enable-grad-global-norm-clipping. {_last_good(self.run)}"
            )
        # The first step is mostly compiling: speed and time left are those of the steps after it.
        if self.began is None:
            self.began, self.first = now, n
            speed, left, waiting = self.run.batch_size / seconds, 0.0, waited / seconds
        else:
            self.waited += waited
            each = (now - self.began) / (n - self.first)
            speed, left = self.run.batch_size / each, each * (self.run.total_steps - n)
            waiting = self.waited / (now - self.began)
        self.watch.show(n, loss=loss, rate=rate, speed=speed, waiting=waiting, seconds_left=left)
