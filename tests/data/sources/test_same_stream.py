"""The same samples give the same batches, whatever kind of data set they are written as."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from written_sets import FORMATS, Sample

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.bad import BadItems
from sdxl_eqx.data.batch import Batch, to_batch
from sdxl_eqx.data.loader import make_stream, picture_reader
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.sources.open import open_source
from sdxl_eqx.data.tokenizer import bundled_tokenizers
from sdxl_eqx.training.looking import sorted_into_buckets, surveyed

SIZES = [(64, 64), (64, 36), (30, 64)]
"""Of the pictures in turn, (height, width)."""

BATCHES = 9
"""Batches of 4 from 14 samples: two epochs and a half, and none of them ends with a batch."""


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def some_samples() -> list[Sample]:
    """Bundled pictures, most of them cut and some of them JPEGs, in another order than that of their names."""
    source, found = ImageFolder(str(resolve("asset:emoji"))), []
    for i in range(14):
        height, width = SIZES[i % 3]
        stem = source.name(i).removesuffix(".png")
        picture = Image.open(io.BytesIO(source.picture(i))).crop((0, 0, width, height))
        kind, data = ("png", source.picture(i)) if i % 3 == 0 else ("png", encoded(picture, "PNG"))
        if i % 4 == 1:
            kind, data = "jpg", encoded(picture.convert("RGB"), "JPEG")
        (caption,) = source.captions(i)
        found.append(Sample(f"{stem}.{kind}", data, (caption, f'a picture of "{stem}" ä')))
    return found


SAMPLES = some_samples()


def no_latents(paths) -> LatentRecords:
    raise AssertionError(f"{paths} hold pictures")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Each kind of data set, found by its files."""
    root = tmp_path_factory.mktemp("sets")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        for kind, write in FORMATS.items():
            (root / kind).mkdir()
            write(root / kind, SAMPLES, 3)
            found[kind] = open_source(config(root / kind), seed=0, token="", latents=no_latents)
    return found


def config(place="") -> DataConfig:
    return DataConfig(
        train_data_dir=str(place), resolution=128, aspect_ratio_buckets=True, bucket_upscale=True, bucket_count=2,
        random_flip=True, cache_latents_text_encoder_outputs=False,
    )  # fmt: skip


def batches(source: Source | LatentRecords) -> list[Batch]:
    """The first ones of a run, as the trainer would feed them."""
    assert isinstance(source, Source)
    data, bad = config(), BadItems(len(source), 0.0)
    buckets = sorted_into_buckets(source, surveyed(source, data), data, bad)
    order = Order(buckets.of, batch_size=4, seed=5, shuffle=True)
    read = picture_reader(source, bundled_tokenizers(), data, lambda sample: buckets.shapes[buckets.of[sample]])
    stream = make_stream(order, read, seed=5, num_threads=2, bad=bad)
    found = [to_batch(arrays) for arrays in itertools.islice(stream, BATCHES)]
    assert not bad.count and order.epoch_of(BATCHES - 1) >= 2
    assert all(isinstance(batch, Batch) for batch in found)
    return [batch for batch in found if isinstance(batch, Batch)]


@pytest.fixture(scope="module")
def expected(opened):
    """The stream of the image folder."""
    return batches(opened["imagefolder"])


def test_files_tell_each_kind(opened):
    names = {kind: type(source).__name__ for kind, source in opened.items()}
    assert names == {"imagefolder": "ImageFolder", "parquet": "Table", "webdataset": "Tars",
                     "arrayrecord": "ArrayRecords", "hf": "Table"}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_each_kind_has_the_samples_in_the_order_in_which_they_were_written(opened, kind):
    source = opened[kind]
    assert [source.captions(i) for i in range(len(source))] == [one.captions for one in SAMPLES]
    assert [source.picture(i) for i in range(len(source))] == [one.data for one in SAMPLES]


def test_the_stream_crops_flips_and_picks_captions_at_random(expected):
    """So that it would show whether a visit drew otherwise."""
    assert len({batch.pixels.shape for batch in expected}) == 2
    corners = np.concatenate([batch.time_ids for batch in expected])[:, 2:4]
    assert len(np.unique(corners, axis=0)) > 8
    assert len({ids.tobytes() for batch in expected for ids in np.asarray(batch.input_ids)}) > len(SAMPLES)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "imagefolder"])
def test_each_kind_gives_the_batches_of_the_image_folder(opened, expected, kind):
    for i, (batch, other) in enumerate(zip(batches(opened[kind]), expected, strict=True)):
        for name in ("pixels", "time_ids", "input_ids", "input_ids_2"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name), err_msg=f"{name} of batch {i}")


@pytest.mark.parametrize("change", ["order", "picture", "caption"])
def test_another_order_picture_or_caption_shows_in_the_batches(tmp_path, expected, change):
    samples = list(SAMPLES)
    if change == "order":
        samples[0], samples[3] = samples[3], samples[0]  # of one size, so that only what is in them differs
    elif change == "picture":
        samples[0] = Sample(samples[0].name, SAMPLES[3].data, samples[0].captions)
    else:
        samples[0] = Sample(samples[0].name, samples[0].data, samples[0].captions[::-1])
    FORMATS["imagefolder"](tmp_path, samples, 1)
    found = batches(open_source(config(tmp_path), seed=0, token="", latents=no_latents))
    fields = ("pixels", "input_ids")
    equal = {
        name: all(np.array_equal(getattr(a, name), getattr(b, name)) for a, b in zip(found, expected, strict=True))
        for name in fields
    }
    assert equal == {"pixels": change == "caption", "input_ids": change == "picture"}
