"""The survey of a data set by all processes, and the shapes of batches that follow from it."""

import logging
import time
from functools import partial

import numpy as np

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.bad import BadItems, BadSample
from sdxl_eqx.data.buckets import Buckets, choose_buckets, one_bucket
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.survey import Survey, survey
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.parallel import hosts

log = logging.getLogger("sdxl_eqx")

SAID_EVERY = 10
"""Seconds between two lines on how far a survey is."""


def look_at(
    source: Source, shapes: ModelShapes, data: DataConfig, bad: BadItems, *, batch_size: int
) -> tuple[Survey, Buckets]:
    """What must be known of all samples before the first batch, and each usable sample's shape of batch.

    Raises:
        ValueError: where too many samples cannot be used, or a shape does not go with the model.
    """
    looked = surveyed(source, data)
    for failure in looked.bad:
        bad.add(failure)
    buckets = sorted_into_buckets(source, looked, data, bad)
    if data.aspect_ratio_buckets:
        for side in sorted({side for shape in buckets.shapes for side in shape}):
            shapes.check_resolution(side)
        log.info("%d shapes of batches:\n%s", len(buckets.shapes), buckets.describe(batch_size))
    return looked, buckets


def surveyed(source: Source, data: DataConfig) -> Survey:
    """The survey of all samples, of which each process makes its share."""
    mine = range(hosts.index(), len(source), hosts.count())
    clock = time.perf_counter()

    def progress(done: int) -> None:
        nonlocal clock
        if time.perf_counter() - clock > SAID_EVERY:
            clock = time.perf_counter()
            log.info("looked at %d of %d samples", done * hosts.count(), len(source))

    digests = data.cache_latents_text_encoder_outputs
    threads = data.transform_images_num_proc
    look = partial(survey, source, mine, digests=digests, num_threads=threads, progress=progress)
    own = hosts.together(look)
    return Survey.joined([Survey.from_bytes(one) for one in hosts.gather_bytes(own.to_bytes())])


def sorted_into_buckets(source: Source, looked: Survey, data: DataConfig, bad: BadItems) -> Buckets:
    """Each usable sample's shape of batch.

    Raises:
        ValueError: where too many samples cannot be used.
    """
    if not data.aspect_ratio_buckets:
        return one_bucket(np.all(looked.sizes > 0, axis=1), data.resolution)
    buckets = choose_buckets(looked.sizes, data.resolution, count=data.bucket_count, upscale=data.bucket_upscale)
    small = np.flatnonzero((buckets.of < 0) & np.all(looked.sizes > 0, axis=1))
    for i in small:
        h, w = looked.sizes[i]
        bad.add(BadSample(source.name(int(i)), f"{h} x {w} pixels are smaller than 64; --bucket-upscale takes them"))
    return buckets
