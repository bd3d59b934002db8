"""What a run trains on and what it trains: the data and the model of a config, opened and checked."""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from sdxl_eqx.config import DataConfig, TrainConfig
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.files import cache_folder
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.sources.open import open_source
from sdxl_eqx.data.tokenizer import WORDS, tokenize
from sdxl_eqx.loading import ModelParts

log = logging.getLogger("sdxl_eqx")

LOOKED_AT = 10_000
"""Captions whose tokens are counted before a run; of more, so many spread evenly."""


def read_data_and_model(config: TrainConfig) -> tuple[Source | LatentRecords, ModelParts]:
    """Both. No process waits for another one here.

    Raises:
        ValueError: where one of them is wrong.
        OSError: where one cannot be read.
    """
    data, token = config.data, config.data.hf_access_token
    # The data come first: a wrong folder is said before a model is fetched.
    parts = cache(partial(ModelParts.read, config.model, config.diffusion_scheduler_config, token=token))
    latents = partial(_open_latents, parts, data=data)
    source = open_source(data, seed=config.run.seed, token=token, latents=latents)
    return source, parts()


def _open_latents(parts: Callable[[], ModelParts], paths: Sequence[Path], *, data: DataConfig) -> LatentRecords:
    """TFRecords of what the encoders of this very model made.

    Raises:
        ValueError: they are of another model or resolution.
    """
    vae, unet = parts().vae, parts().unet
    records = LatentRecords(
        paths, scaling_factor=vae.scaling_factor, channels=vae.latent_channels, max_samples=data.max_train_samples,
        context_width=unet.cross_attention_dim, pooled_width=unet.pooled_dim, index_folder=cache_folder("index"),
    )  # fmt: skip
    if records.resolution != data.resolution:
        raise ValueError(
            f"--resolution {data.resolution}: {records.name(0)} holds latents of pictures of {records.resolution} "
            f"pixels; give --resolution {records.resolution}."
        )
    return records


def cut_captions(source: Source | LatentRecords, parts: ModelParts, data: DataConfig) -> str:
    """How many captions are longer than what is encoded of them."""
    if isinstance(source, LatentRecords):
        return "encoded already"
    said = []
    indices = range(0, len(source), -(-len(source) // LOOKED_AT))
    for i in indices:
        try:
            said.extend(source.captions(i))
        except BadSample as error:  # counted when it is to be trained on
            log.debug("%s", error)
    cut = tokenize(parts.tokenizers[0], said, data.caption_chunks)[1]
    of = "" if len(indices) == len(source) else f" of {len(said)} looked at"
    remedy = "; --caption-chunks encodes more" if cut else ""
    return f"{cut} captions{of} are longer than {WORDS * data.caption_chunks} tokens and are cut{remedy}"
