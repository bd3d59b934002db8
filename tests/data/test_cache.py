import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.config import DataConfig, TrainConfig
from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.cache import PICTURES, TEXT, Cached, Contents, open_stores
from sdxl_eqx.data.captions import Visit
from sdxl_eqx.data.loader import picture_reader
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.store import StoreWriter
from sdxl_eqx.data.survey import survey
from sdxl_eqx.data.tokenizer import bundled_tokenizers, tokenize

CONFIG = DataConfig(resolution=32, random_flip=True)
SHAPES = ((32, 32), (24, 40))
N = 8


@pytest.fixture(scope="module")
def tokenizers():
    return bundled_tokenizers()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of 64 x 80 pixels of noise, each with two captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": [f"a {i}", f"b {i}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def contents(folder: Path, config=CONFIG, *, seed=0, vae="vae", text: str | None = "text", bucket=None) -> Contents:
    source = ImageFolder(str(folder))
    seen = survey(source, range(len(source)), digests=True, num_threads=2)
    of = np.arange(len(source)) % 2 if bucket is None else np.array(bucket)
    of = np.where(seen.counts > 0, of, -1)
    return Contents.of(seen, SHAPES, of, config, seed=seed, vae=vae, text=text)


def encode(folder: Path, one: Contents, cache: Path) -> tuple[int, int]:
    """Encode what is missing: of pictures their pixels, of captions their ids; how many of each."""
    source = ImageFolder(str(folder))
    pictures, texts = open_stores(cache)
    todo = one.missing_pictures(pictures), one.missing_text(texts)
    with StoreWriter(cache / PICTURES) as writer:
        for index in todo[0]:
            try:
                pixels, time_ids = one.pixels(source, int(index))
            except BadSample:
                continue
            mean = pixels.astype(np.float32)
            writer.add(bytes(one.pictures[index]), {"mean": mean, "logvar": -mean, "time_ids": time_ids})
    first, _ = bundled_tokenizers()
    with StoreWriter(cache / TEXT) as writer:
        for index in todo[1]:
            ids = tokenize(first, [one.caption(source, int(index))], one.config.caption_chunks)[0][0]
            context = ids[:, None].astype(np.float32)
            writer.add(bytes(one.text[index]), {"context": context, "pooled": context[:4, 0]})
    return len(todo[0]), len(todo[1])


def test_everything_is_encoded_once_and_then_found(folder, tmp_path):
    one = contents(folder)
    assert encode(folder, one, tmp_path / "cache") == (2 * N, 2 * N + 1)
    assert encode(folder, one, tmp_path / "cache") == (0, 0)
    assert Cached(tmp_path / "cache", one).usable.all()


def test_a_changed_picture_or_caption_or_a_new_one_encodes_just_that(folder, tmp_path):
    encode(folder, contents(folder), tmp_path / "cache")
    Image.new("RGB", (80, 64)).save(folder / "3.png")
    assert encode(folder, contents(folder), tmp_path / "cache") == (2, 0)
    lines = (folder / "metadata.jsonl").read_text().replace('"b 5"', '"c 5"').splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert encode(folder, contents(folder), tmp_path / "cache") == (0, 1)
    Image.new("RGB", (80, 64), (9, 9, 9)).save(folder / "new.png")
    lines.insert(0, json.dumps({"file_name": "new.png", "text": "new"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    # Places change, contents do not; only buckets must stay with their pictures.
    bucket = [0, *(np.arange(N) % 2)]
    assert encode(folder, contents(folder, bucket=bucket), tmp_path / "cache") == (2, 1)


@pytest.mark.parametrize(
    ("change", "encoded"),
    [
        ({"vae": "other"}, (2 * N, 0)),
        ({"text": "other"}, (0, 2 * N + 1)),
        ({"seed": 1}, (12, 0)),  # two of the crops are the same
        ({"config": dataclasses.replace(CONFIG, center_crop=True)}, (12, 0)),
        ({"config": dataclasses.replace(CONFIG, caption_chunks=2)}, (0, 2 * N + 1)),
        ({"config": dataclasses.replace(CONFIG, random_flip=False)}, (0, 0)),
        ({"bucket": [0] * N}, (N, 0)),
        ({"text": None}, (0, 0)),
        ({"config": dataclasses.replace(CONFIG, caption_dropout=0.5, enable_data_shuffling=False)}, (0, 0)),
    ],
)
def test_what_a_record_depends_on_is_in_its_key_and_nothing_else(folder, tmp_path, change, encoded):
    encode(folder, contents(folder), tmp_path / "cache")
    assert encode(folder, contents(folder, **change), tmp_path / "cache") == encoded


def test_equal_pictures_and_captions_are_encoded_once(folder, tmp_path):
    shutil.copy(folder / "2.png", folder / "4.png")
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i}.png", "text": "same"}) for i in range(N))
    )
    one = contents(folder)
    assert encode(folder, one, tmp_path / "cache") == (2 * (N - 1), 2)
    assert Cached(tmp_path / "cache", one).usable.all()


def test_a_cached_visit_reads_what_an_uncached_one_of_the_same_crop_does(folder, tmp_path, tokenizers):
    config = DataConfig(resolution=32, random_flip=True, center_crop=True, caption_dropout=0.3)
    one = contents(folder, config)
    encode(folder, one, tmp_path / "cache")
    source = ImageFolder(str(folder))
    cached = Cached(tmp_path / "cache", one).reader(source, tokenizers)
    fresh = picture_reader(source, tokenizers, config, lambda sample: SHAPES[sample % 2])
    flips = set()
    for epoch in range(4):
        for sample in range(N):
            read, wanted = (r(sample, np.random.default_rng([7, sample, epoch])) for r in (cached, fresh))
            np.testing.assert_array_equal(read["mean"], wanted["pixels"].astype(np.float32))
            np.testing.assert_array_equal(read["time_ids"], wanted["time_ids"])
            np.testing.assert_array_equal(read["context"][:, 0], wanted["input_ids"])
            flips.add(Visit.draw(config, np.random.default_rng([7, sample, epoch])).flip)
    assert flips == {False, True}


def test_where_captions_change_text_is_read_anew_and_only_latents_are_kept(folder, tmp_path, tokenizers):
    config = dataclasses.replace(CONFIG, caption_shuffle=True, random_flip=False)
    assert TrainConfig(data=CONFIG).is_text_cached and not TrainConfig(data=config).is_text_cached
    one = contents(folder, config, text=None)
    assert encode(folder, one, tmp_path / "cache") == (N, 0)
    cached = Cached(tmp_path / "cache", one)
    assert cached.usable.all()
    item = cached.reader(ImageFolder(str(folder)), tokenizers)(0, np.random.default_rng(0))
    assert item.keys() == {"mean", "logvar", "time_ids", "input_ids", "input_ids_2"}
    assert item["input_ids"].shape == (77,)


def test_samples_that_cannot_be_read_are_not_usable_and_cost_no_other(folder, tmp_path, tokenizers):
    (folder / "3.png").write_bytes(b"no picture")
    whole = (folder / "6.png").read_bytes()
    (folder / "6.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    one = contents(folder)
    assert one.bucket.tolist() == [0, 1, 0, -1, 0, 1, 0, 1]
    encode(folder, one, tmp_path / "cache")
    usable = Cached(tmp_path / "cache", one).usable
    assert usable.tolist() == [i not in (3, 6) for i in range(N)]


def test_mirrored_records_are_of_the_same_crop(folder, tmp_path):
    one = contents(folder)
    source = ImageFolder(str(folder))
    for sample in range(N):
        (pixels, ids), (mirrored, mirrored_ids) = (one.pixels(source, sample + flip * N) for flip in (0, 1))
        np.testing.assert_array_equal(mirrored, pixels[:, ::-1])
        assert ids[2] == mirrored_ids[2]
    assert len({tuple(one.pixels(source, i)[1][2:4]) for i in range(N)}) > 2  # crops differ


def test_the_bundled_emoji_have_keys_that_stay(tmp_path):
    """Were they to change, everyone's cache would be encoded again: raise FORMAT then, and these."""
    source = ImageFolder(str(resolve("asset:emoji")), max_samples=1)
    seen = survey(source, range(1), digests=True, num_threads=1)
    one = Contents.of(seen, ((64, 64),), np.zeros(1, int), DataConfig(resolution=64), seed=0, vae="v", text="t")
    assert [key.decode()[:8] for key in (one.pictures[0], one.text[0], one.text[1])] == KEYS


KEYS = ["dde95d7d", "07d1db83", "4490d01f"]
