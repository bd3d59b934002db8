"""The loop: from a prepared run to trained weights, pictures and an export."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from sdxl_eqx.config import flat, to_yaml
from sdxl_eqx.data.batch import AnyBatch, Batch
from sdxl_eqx.data.pictures import Size
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.parallel import hosts
from sdxl_eqx.training.checkpoint import NotSaved
from sdxl_eqx.training.errors import RunError, explain, explained
from sdxl_eqx.training.feed import Batches, Feed, feed
from sdxl_eqx.training.finishing import finish, show
from sdxl_eqx.training.meter import Meter
from sdxl_eqx.training.metrics import MetricsWriter, Watch
from sdxl_eqx.training.profiling import Profiler
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.shapes import StepsByShape
from sdxl_eqx.training.state import TrainState
from sdxl_eqx.training.stop import Stop
from sdxl_eqx.training.timings import Timings
from sdxl_eqx.training.trackers import open_tracker
from sdxl_eqx.training.validation import Validation

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    signal: int = 0
    """That stopped it, or 0 where it is finished."""
    retrieval: float | None = None


def fit(run: Run, timings: Timings | None = None) -> Outcome:
    """Train to the last step, or until Ctrl-C or SIGTERM, which save first; `timings` are those of the start-up.

    Raises:
        RunError: with the reason and the last good checkpoint.
    """
    timings = timings or Timings()
    try:
        with timings.of("load_data"):
            data = hosts.together(partial(feed, run))
        writer = hosts.together(partial(_open_writer, run))
    except (ValueError, OSError) as error:
        raise RunError(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        raise explain(error, run, doing="encoding pictures") from error
    if run.frozen.encoders is not None:
        run.encoders = run.frozen.encoders  # without those that train: they are the state's now
    try:
        return _train(run, data, writer, timings)
    except jax.errors.JaxRuntimeError as error:
        raise explain(error, run) from error
    finally:
        writer.close()


def _open_writer(run: Run) -> MetricsWriter:
    """What the run's metrics are written by; the first process writes for all."""
    metrics, step, folder = run.config.metrics, int(run.state.step), run.folder
    tracker = None
    if hosts.is_first():
        place = folder.place if "://" in folder.place else str(folder.path.absolute())
        name = run.config.run.run_name
        tracker = open_tracker(metrics, folder=folder.path, run_name=name, place=place, flags=flat(run.config))
    else:
        metrics = dataclasses.replace(metrics, write_metrics=False)
    return MetricsWriter(
        metrics, file=folder.metrics, tensorboard=folder.tensorboard, run_name=run.config.run.run_name, start=step,
        finished=folder.finished_step == step, tracker=tracker, upload=folder.upload,
        periods=folder.periods if metrics.gcs_metrics and folder.mirror is not None else None,
    )  # fmt: skip


def _train(run: Run, data: Feed, writer: MetricsWriter, timings: Timings) -> Outcome:
    """The steps that are left, and what follows the last one."""
    config = run.config
    start = int(run.state.step)
    schedule = Schedule(run.parts.schedule)
    writer.text("config", f"```\n{to_yaml(run.config)}\n```")
    watch = Watch(start=start, total=run.total_steps, log_period=config.metrics.log_period, is_shown=hosts.is_first())
    state = run.state
    batches = Batches(data.stream, data.position, is_one=config.data.reuse_example_batch)
    meter = Meter(run, writer, watch, data, timings)
    validation = Validation(run, data)

    with Stop() as stop, jax.sharding.set_mesh(run.mesh), _step(run, data) as step_fn:
        with watch, _profiler(run, start) as profiler:
            for n in range(start + 1, run.total_steps + 1):
                waited = -batches.waited
                batch = explained(batches.next, run)
                waited += batches.waited
                shape = _pixels(batch, run)
                with profiler.at(n) as keep:
                    state, metrics = step_fn(shape, state, run.frozen, _to_devices(batch, run), schedule)
                    keep(metrics)
                # Read while the device works on this step: the loop never waits for the step it just began.
                meter.flush()
                meter.put(n, metrics, shape, waited)
                if stop.now(n):
                    break
                # Samples first: a run that is killed between the two draws them again.
                if _due(n, config.sample.sample_every, run.batch_size) and n < run.total_steps:
                    meter.flush()
                    show(run, n, state, writer)
                    meter.restart()
                if validation and _due(n, config.sample.eval_every, run.batch_size) and n < run.total_steps:
                    meter.flush()
                    _measure(run, n, state, validation, writer)
                    meter.restart()
                if _due(n, config.checkpoint.checkpoint_every, run.batch_size):
                    explained(batches.raise_failure, run)
                    meter.flush()
                    if meter.in_a_row:
                        log.error("step %d was not finite: no checkpoint is written of it", n)
                    else:
                        _send(run, writer)
                        _save(run, n, state, batches.next_index)
                    meter.restart()
            meter.flush()
        explained(batches.raise_failure, run)
        step = int(state.step)
        _send(run, writer)
        if not (_save(run, step, state, batches.next_index) and _written(run)):
            raise RunError(f"the checkpoint of step {step}, where the run stopped, could not be saved.")
        if validation and not stop.now():
            _measure(run, step, state, validation, writer)
        writer.flush()
        retrieval = None if stop.now() else finish(run, step, state, writer, stop)
    return Outcome(step, stop.signal, retrieval)


@contextmanager
def _step(run: Run, data: Feed) -> Iterator[Callable[..., Any]]:
    """The compiled step on (height and width of its pictures, state, what is frozen, batch, schedule)."""
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


def _profiler(run: Run, start: int) -> Profiler:
    """The profiler of the first process, for all."""
    metrics = run.config.metrics
    metrics = metrics if hosts.is_first() else dataclasses.replace(metrics, enable_profiler=False)
    return Profiler(metrics, run.folder.tensorboard, start)


def _send(run: Run, writer: MetricsWriter) -> None:
    """Have the metrics where the run lies, so that they are never behind a checkpoint."""
    writer.flush()
    if hosts.is_first():
        run.folder.send()


def _measure(run: Run, n: int, state: TrainState, validation: Validation, writer: MetricsWriter) -> None:
    """The held-out loss after step n."""
    values = explained(partial(validation.measure, state), run)
    writer.write(n, values)
    shown = f", of the average {values['eval/loss_ema']:.4f}" if "eval/loss_ema" in values else ""
    log.info("step %d: held-out loss %.4f%s", n, values["eval/loss"], shown)


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
