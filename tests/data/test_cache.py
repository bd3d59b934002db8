import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data import cache
from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.batch import LatentBatch
from sdxl_eqx.data.cache import cache_key, cache_path, cached_reader, open_cache, write_cache
from sdxl_eqx.data.loader import BadItems, make_stream, to_batch
from sdxl_eqx.data.sources import ImageFolder
from sdxl_eqx.data.tokenizer import bundled_tokenizers, tokenize
from sdxl_eqx.data.transforms import read_picture

CONFIG = DataConfig(resolution=32, random_flip=True, transform_images_num_proc=2)
BATCH = 4


@pytest.fixture(scope="module")
def tokenizers():
    return bundled_tokenizers()


@pytest.fixture
def source(tmp_path):
    """Ten pictures of 64 x 48 pixels, wider than high once two are torn."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    emoji = resolve("asset:emoji")
    lines = (emoji / "metadata.jsonl").read_text("utf-8").splitlines()[:10]
    for line in lines:
        shutil.copy(emoji / json.loads(line)["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return ImageFolder(folder)


def encode_pictures(pixels):
    assert pixels.shape == (BATCH, 32, 32, 3)
    mean = pixels[:, ::8, ::8].astype(np.float32) / 255
    return mean, -mean


def encode_captions(ids, ids_2):
    assert ids.shape == ids_2.shape == (BATCH, 77)
    return (ids[:, :, None] + np.arange(2)).astype(np.float16), ids_2[:, :5].astype(np.float32)


def write(source, folder, tokenizers, *, config=CONFIG, seed=0, bad=None, key=None, **options) -> Any:
    """Write a cache; what is there afterwards, if anything."""
    encoders = {"encode_pictures": encode_pictures, "encode_captions": encode_captions}
    key = key or cache_key(source, "model", config, seed)
    write_cache(
        source,
        folder,
        key=key,
        tokenizers=tokenizers,
        config=config,
        seed=seed,
        batch_size=BATCH,
        bad=bad or BadItems(len(source), 0.0),
        **{**encoders, **options},
    )
    return open_cache(folder, key)


def test_a_cache_gives_back_bit_for_bit_what_the_encoders_made(source, tmp_path, tokenizers):
    told = []
    cached = write(source, tmp_path, tokenizers, progress=told.append)
    assert len(cached) == 10
    assert told == [4, 8, 10]
    for i, example in enumerate(source.examples):
        item = cached[i]
        ids, ids_2 = (tokenize(t, [example.caption])[0][0] for t in tokenizers)
        np.testing.assert_array_equal(item["context"], (ids[:, None] + np.arange(2)).astype(np.float16))
        np.testing.assert_array_equal(item["pooled"], ids_2[:5])
        np.testing.assert_array_equal(item["logvar"], -item["mean"])
        assert item["context"].dtype == np.float16 and item["mean"].dtype == np.float32
        assert item["time_ids"].tolist() == item["time_ids_flipped"].tolist() == [64, 64, 0, 0, 32, 32]
    empty_ids, empty_ids_2 = (tokenize(t, [""])[0][0] for t in tokenizers)
    np.testing.assert_array_equal(cached.empty["context"], (empty_ids[:, None] + np.arange(2)).astype(np.float16))
    np.testing.assert_array_equal(cached.empty["pooled"], empty_ids_2[:5])


def test_a_cache_that_is_opened_again_reads_the_same_also_under_threads(source, tmp_path, tokenizers):
    key = cache_key(source, "model", CONFIG, 0)
    assert open_cache(tmp_path, key) is None
    one = write(source, tmp_path, tokenizers)
    opened = open_cache(tmp_path, key)
    assert opened is not None and len(opened) == 10
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(opened.__getitem__, [i % 10 for i in range(200)]))
    for i, item in enumerate(read):
        for name, array in one[i % 10].items():
            np.testing.assert_array_equal(item[name], array)


def test_crops_follow_from_the_seed_and_index_and_flips_are_those_of_the_same_crop(source, tmp_path, tokenizers):
    for example in source.examples:
        wide = np.random.default_rng(1).integers(0, 256, (32, 90, 3), np.uint8)
        Image.fromarray(wide).save(example.path)
    one, same, other = (
        write(source, tmp_path / name, tokenizers, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    lefts = [int(one[i]["time_ids"][3]) for i in range(10)]
    assert lefts == [int(same[i]["time_ids"][3]) for i in range(10)]
    assert lefts != [int(other[i]["time_ids"][3]) for i in range(10)]
    assert len(set(lefts)) > 3
    for i in range(10):
        item, picture = one[i], read_picture(source[i].path)
        for suffix, pixels in (("", picture), ("_flipped", picture[:, ::-1])):
            left = int(item["time_ids" + suffix][3])
            expected, _ = encode_pictures(np.stack([pixels[:, left : left + 32]] * BATCH))
            np.testing.assert_array_equal(item["mean" + suffix], expected[0])


def test_what_the_cache_depends_on_is_in_its_key(source):
    def key(source=source, model="model", seed=0, **changes):
        return cache_key(source, model, dataclasses.replace(CONFIG, **changes), seed)

    base = key()
    assert base == key() == key(caption_dropout=0.5, transform_images_num_proc=1)
    others = [
        key(model="other"),
        key(seed=1),
        key(resolution=64),
        key(center_crop=True),
        key(random_flip=False),
        key(max_bad_fraction=0.5),
    ]
    lines = (source.folder / "metadata.jsonl").read_text("utf-8").splitlines()
    for changed in (
        [lines[1], lines[0], *lines[2:]],
        lines[:9],
        [lines[0].replace("of sloth", "of a sloth"), *lines[1:]],
    ):
        (source.folder / "metadata.jsonl").write_text("\n".join(changed), "utf-8")
        others.append(key(ImageFolder(source.folder)))
    path = source[3].path
    path.write_bytes(path.read_bytes() + b"\0")
    others.append(key())
    assert len({base, *others}) == len(others) + 1


def test_bad_pictures_are_left_out_and_counted(source, tmp_path, tokenizers):
    for i in (0, 5):
        source[i].path.write_bytes(b"torn")
    bad = BadItems(10, 0.0)
    cached = write(source, tmp_path, tokenizers, bad=bad)
    assert bad.count == 2
    good = [source[i].caption for i in range(10) if i not in (0, 5)]
    expected = [tokenize(tokenizers[1], [caption])[0][0, :5].tolist() for caption in good]
    assert [cached[i]["pooled"].tolist() for i in range(len(cached))] == expected


def test_a_source_of_bad_pictures_alone_is_an_error_and_leaves_nothing(source, tmp_path, tokenizers):
    for example in source.examples:
        example.path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="10 of 10 pictures cannot be read"):
        write(source, tmp_path / "cache", tokenizers)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_interrupted_write_leaves_nothing_that_is_opened(source, tmp_path, tokenizers):
    calls = []

    def interrupted(pixels):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_pictures(pixels)

    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        write(source, folder, tokenizers, encode_pictures=interrupted)
    assert list(folder.iterdir()) == []
    assert open_cache(folder, cache_key(source, "model", CONFIG, 0)) is None


def test_a_process_that_does_not_write_encodes_all_the_same_and_leaves_nothing(source, tmp_path, tokenizers):
    told = []
    assert write(source, tmp_path / "cache", tokenizers, is_writer=False, progress=told.append) is None
    assert told == [4, 8, 10]
    assert not (tmp_path / "cache").exists()


def test_what_processes_read_must_be_the_same_and_comes_before_it_is_encoded(source, tmp_path, tokenizers):
    source[5].path.write_bytes(b"torn")
    read = []

    def together(work, says=lambda made: None):
        made = work()
        if isinstance(said := says(made), list) and said:
            read.append(said)
            if len(read) == 3:
                raise ValueError("process 1 has read [8]")
        return made

    with pytest.raises(ValueError, match="process 1 has read"):
        write(source, tmp_path / "cache", tokenizers, together=together)
    assert read == [[0, 1, 2, 3], [4, 6, 7, 8], [9]]
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("fails_in", ["write", "close"])
def test_a_disk_that_is_full_is_an_error_with_a_remedy_and_leaves_nothing(
    fails_in, source, tmp_path, tokenizers, monkeypatch
):
    class Full(cache.ArrayRecordWriter):
        def write(self, record: bytes) -> None:
            if fails_in == "write":
                raise RuntimeError("No space left on device")

        def close(self) -> None:
            if fails_in == "close":
                raise RuntimeError("No space left on device")

    monkeypatch.setattr(cache, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); free space, or"):
        write(source, tmp_path / "cache", tokenizers)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_or_one_of_another_key_is_an_error(source, tmp_path, tokenizers):
    key = cache_key(source, "model", CONFIG, 0)
    path = write(source, tmp_path, tokenizers, key=key).path
    alike = key[:16] + "0" * 48
    with pytest.raises(ValueError, match=f"must hold the cache of key {alike}, not of {key}; delete"):
        open_cache(tmp_path, alike)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"is no complete cache .*; delete .*, it is written again"):
        open_cache(tmp_path, key)
    assert cache_path(tmp_path, key) == path


def test_cached_samples_become_full_batches_with_flips_and_dropped_captions(source, tmp_path, tokenizers):
    for example in source.examples:
        ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
        Image.fromarray(np.ascontiguousarray(ramp)).save(example.path)
    cached = write(source, tmp_path, tokenizers)
    read = cached_reader(0.3, True, cached.empty)
    stream = make_stream(
        cached, read, batch_size=6, seed=0, shuffle=True, num_threads=3, bad=BadItems(len(cached), 0.0)
    )
    batches = [to_batch(next(stream)) for _ in range(40)]
    assert all(isinstance(batch, LatentBatch) and batch.mean.shape == (6, 4, 4, 3) for batch in batches)
    means = np.concatenate([np.asarray(batch.mean) for batch in batches if isinstance(batch, LatentBatch)])
    context = np.concatenate([np.asarray(batch.context) for batch in batches if isinstance(batch, LatentBatch)])
    flipped = (means[:, 0, 0, 0] > means[:, 0, -1, 0]).sum()
    dropped = (context == cached.empty["context"]).all(axis=(1, 2)).sum()
    assert 90 < flipped < 150
    assert 45 < dropped < 100


def test_without_random_flip_no_mirrored_moments_are_kept_or_read(source, tmp_path, tokenizers):
    config = dataclasses.replace(CONFIG, random_flip=False)
    cached = write(source, tmp_path, tokenizers, config=config)
    assert set(cached[0]) == {"mean", "logvar", "context", "pooled", "time_ids"}
    item = cached_reader(0.0, False, cached.empty)(cached[0], np.random.default_rng(0))
    np.testing.assert_array_equal(item["mean"], cached[0]["mean"])
