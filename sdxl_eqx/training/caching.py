"""Encoding a data set without training: what `scripts/cache_dataset.py` does."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax.random as jr

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.data.bad import BadItems
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.begin import configure_jax
from sdxl_eqx.parallel.computing import encoding_compute
from sdxl_eqx.parallel.devices import choose_hardware
from sdxl_eqx.parallel.mesh import describe, make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.class_pictures import draw_class_pictures
from sdxl_eqx.training.encoding import Encoding
from sdxl_eqx.training.inputs import read_data_and_model
from sdxl_eqx.training.looking import look_at

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class CacheSummary:
    """What a cache holds of a data set."""

    folder: Path
    samples: int
    """That are ready to train on."""
    bad: int
    """That cannot be used."""


def cache_dataset(config: TrainConfig) -> CacheSummary:
    """Encode what a training run of this config would encode first, into dataset_save_location.

    Begun again, it goes on where it was interrupted.

    Raises:
        ValueError: where the input is wrong, or too many samples cannot be used.
        OSError: where the cache cannot be written.
    """
    data = config.data
    if not data.dataset_save_location:
        raise ValueError("--dataset-save-location: name the folder of the cache, and give the same to train.py.")
    if not data.cache_latents_text_encoder_outputs:
        raise ValueError("--no-cache-latents-text-encoder-outputs: there is nothing to cache then; leave it out.")
    configure_jax(config.run, config.model.precision)
    layout = Layout(make_mesh(config.parallel, choose_hardware(config.run.hardware)))
    draw_class_pictures(config, read_data_and_model)
    inputs = hosts.together(partial(read_data_and_model, config))
    source, parts = inputs.source, inputs.parts
    if isinstance(source, LatentRecords):
        raise ValueError("--dataset-type tfrecord: is encoded already; train on it as it is.")
    if not data.aspect_ratio_buckets:
        parts.check_resolution(data.resolution)
    encoders_key = jr.split(jr.key(config.run.seed), 3)[1]
    encoders = hosts.together(partial(parts.encoders, config.model, layout, key=encoders_key))
    log.info("%d samples on %s", len(source), describe(layout.mesh))
    bad = BadItems(len(source), data.max_bad_fraction)
    looked, buckets = look_at(source, parts, data, bad, batch_size=1)
    encoding = Encoding(config, layout, encoding_compute(config, layout), parts, encoders)
    folder = Path(data.dataset_save_location)
    cached = encoding.cached(source, folder, looked, buckets, bad, on_host=hosts.to_host(encoders))
    return CacheSummary(folder, int(cached.usable.sum()), bad.count)
