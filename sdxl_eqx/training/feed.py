"""The stream of batches of a run, from pictures or from what the encoders made of them once."""

import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdxl_eqx.data.cache import CachedSource, cache_key, cached_reader, open_cache, write_cache
from sdxl_eqx.data.loader import BadItems, make_stream, picture_reader
from sdxl_eqx.loading import fingerprint
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.training.setup import Run

log = logging.getLogger("sdxl_eqx")


def feed(run: Run) -> tuple[Any, Encoders | None]:
    """(stream of batches at the run's position, frozen encoders or None where the batches are encoded already).

    Raises:
        ValueError: where too many pictures cannot be read, or the cache is damaged.
    """
    config = run.config
    bad = BadItems(len(run.source), config.data.max_bad_fraction)
    common = {
        "batch_size": run.batch_size // jax.process_count(),
        "seed": config.run.seed,
        "shuffle": config.data.enable_data_shuffling,
        "num_threads": config.data.transform_images_num_proc,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "bad": bad,
    }
    frozen = None
    if config.data.cache_latents_text_encoder_outputs:
        cached = _cache(run, bad)
        read = cached_reader(config.data.caption_dropout, config.data.random_flip, cached.empty)
        stream = make_stream(cached, read, **common)
        # The encoders wait in host memory until there are pictures to draw.
        run.encoders = jax.device_get(run.encoders)
    else:
        stream = make_stream(run.source, picture_reader(config.data, run.parts.tokenizers), **common)
        frozen = run.encoders
    if run.data_position:
        stream.set_state(run.data_position)
    return stream, frozen


def _cache(run: Run, bad: BadItems) -> CachedSource:
    """The encoded data set: the one that is there, or a new one."""
    config = run.config
    folder = Path(config.data.dataset_save_location or run.folder.path / "cache")
    key = cache_key(run.source, fingerprint(run.encoders, run.parts), config.data, config.run.seed)
    cached = open_cache(folder, key)
    if cached is None:
        encoders = run.encoders
        pictures = jax.jit(lambda e, x: e.vae.encode(x.astype(jnp.float32) / 127.5 - 1))
        captions = jax.jit(lambda e, ids, ids_2: e.encode_text(ids, ids_2))
        began = time.perf_counter()

        def encode_pictures(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            moments = pictures(encoders, pixels)
            return np.asarray(moments.mean), np.asarray(moments.logvar)

        def encode_captions(ids: np.ndarray, ids_2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            context, pooled = captions(encoders, ids, ids_2)
            return np.asarray(context), np.asarray(pooled)

        cached = write_cache(
            run.source, folder, key=key, encode_pictures=encode_pictures, encode_captions=encode_captions,
            tokenizers=run.parts.tokenizers, config=config.data, seed=config.run.seed,
            batch_size=min(8, len(run.source)), bad=bad,
        )  # fmt: skip
        log.info("encoded %d samples once in %.1f s: %s", len(cached), time.perf_counter() - began, cached.path)
    return cached
