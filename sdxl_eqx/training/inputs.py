"""What a run trains on and what it trains: the data and the model of a config, opened and checked."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from sdxl_eqx.config import DataConfig, TrainConfig
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.dreambooth import beside_class, check_apart
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.files import cache_folder
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.sources.joined import Joined
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.sources.open import open_source
from sdxl_eqx.data.tokenizer import WORDS, tokenize
from sdxl_eqx.loading import ModelParts

log = logging.getLogger("sdxl_eqx")

LOOKED_AT = 10_000
"""Captions whose tokens are counted before a run; of more, so many spread evenly."""


@dataclass(frozen=True)
class Inputs:
    """The data and the model of a run."""

    source: Source | LatentRecords
    parts: ModelParts
    held: Int[np.ndarray, " m"]
    """Samples that are not trained on, but measured with."""
    weights: Float32[np.ndarray, " n"] | None = None
    """What the loss of each sample is multiplied by, where it is not 1 for all."""

    @property
    def trained_on(self) -> int:
        """How many samples there are to train on."""
        return len(self.source) - len(self.held)


def read_data_and_model(config: TrainConfig) -> Inputs:
    """Both. No process waits for another one here.

    Raises:
        ValueError: where one of them is wrong.
        OSError: where one cannot be read.
    """
    data, token = config.data, config.data.hf_access_token
    # The data come first: a wrong folder is said before a model is fetched.
    parts = cache(partial(ModelParts.read, config.model, config.diffusion_scheduler_config, token=token))
    net = config.controlnet
    opened = partial(
        open_source, seed=config.run.seed, token=token, latents=partial(_open_latents, parts, data=data),
        condition_column=net.conditioning_image_column if net.train_controlnet else "",
        caption=config.dreambooth.instance_prompt,
    )  # fmt: skip
    source = opened(data)
    if isinstance(source, LatentRecords) and config.text.train_text_encoder:
        raise ValueError("--train-text-encoder: TFRecords hold text that is encoded already; leave it out.")
    split = config.sample.eval_split
    fraction = held_fraction(split)
    held = np.zeros(0, int)
    if fraction is not None:
        held = hold_out(len(source), fraction, seed=config.run.seed)
    elif split:
        other = opened(dataclasses.replace(data, train_split=split, max_train_samples=-1))
        if isinstance(source, LatentRecords) or isinstance(other, LatentRecords):
            raise ValueError(f"--eval-split {split!r}: of TFRecords only a fraction can be held out, such as 0.05.")
        held = np.arange(len(source), len(source) + len(other))
        source = Joined({data.train_split: source, split: other})
    if not config.dreambooth.class_data_dir:
        return Inputs(source, parts(), held)
    if isinstance(source, LatentRecords):
        raise ValueError("--class-data-dir: TFRecords of latents are encoded already; leave it out.")
    together, held, weights = beside_class(source, held, _open_class(config), config.dreambooth.prior_loss_weight)
    return Inputs(together, parts(), held, weights)


def _open_class(config: TrainConfig) -> ImageFolder:
    """The pictures of a subject's class.

    Raises:
        ValueError: there are fewer than are asked for, or those of the subject are among them.
    """
    subject, data = config.dreambooth, config.data
    place = subject.class_data_dir
    check_apart(place, data.train_data_dir)
    found = ImageFolder(
        place, image_column=data.image_column, caption_column=data.caption_column, caption=subject.class_prompt,
        max_samples=subject.num_class_images, token=data.hf_access_token,
    )  # fmt: skip
    if len(found) < subject.num_class_images:
        raise ValueError(
            f"--class-data-dir {place}: holds {len(found)} pictures, and --num-class-images asks for "
            f"{subject.num_class_images}; give it more, or ask for fewer."
        )
    return found


def held_fraction(split: str) -> float | None:
    """The share of the samples that an eval_split holds out; None where it is the name of a split."""
    try:
        return float(split)
    except ValueError:
        return None


def hold_out(count: int, fraction: float, *, seed: int) -> Int[np.ndarray, " m"]:
    """That share of so many samples, at least one, chosen by the seed.

    Raises:
        ValueError: none would be left to train on.
    """
    held = max(round(fraction * count), 1)
    if held >= count:
        raise ValueError(f"--eval-split {fraction:g}: of {count} samples none would be left; hold fewer out.")
    return np.sort(np.random.default_rng([seed, 1]).permutation(count)[:held])


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
