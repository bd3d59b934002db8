"""The stream of batches of a run, from pictures or from what the encoders made of them once."""

import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sdxl_eqx.data.bad import BadItems
from sdxl_eqx.data.batch import AnyBatch, to_batch
from sdxl_eqx.data.buckets import Buckets, one_bucket
from sdxl_eqx.data.cache import latent_reader
from sdxl_eqx.data.loader import Read, make_stream, picture_reader, position, weighted
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.mesh import own_rows
from sdxl_eqx.training.encoding import Encoding
from sdxl_eqx.training.looking import look_at
from sdxl_eqx.training.setup import Run

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class Feed:
    """What the loop trains on."""

    stream: Any
    """Arrays of this process's rows of each batch, from the run's position on."""
    buckets: Buckets
    """The shapes of batches, of which what is held out takes none."""
    read: Read
    """Reads any sample into this process's memory."""
    held: Int[np.ndarray, " n"]
    """The shape of each sample that is held out; -1 of the others."""
    bad: BadItems
    position: int
    """The number of the next batch."""


def feed(run: Run) -> Feed:
    """Open the data at the run's position, encoding what is not cached yet.

    Raises:
        ValueError: where too many samples cannot be used, or the cache is damaged.
        OSError: where the cache cannot be written.
    """
    data = run.config.data
    bad = BadItems(len(run.source), data.max_bad_fraction)
    everything, read = _readers(run, bad)
    if run.inputs.weights is not None:
        read = weighted(read, run.inputs.weights)
    held = np.full_like(everything.of, -1)
    held[run.inputs.held] = everything.of[run.inputs.held]
    buckets = Buckets(everything.shapes, np.where(held < 0, everything.of, -1).astype(held.dtype))
    order = Order(buckets.of, batch_size=run.batch_size, seed=run.config.run.seed, shuffle=data.enable_data_shuffling)
    rows = own_rows(run.program.batch_sharding, run.batch_size)
    threads = data.transform_images_num_proc
    stream = make_stream(order, read, seed=run.config.run.seed, num_threads=threads, rows=rows, bad=bad)
    start = next_batch(run)
    if start:
        stream.set_state(position(start, len(rows)))
    return Feed(stream, buckets, read, held, bad, start)


def next_batch(run: Run) -> int:
    """Where a run goes on in its order of batches; with another batch size, where as many samples were given."""
    was = run.data_position
    if was.get("batch_size", run.batch_size) == run.batch_size:
        return int(was.get("next_batch", run.state.step))
    samples = was["next_batch"] * was["batch_size"]
    log.info("saved with %d samples a step, now %d: the data go on after %d samples",
             was["batch_size"], run.batch_size, samples)  # fmt: skip
    return samples // run.batch_size


def _readers(run: Run, bad: BadItems) -> tuple[Buckets, Read]:
    """The shapes of batches, and what reads a sample."""
    config, source, data = run.config, run.source, run.config.data
    encoding = Encoding(config, run.layout, run.program.encoding, run.parts, run.encoders)
    if isinstance(source, LatentRecords):
        buckets = one_bucket(np.ones(len(source), bool), source.resolution)
        empty = encoding.empty() if data.caption_dropout > 0 else None
        run.encoders = hosts.to_host(run.encoders)
        return buckets, latent_reader(source, data, empty)
    is_cached = data.cache_latents_text_encoder_outputs
    if not is_cached and not data.aspect_ratio_buckets:
        buckets = one_bucket(np.ones(len(source), bool), data.resolution)
        return buckets, _picture_reader(run, source, buckets)
    looked, buckets = look_at(source, run.parts, data, bad, batch_size=run.batch_size)
    if not is_cached:
        return buckets, _picture_reader(run, source, buckets)
    folder = Path(data.dataset_save_location or run.folder.path / "cache")
    on_host = hosts.to_host(run.encoders)
    cached = encoding.cached(source, folder, looked, buckets, bad, on_host=on_host)
    if run.program.is_encoded:
        run.encoders = on_host  # they wait in host memory until there are pictures to draw
    buckets = Buckets(buckets.shapes, np.where(cached.usable, buckets.of, -1).astype(buckets.of.dtype))
    with_control = config.controlnet.train_controlnet
    return buckets, cached.reader(source, run.parts.tokenizers, with_control=with_control)


def _picture_reader(run: Run, source: Source, buckets: Buckets) -> Read:
    def target(sample: int) -> tuple[int, int]:
        return buckets.shapes[buckets.of[sample]]

    with_control = run.config.controlnet.train_controlnet
    return picture_reader(source, run.parts.tokenizers, run.config.data, target, with_control=with_control)


class Batches:
    """The batches of a run, on the host.

    Of several processes, one that has no more goes on with its last batch and has all of them stop, as by SIGTERM: in
    the middle of a step the others would wait for it for ever. Nothing is saved of those steps.
    """

    def __init__(self, stream: Any, position: int, *, is_one: bool = False):
        """`stream` gives the batch of number `position` next; `is_one`: that one again and again."""
        self.stream = stream
        self.next_index = position
        self.is_one = is_one
        self.last: AnyBatch | None = None
        self.failure: Exception | None = None
        self.waited = 0.0
        """Seconds that `next` took in all."""

    def next(self) -> AnyBatch:
        """The next one.

        Raises:
            ValueError: where too many samples cannot be used.
        """
        began = time.perf_counter()
        if self.last is None:
            self.last = hosts.together(self._read)
        elif self.failure is None and not self.is_one:
            try:
                self.last = self._read()
            except (ValueError, OSError) as error:
                if hosts.count() == 1:
                    raise
                self.failure = error
                os.kill(os.getpid(), signal.SIGTERM)
        self.next_index += 1
        self.waited += time.perf_counter() - began
        return self.last

    def raise_failure(self) -> None:
        """Raise what went wrong in any process.

        Raises:
            ValueError: where something did.
        """
        hosts.raise_together(self.failure)

    def _read(self) -> AnyBatch:
        return to_batch(next(self.stream))
