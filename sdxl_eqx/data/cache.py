"""What the frozen encoders make of a data set, kept by the content it was made from."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.captions import Visit, caption
from sdxl_eqx.data.control import read_control
from sdxl_eqx.data.loader import Read
from sdxl_eqx.data.pictures import Size, read_picture
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.store import Arrays, Keys, Store, key_text
from sdxl_eqx.data.survey import Survey
from sdxl_eqx.data.tokenizer import Tokenizers, tokenize
from sdxl_eqx.data.transforms import draw_crop, mirror, resize_and_crop

FORMAT = 2
"""Part of every key: raise it when what a record holds changes."""

PICTURES, TEXT = "pictures", "text"
"""The folders of the two stores."""


@dataclass(frozen=True)
class Contents:
    """What a cache must hold for a data set, as keys. A sample that cannot be used has none (b'')."""

    seed: int
    config: DataConfig
    shapes: tuple[Size, ...]
    bucket: Int[np.ndarray, " n"]
    """Of each sample, as an index of `shapes`; -1 where it cannot be used."""
    survey: Survey
    pictures: Keys
    """Of every picture; with random_flip those of the mirrored ones follow."""
    text: Keys
    """Of every caption, one sample's after the other's, and last of the empty prompt; none where text is encoded in
    the step."""
    starts: Int[np.ndarray, " n1"]
    """Where the captions of each sample begin in `text`."""

    @classmethod
    def of(
        cls,
        survey: Survey,
        shapes: tuple[Size, ...],
        bucket: Int[np.ndarray, " n"],
        config: DataConfig,
        *,
        seed: int,
        vae: str,
        text: str | None,
    ) -> "Contents":
        """`vae` and `text` must change with whatever decides the encoders' results; text None leaves text out."""
        flips = (False, True) if config.random_flip else (False,)
        keys = []
        for flip in flips:
            for i, digest in enumerate(survey.pictures):
                if bucket[i] < 0:
                    keys.append("")
                    continue
                target = shapes[bucket[i]]
                size = int(survey.sizes[i, 0]), int(survey.sizes[i, 1])
                crop = crop_of(digest, size, target, config, seed)
                keys.append(_hash("picture", vae, digest.decode(), size, target, crop, flip))
        empty = hashlib.sha256(b"").hexdigest()[:32].encode()
        said = [*survey.captions, empty]
        texts = [] if text is None else [_hash("text", text, config.caption_chunks, one.decode()) for one in said]
        starts = np.concatenate([[0], np.cumsum(survey.counts)])
        return cls(seed, config, shapes, bucket, survey, key_text(keys), key_text(texts), starts)

    @property
    def count(self) -> int:
        """How many samples the data set has."""
        return len(self.bucket)

    def missing_pictures(self, store: Store) -> Int[np.ndarray, " m"]:
        """Indices into `pictures` of what is to be encoded: those of one shape follow each other, no key twice."""
        return self._missing(self.pictures, store, np.tile(self.bucket, len(self.pictures) // max(self.count, 1)))

    def missing_text(self, store: Store) -> Int[np.ndarray, " m"]:
        """Indices into `text` of what is to be encoded, no key twice."""
        return self._missing(self.text, store, np.zeros(len(self.text), int))

    def usable(self, pictures: Store, text: Store) -> Bool[np.ndarray, " n"]:
        """Of which samples everything is there."""
        each = len(self.pictures) // max(self.count, 1)
        good = (self.bucket >= 0) & (pictures.find(self.pictures).reshape(each, -1) >= 0).all(axis=0)
        if len(self.text):
            lacking = np.concatenate([[0], np.cumsum(text.find(self.text[:-1]) < 0)])
            good &= lacking[self.starts[1:]] == lacking[self.starts[:-1]]
        return good

    def geometry(self, sample: int) -> tuple[Size, Size, tuple[int, int]]:
        """The size of a usable sample's picture, that of its crop, and (top, left) of this, before it is mirrored."""
        size = int(self.survey.sizes[sample, 0]), int(self.survey.sizes[sample, 1])
        target = self.shapes[self.bucket[sample]]
        return size, target, crop_of(self.survey.pictures[sample], size, target, self.config, self.seed)

    def pixels(self, source: Source, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], np.ndarray]:
        """The pixels and time_ids of an index into `pictures`.

        Raises:
            BadSample: the picture cannot be used.
        """
        flip, sample = divmod(index, self.count)
        _, target, crop = self.geometry(sample)
        picture = read_picture(source.picture(sample), source.name(sample), target=target)
        pixels, time_ids = resize_and_crop(picture, target, crop)
        return mirror(pixels, time_ids) if flip else (pixels, time_ids)

    def caption(self, source: Source, index: int) -> str:
        """The caption of an index into `text`.

        Raises:
            BadSample: it cannot be read any more.
        """
        if index == len(self.text) - 1:
            return ""
        sample = int(np.searchsorted(self.starts, index, side="right")) - 1
        return source.captions(sample)[index - int(self.starts[sample])]

    @staticmethod
    def _missing(keys: Keys, store: Store, group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
        first = np.unique(keys, return_index=True)[1] if len(keys) else np.empty(0, int)
        lacking = first[(keys[first] != b"") & (store.find(keys[first]) < 0)]
        return lacking[np.lexsort([lacking, group[lacking]])]


def crop_of(digest: bytes, size: Size, target: Size, config: DataConfig, seed: int) -> tuple[int, int]:
    """The one crop (top, left) of a cached picture, drawn from the seed and its content: its place does not matter."""
    rng = np.random.default_rng([seed, int(digest, 16)])
    return draw_crop(size, target, center_crop=config.center_crop, rng=rng)


class Cached:
    """A data set whose pictures, and text if it is not encoded in the step, are read from stores."""

    def __init__(self, folder: Path, contents: Contents):
        """
        Raises:
            ValueError: a file of the cache is damaged.
        """
        self.contents = contents
        self._pictures, self._text = open_stores(folder)
        self.usable = contents.usable(self._pictures, self._text)
        self._where_pictures = self._pictures.find(contents.pictures)
        self._where_text = self._text.find(contents.text)

    def reader(self, source: Source, tokenizers: Tokenizers, *, with_control: bool = False) -> Read:
        """Reads samples into the fields of a `LatentBatch`, or of a `LatentTextBatch` where text is not kept.

        What a ControlNet sees, if it is asked for, is not kept: it is read anew at each visit.
        """
        contents, config = self.contents, self.contents.config

        def read(sample: int, rng: np.random.Generator) -> Arrays:
            visit = Visit.draw(config, rng)
            arrays = self._pictures.read(int(self._where_pictures[sample + visit.flip * contents.count]))
            if with_control:
                arrays["control"] = read_control(source, sample, *contents.geometry(sample), flip=visit.flip)
            if not len(contents.text):
                words = caption(source.captions(sample), visit, config, rng)
                ids, ids_2 = (tokenize(t, [words], config.caption_chunks)[0][0] for t in tokenizers)
                return {**arrays, "input_ids": ids, "input_ids_2": ids_2}
            start, end = contents.starts[sample], contents.starts[sample + 1]
            index = -1 if visit.is_empty else start + visit.index(int(end - start))
            return {**arrays, **self._text.read(int(self._where_text[index]))}

        return read


def latent_reader(records: LatentRecords, config: DataConfig, empty: Arrays | None) -> Read:
    """Reads latents and embeddings that came encoded into the fields of a `LatentBatch`; `empty` is the text of the
    empty prompt, where captions are dropped."""

    def read(sample: int, rng: np.random.Generator) -> Arrays:
        visit = Visit.draw(config, rng)
        arrays = records[sample]
        return {**arrays, **empty} if visit.is_empty and empty is not None else arrays

    return read


def open_stores(folder: Path) -> tuple[Store, Store]:
    """What is kept of pictures and of text.

    Raises:
        ValueError: a file is damaged.
    """
    return Store(folder / PICTURES), Store(folder / TEXT)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()
