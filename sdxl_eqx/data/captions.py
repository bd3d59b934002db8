"""Which caption a visit to a sample reads, and in which words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdxl_eqx.config import DataConfig


@dataclass(frozen=True)
class Visit:
    """What is drawn for a visit before anything is read, the same with and without a cache."""

    flip: bool
    """Whether the picture is mirrored."""
    is_empty: bool
    """Whether the caption is dropped for the empty prompt."""
    pick: float
    """Which of the sample's captions, from 0 to 1."""

    @classmethod
    def draw(cls, config: DataConfig, rng: np.random.Generator) -> "Visit":
        """Three numbers of `rng`, whatever the config is; what else is drawn for the visit follows them."""
        flip, drop, pick = rng.random(3)
        return cls(bool(config.random_flip and flip < 0.5), bool(drop < config.caption_dropout), float(pick))

    def index(self, count: int) -> int:
        """Which of `count` captions."""
        return int(self.pick * count)


def caption(captions: Sequence[str], visit: Visit, config: DataConfig, rng: np.random.Generator) -> str:
    """The caption of a visit: '' if it is dropped, with its tags in another order if they are shuffled."""
    if visit.is_empty:
        return ""
    text = captions[visit.index(len(captions))]
    return shuffle_tags(text, config.keep_tokens, rng) if config.caption_shuffle else text


def shuffle_tags(text: str, keep: int, rng: np.random.Generator) -> str:
    """Comma-separated tags in a random order, but for the first `keep` (kohya's `shuffle_caption`, `keep_tokens`)."""
    tags = [tag.strip() for tag in text.split(",")]
    tags = [tag for tag in tags if tag]
    return ", ".join([*tags[:keep], *(tags[keep + i] for i in rng.permutation(len(tags[keep:])))])
