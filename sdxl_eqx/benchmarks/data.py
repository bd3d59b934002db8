"""How fast pictures become batches: one decoder beside another, two threads beside one, a cache on its own."""

import hashlib
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sdxl_eqx.benchmarks.config import DataBenchmark
from sdxl_eqx.benchmarks.decoding import Decode, decoding
from sdxl_eqx.benchmarks.figures import Figure
from sdxl_eqx.benchmarks.jpegs import Jpegs, make_jpegs
from sdxl_eqx.benchmarks.results import check_counts, load_average, publish, results_file
from sdxl_eqx.benchmarks.timing import alternated, cores, milliseconds, pinned
from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.bad import BadItems
from sdxl_eqx.data.buckets import Buckets, one_bucket
from sdxl_eqx.data.cache import PICTURES, TEXT, Cached, Contents
from sdxl_eqx.data.loader import Read, make_stream, picture_reader
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.store import StoreWriter, key_text
from sdxl_eqx.data.survey import Survey
from sdxl_eqx.data.tokenizer import bundled_tokenizers
from sdxl_eqx.parallel import hosts
from sdxl_eqx.training.feed import Batches

log = logging.getLogger("sdxl_eqx")

LIBRARIES = ("Pillow", "simplejpeg", "numpy", "grain", "array_record", "safetensors")
"""Whose versions the figures depend on."""

CACHE_CORES = 2
"""The cores that the cache's figures are of."""


@dataclass(frozen=True)
class Workload:
    """How much is measured. What is asked for holds for the defaults alone."""

    decodes: tuple[Decode, ...] = (Decode(2048, 1024, 5.0), Decode(1024, 1024, 1.0), Decode(3001, 1024))
    """The first is also what the threads do."""
    pictures: int = 3
    picture_batches: int = 4
    """Of so many batches from pictures a round."""
    hashed_bytes: int = 2**22
    """Of each of 16 blocks."""
    batch_size: int = 8
    samples: int = 128
    """Of the cache; it has 0.84 MB for each."""
    latent_side: int = 128
    context: tuple[int, int] = (77, 2048)
    pooled: int = 1280
    cached_batches: int = 40
    """Of so many batches from the cache a round."""
    steps: int = 10
    """Of so many steps in the rounds that see how long a step waits for its batch."""
    step_seconds: float = 0.3


def measure(config: DataBenchmark, work: Workload | None = None) -> list[Figure]:
    """Measure everything, say it, and write it.

    Raises:
        ValueError: a flag is wrong, or a photograph cannot be read.
        OSError: the cache cannot be written to the folder for temporary files.
    """
    work = work or Workload()
    check_counts(rounds=config.rounds)
    file, load = results_file(config.json), load_average()
    log.info("making JPEGs of %s", f"the photographs in {config.photos}" if config.photos else "noise")
    files = make_jpegs(work.pictures, sorted({one.source for one in work.decodes}), config.photos)
    log.info("measuring in %d rounds", config.rounds)
    figures = decoding(files, work.decodes, config.rounds)
    figures.extend(threads(files[work.decodes[0].source], work, config.rounds))
    figures.extend(caching(work, config.rounds))
    return publish(figures, file, libraries=LIBRARIES, load=load, photos=config.photos)


def threads(files: list[bytes], work: Workload, rounds: int) -> list[Figure]:
    """Milliseconds a picture with two threads beside one, through the reader and the loader that training uses.

    Hashing, which waits for nothing, shows how much two threads can gain on these cores as busy as they are.
    """
    decode = work.decodes[0]
    side = decode.target
    read = picture_reader(Jpegs(files), bundled_tokenizers(), DataConfig(resolution=side), lambda sample: (side, side))
    buckets = one_bucket(np.ones(len(files), bool), side)
    blocks = [bytes(work.hashed_bytes)] * 16

    def reading(num_threads: int) -> float:
        with _stream(buckets, read, work, num_threads) as stream:
            next(stream)  # threads have started
            taken = milliseconds(lambda: _take(stream, work.picture_batches))
        return taken / (work.picture_batches * work.batch_size)

    def hashing(num_threads: int) -> float:
        with ThreadPoolExecutor(num_threads) as pool:
            return milliseconds(lambda: list(pool.map(hashlib.sha256, blocks))) / len(blocks)

    pictures = alternated(partial(reading, 2), partial(reading, 1), rounds)
    hashes = alternated(partial(hashing, 2), partial(hashing, 1), rounds)
    note = "means nothing on one core" if cores() == 1 else ""
    name = f"JPEG {decode.source} -> {side}"
    beside = "two threads beside one"
    return [
        Figure(f"{name}, {beside}", "ms", *pictures, least=1.6, note=note),
        Figure(f"SHA-256, {beside}", "ms", *hashes),
    ]


def caching(work: Workload, rounds: int) -> list[Figure]:
    """Samples a second from a cache on two cores, and the share of a step that its batch is waited for."""
    config = DataConfig(resolution=8 * work.latent_side)
    hosts.count()  # JAX starts here, so that none of its own threads is pinned
    rates, shares = [], []
    with tempfile.TemporaryDirectory() as folder, pinned(CACHE_CORES):
        contents = _fill(Path(folder), work, config)
        read = Cached(Path(folder), contents).reader(Jpegs([]), bundled_tokenizers())
        buckets = one_bucket(np.ones(contents.count, bool), config.resolution)
        for _ in range(rounds):
            with _stream(buckets, read, work, config.transform_images_num_proc) as stream:
                next(stream)
                taken = milliseconds(lambda stream=stream: _take(stream, work.cached_batches))
            rates.append(1e3 * work.cached_batches * work.batch_size / taken)
            with _stream(buckets, read, work, config.transform_images_num_proc) as stream:
                shares.append(_waiting(stream, work))
    note = "" if cores() >= CACHE_CORES else "means nothing on one core"
    waits = f"of a step of {1e3 * work.step_seconds:.0f} ms waits for {work.batch_size} of them"
    return [
        Figure("encoded samples from a cache, two cores", "samples/s", tuple(rates), least=300.0, note=note),
        Figure(waits, "%", tuple(shares), below=1.0, note=note),
    ]


def _waiting(stream: Any, work: Workload) -> float:
    """Per cent of a step's time that the loop waits for its batch; of a step that leaves the cores idle, as a sleep."""
    batches = Batches(stream, 0)
    batches.next()
    first = batches.waited
    for _ in range(work.steps):
        time.sleep(work.step_seconds)
        batches.next()
    return 100 * (batches.waited - first) / (work.steps * work.step_seconds)


def _fill(folder: Path, work: Workload, config: DataConfig) -> Contents:
    """A cache of samples of noise, with the shapes and dtypes of SDXL's."""
    names = [f"{i:032x}" for i in range(work.samples)]
    sizes = np.full((work.samples, 2), config.resolution, np.int32)
    seen = Survey(sizes, key_text(names), key_text(names), np.ones(work.samples, np.int32), ())
    shapes = ((config.resolution, config.resolution),)
    contents = Contents.of(seen, shapes, np.zeros(work.samples, int), config, seed=0, vae="noise", text="noise")
    rng = np.random.default_rng(0)
    latents = (work.latent_side, work.latent_side, 4)
    ids = np.array([*sizes[0], 0, 0, *sizes[0]], np.float32)
    with StoreWriter(folder / PICTURES) as writer:
        for key in contents.pictures:
            mean, logvar = (rng.standard_normal(latents, np.float32) for _ in range(2))
            writer.add(bytes(key), {"mean": mean, "logvar": logvar, "time_ids": ids})
    with StoreWriter(folder / TEXT) as writer:
        for key in contents.text:
            context, pooled = (rng.standard_normal(n, np.float32) for n in (work.context, work.pooled))
            text = {"context": context.astype(ml_dtypes.bfloat16), "pooled": pooled.astype(ml_dtypes.bfloat16)}
            writer.add(bytes(key), text)
    return contents


@contextmanager
def _stream(buckets: Buckets, read: Read, work: Workload, num_threads: int) -> Iterator[Any]:
    """Batches of samples of these buckets; at the end its threads are waited for, so that none works into what is
    measured next."""
    before = set(threading.enumerate())
    order = Order(buckets.of, batch_size=work.batch_size, seed=0, shuffle=True)
    stream = make_stream(order, read, seed=0, num_threads=num_threads, bad=BadItems(len(buckets.of), 0.0))
    try:
        yield stream
    finally:
        stream.close()
        for thread in set(threading.enumerate()) - before:
            thread.join()


def _take(stream: Any, count: int) -> None:
    """So many batches, none kept."""
    for _ in islice(stream, count):
        pass
