"""The stream of batches of a run, from pictures or from what the encoders made of them once."""

import logging
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdxl_eqx.data.batch import Batch, LatentBatch
from sdxl_eqx.data.cache import (
    CachedSource,
    EncodeCaptions,
    EncodePictures,
    cache_key,
    cached_reader,
    open_cache,
    write_cache,
)
from sdxl_eqx.data.loader import BadItems, make_stream, picture_reader, position_after, to_batch
from sdxl_eqx.loading import fingerprint
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.mesh import batch_sharding, own_rows
from sdxl_eqx.parallel.specs import put
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.step import encode_pixels

log = logging.getLogger("sdxl_eqx")

AT_ONCE = 2 * 1024**2
"""Pixels that a device encodes at once: the VAE's widest float32 arrays take 0.5 GB for a picture of 1024 x 1024, and
without a kernel its attention's scores 1 GB."""


def feed(run: Run) -> tuple[Any, Encoders | None]:
    """(stream of batches at the run's position, frozen encoders or None where the batches are encoded already).

    Raises:
        ValueError: where too many pictures cannot be read, or the cache is damaged.
    """
    config = run.config
    bad = BadItems(len(run.source), config.data.max_bad_fraction)
    common = {
        "batch_size": run.batch_size,
        "rows": own_rows(run.program.batch_sharding, run.batch_size),
        "seed": config.run.seed,
        "shuffle": config.data.enable_data_shuffling,
        "num_threads": config.data.transform_images_num_proc,
        "bad": bad,
    }
    frozen = None
    if config.data.cache_latents_text_encoder_outputs:
        on_host = hosts.to_host(run.encoders)
        cached = _cache(run, fingerprint(on_host, run.parts), bad)
        read = cached_reader(config.data.caption_dropout, config.data.random_flip, cached.empty)
        stream = make_stream(cached, read, **common)
        # The encoders wait in host memory until there are pictures to draw.
        run.encoders = on_host
    else:
        stream = make_stream(run.source, picture_reader(config.data, run.parts.tokenizers), **common)
        frozen = run.encoders
    if run.data_positions:
        _go_on(stream, run, common["rows"])
    return stream, frozen


def positions(state: dict[str, Any], run: Run) -> list[dict[str, Any]]:
    """Of each process, where its stream is in the data, and which rows of a batch it feeds; JSON."""
    return hosts.gather_json({"stream": state, "rows": own_rows(run.program.batch_sharding, run.batch_size)})


def _go_on(stream: Any, run: Run, rows: list[int]) -> None:
    """Put a stream where the run was saved."""
    was = run.data_positions
    mine = was[jax.process_index()] if len(was) == jax.process_count() else None
    # Alone, a process reads all samples in their order, whatever the size of a batch.
    same = mine is not None and "stream" in mine and (len(was) == 1 or mine["rows"] == rows)
    if all(hosts.gather_json(same)) and mine is not None:
        stream.set_state(mine["stream"])
        return
    step = int(run.state.step)
    stream.set_state(position_after(step, len(rows)))
    log.info("saved by %d processes, now %d, which feed other rows: the data go on at batch %d, whatever was skipped "
             "before", len(was), jax.process_count(), step)  # fmt: skip


class Batches:
    """The batches of a run, on the host.

    Of several processes, one that has no more goes on with its last batch and has all of them stop, as by SIGTERM: in
    the middle of a step the others would wait for it for ever. Nothing is saved of those steps.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.last: Batch | LatentBatch | None = None
        self.failure: Exception | None = None

    def next(self) -> Batch | LatentBatch:
        """The next one.

        Raises:
            ValueError: where too many pictures cannot be read.
        """
        if self.last is None:
            self.last = hosts.together(self._read)
        elif self.failure is None:
            try:
                self.last = self._read()
            except (ValueError, OSError) as error:
                if jax.process_count() == 1:
                    raise
                self.failure = error
                os.kill(os.getpid(), signal.SIGTERM)
        return self.last

    def raise_failure(self) -> None:
        """Raise what went wrong in any process.

        Raises:
            ValueError: where something did.
        """
        hosts.raise_together(self.failure)

    def _read(self) -> Batch | LatentBatch:
        return to_batch(next(self.stream))


def _cache(run: Run, model_fingerprint: str, bad: BadItems) -> CachedSource:
    """The encoded data set: the one that is there, or a new one."""
    config = run.config
    folder = Path(config.data.dataset_save_location or run.folder.path / "cache")
    key = cache_key(run.source, model_fingerprint, config.data, config.run.seed)
    hosts.same(key, "pictures, captions or encoders of the key")
    cached = hosts.together(partial(open_cache, folder, key))
    if not all(hosts.gather_json(cached is not None)):
        began = time.perf_counter()
        # Every process has all pictures encoded, on all devices together, and the first one writes.
        encode_pictures, encode_captions, batch_size = _encoders(run)
        write = partial(
            write_cache, run.source, folder, key=key, encode_pictures=encode_pictures, encode_captions=encode_captions,
            tokenizers=run.parts.tokenizers, config=config.data, seed=config.run.seed, batch_size=batch_size, bad=bad,
            is_writer=hosts.is_first(), together=hosts.together,
        )  # fmt: skip
        write()
        seconds = time.perf_counter() - began
        cached = hosts.together(partial(_written_cache, folder, key))
        log.info("encoded %d samples once in %.1f s: %s", len(cached), seconds, cached.path)
    assert cached is not None
    return cached


def _written_cache(folder: Path, key: str) -> CachedSource:
    cached = open_cache(folder, key)
    if cached is None:
        raise ValueError(f"{folder}: the first process wrote the cache there and this one does not see it; share it.")
    return cached


def _encoders(run: Run) -> tuple[EncodePictures, EncodeCaptions, int]:
    """What encodes pictures and captions, and how many at a time: as many as the devices share evenly."""
    each = max(min(8 // run.mesh.size, AT_ONCE // run.config.data.resolution**2), 1)
    batch_size = each * run.mesh.size
    spread = batch_sharding(run.mesh, run.mesh.axis_names, batch_size)
    whole, compute = run.layout.whole, run.program.encoding
    enter = run.layout.enter if run.mesh.size > 1 else lambda tree: tree

    @partial(jax.jit, out_shardings=whole)
    def pictures(encoders: Encoders, pixels: Any) -> Any:
        moments = encode_pixels(encoders.vae, enter(pixels), compute=compute)
        return moments.mean, moments.logvar

    @partial(jax.jit, out_shardings=whole)
    def captions(encoders: Encoders, ids: Any, ids_2: Any) -> Any:
        return encoders.encode_text(*enter((ids, ids_2)), compute=compute)

    def encode_pictures(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, logvar = pictures(run.encoders, put(pixels, spread))
        return np.asarray(mean), np.asarray(logvar)

    def encode_captions(ids: np.ndarray, ids_2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        context, pooled = captions(run.encoders, put(ids, spread), put(ids_2, spread))
        return np.asarray(context), np.asarray(pooled)

    return encode_pictures, encode_captions, batch_size
