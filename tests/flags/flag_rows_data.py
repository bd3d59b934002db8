"""Rows of pictures and captions."""

import io
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flag_row import OTHER, SHAPES, Caught, Row, Rows, program, seen, stand_in
from PIL import Image

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.data.bad import BadItems
from sdxl_eqx.data.buckets import Buckets, one_bucket
from sdxl_eqx.data.captions import Visit, caption
from sdxl_eqx.data.loader import picture_reader
from sdxl_eqx.data.sources.source import Source
from sdxl_eqx.data.tokenizer import bundled_tokenizers
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.training import feed as feeding
from sdxl_eqx.training.inputs import Inputs, read_data_and_model
from sdxl_eqx.training.looking import look_at
from sdxl_eqx.training.setup import Run

# What is opened


def inputs(config: TrainConfig) -> Inputs:
    """Those of a run; the model is not read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelParts, "read", Mock(return_value=object.__new__(ModelParts)))
        return read_data_and_model(config)


def hub(name: str = "") -> Any:
    """What the library of the Hub's data sets is asked for."""

    def observe(config: TrainConfig) -> Any:
        found = seen("sdxl_eqx.data.sources.open.hub_table", lambda: inputs(config))
        return found.named[name] if name else found.given[0]

    return observe


def folder(name: str = "") -> Any:
    """What the image folder is asked for."""

    def observe(config: TrainConfig) -> Any:
        files = Mock(return_value=Mock(is_file=lambda _: False, listing=lambda _: ["metadata.jsonl"]))
        found = seen("sdxl_eqx.data.sources.open.ImageFolder", lambda: inputs(config), data__sources__open__Files=files)
        return found.named[name] if name else Path(found.given[0]).name

    return observe


HUB = {"dataset_name": "a/b"}
OPENED: Rows = {
    "dataset_name": Row("c/d", hub(), "a/b", "c/d", HUB),
    "dataset_config_name": Row("large", hub("config_name"), "", "large", HUB),
    "train_split": Row("test", hub("split"), "train", "test", HUB),
    "hf_data_dir": Row("part", hub("data_dir"), "", "part", HUB),
    "hf_train_files": Row("*.parquet", hub("data_files"), "", "*.parquet", HUB),
    "hf_access_token": Row("hf_secret", hub("token"), "", "hf_secret", HUB),
    "train_data_dir": Row("others", folder(), "pictures", "others", {"train_data_dir": "pictures"}),
    "dataset_type": Row("synthetic", lambda c: type(inputs(c).source).__name__, "ImageFolder", "Synthetic"),
    "image_column": Row("photo", folder("image_column"), "image", "photo"),
    "caption_column": Row("title", folder("caption_column"), "text", "title"),
    "max_train_samples": Row(10, lambda c: len(inputs(c).source), 64, 10),
    "eval_split": Row("0.25", lambda c: len(inputs(c).held), 0, 16),
}

# How it is fed


def fed(config: TrainConfig) -> Caught:
    """What the stream of a run on 8 pictures, 4 a step, is made of."""
    run = stand_in(Run, config=config, batch_size=4, source=range(8), data_position={})
    run.inputs, run.state = Mock(held=np.zeros(0, int), weights=np.ones(8, np.float32)), Mock(step=0)
    readers = one_bucket(np.ones(8, bool), 64), Mock()
    return seen(
        "sdxl_eqx.training.feed.make_stream", lambda: feeding.feed(run),
        training__feed___readers=lambda *_: readers, training__feed__own_rows=lambda *_: range(4),
    )  # fmt: skip


def first_batch(config: TrainConfig) -> Any:
    """The samples of the first batch."""
    return fed(config).given[0].batch(0).samples.tolist()


def cache_folder(config: TrainConfig) -> str:
    """Where what is encoded lies."""
    run = stand_in(Run, config=config, batch_size=2, source=range(2))
    run.folder, run.program, run.layout, run.parts, run.encoders = Mock(path=Path("run")), Mock(), Mock(), Mock(), None
    target = "sdxl_eqx.training.feed.Encoding.cached"
    looked = Mock(), one_bucket(np.ones(2, bool), 64)

    class Encoding:
        cached = None

        def __init__(self, *_: Any):
            pass

    found = seen(
        target, lambda: feeding._readers(run, BadItems(2, 0.0)), training__feed__Encoding=Encoding,
        training__feed__look_at=lambda *_, **__: looked, training__feed__hosts__to_host=lambda x: x,
    )  # fmt: skip
    return str(next(x for x in found.given if isinstance(x, Path)))


def visits(config: TrainConfig) -> list[Visit]:
    """Those that are drawn for 32 samples."""
    return [Visit.draw(config.data, np.random.default_rng(i)) for i in range(32)]


def captions(config: TrainConfig) -> set[str]:
    """All that become of one in 32 visits."""
    draws = [np.random.default_rng(i) for i in range(32)]
    return {caption(["a, b, c, d"], Visit.draw(config.data, rng), config.data, rng) for rng in draws}


class Pictures(Source):
    """Plain pictures of given (height, width)."""

    def __init__(self, *sizes: tuple[int, int]):
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        return f"{index}.png"

    def captions(self, index: int) -> tuple[str, ...]:
        return ("a picture",)

    def picture(self, index: int, limit: int = -1) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (self.sizes[index][1], self.sizes[index][0])).save(file, "PNG")
        return file.getvalue() if limit < 0 else file.getvalue()[:limit]


def corner(config: TrainConfig) -> Any:
    """(top, left) of the crop of a picture three times as wide as high."""
    read = picture_reader(Pictures((64, 192)), bundled_tokenizers(), config.data, lambda _: (64, 64))
    return read(0, np.random.default_rng(1))["time_ids"][2:4].tolist()


def buckets(config: TrainConfig) -> Buckets:
    """Of two squares, a tall one, a wide one and a small one."""
    pictures = Pictures((128, 128), (128, 128), (256, 64), (64, 256), (32, 32))
    return look_at(pictures, SHAPES, config.data, BadItems(5, 0.5), batch_size=1)[1]


def most_bad(config: TrainConfig) -> float:
    """Samples of 1000 that may be bad."""
    run = stand_in(Run, config=config, source=range(1000))
    found = seen("sdxl_eqx.training.feed._readers", lambda: feeding.feed(run))
    return found.given[1].limit


SMALL = {"resolution": 128}
BUCKETS = {**SMALL, "aspect_ratio_buckets": True}
FED: Rows = {
    "resolution": Row(64, lambda c: program(c).batch().mean.shape[1], 512, 32),  # pyright: ignore[reportAttributeAccessIssue]
    "aspect_ratio_buckets": Row(
        True, lambda c: sorted(buckets(c).shapes), [(128, 128)], [(64, 256), (128, 128), (256, 64)], SMALL
    ),
    "bucket_count": Row(1, lambda c: len(buckets(c).shapes), 3, 1, BUCKETS),
    "bucket_upscale": Row(True, lambda c: bool(buckets(c).of[4] >= 0), False, True, BUCKETS),
    "center_crop": Row(True, corner, OTHER, [0.0, 64.0]),
    "random_flip": Row(True, lambda c: 8 < sum(v.flip for v in visits(c)) < 24, False, True),
    "enable_data_shuffling": Row(False, first_batch, OTHER, [0, 1, 2, 3]),
    "cache_latents_text_encoder_outputs": Row(
        False, lambda c: type(program(c).batch()).__name__, "LatentBatch", "Batch"
    ),
    "dataset_save_location": Row("kept", cache_folder, "run/cache", "kept"),
    "transform_images_num_proc": Row(3, lambda c: fed(c).named["num_threads"], 4, 3),
    "caption_dropout": Row(0.5, lambda c: 8 < sum(v.is_empty for v in visits(c)) < 24, False, True),
    "caption_shuffle": Row(True, lambda c: (len(captions(c)) > 8, c.is_text_cached), (False, True), (True, False)),
    "keep_tokens": Row(2, captions, OTHER, {"a, b, c, d", "a, b, d, c"}, {"caption_shuffle": True}),
    "caption_chunks": Row(2, lambda c: program(c).batch().context.shape[1], 77, 154),  # pyright: ignore[reportAttributeAccessIssue]
    "max_bad_fraction": Row(0.5, most_bad, 10, 500),
}

ROWS: Rows = {**OPENED, **FED}
