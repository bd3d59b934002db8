"""What all processes find out about a data set before the first batch."""

import dataclasses
import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_step import TEXT, TEXT_2, UNET, VAE_CONFIG

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.bad import BadItems, BadSample
from sdxl_eqx.data.buckets import Buckets
from sdxl_eqx.data.survey import Survey
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.parallel import hosts
from sdxl_eqx.training import looking
from sdxl_eqx.training.looking import look_at, surveyed

SHAPES = ModelShapes(UNET, VAE_CONFIG, TEXT, TEXT_2, ScheduleConfig())
SIZES = ((128, 64), None, (64, 128), (70, 130), (130, 40), (64, 128), None, (200, 200), (64, 64), (63, 300), (128, 70))
"""(height, width) of pictures; None where one cannot be read."""

DATA = DataConfig(resolution=128, aspect_ratio_buckets=True, bucket_count=3, transform_images_num_proc=2)


class Pictures:
    """A source in memory; a picture is drawn when it is asked for."""

    def __init__(self, sizes: Sequence[tuple[int, int] | None] = SIZES):
        self.sizes = sizes
        self.looked: set[int] = set()

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        return f"{index}.png"

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(f"caption {index} {j}" for j in range(1 + index % 2))

    def picture(self, index: int, limit: int = -1) -> bytes:
        self.looked.add(index)
        size = self.sizes[index]
        if size is None:
            raise BadSample(self.name(index), "torn")
        file = io.BytesIO()
        Image.new("RGB", (size[1], size[0]), (index, 0, 0)).save(file, "PNG")
        return file.getvalue() if limit < 0 else file.getvalue()[:limit]


@pytest.fixture
def processes(monkeypatch) -> Callable[[int, Callable[[], Any]], list[Any]]:
    """Does something in so many processes at once, here threads that hand each other what processes would."""
    local = threading.local()

    def gather_bytes(text: bytes) -> list[bytes]:
        local.said[local.index] = text
        local.barrier.wait(30)
        texts = list(local.said)
        local.barrier.wait(30)
        return texts

    def run(count: int, what: Callable[[], Any]) -> list[Any]:
        said, barrier = [b""] * count, threading.Barrier(count)

        def one(index: int) -> Any:
            local.index, local.said, local.barrier = index, said, barrier
            return what()

        monkeypatch.setattr(hosts, "index", lambda: local.index)
        monkeypatch.setattr(hosts, "count", lambda: count)
        monkeypatch.setattr(hosts, "gather_bytes", gather_bytes)
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))

    return run


def assert_same(one: Survey, other: Survey) -> None:
    """That two surveys say the same of every sample."""
    for name in ("sizes", "pictures", "captions", "counts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    assert sorted((b.name, b.reason) for b in one.bad) == sorted((b.name, b.reason) for b in other.bad)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("count", [2, 3, 16])
def test_a_survey_of_several_processes_is_that_of_one_in_each_of_them(processes, count, cached):
    data = dataclasses.replace(DATA, cache_latents_text_encoder_outputs=cached)
    alone = surveyed(Pictures(), data)
    assert len(alone.bad) == 2 and (len(alone.captions) > 0) == cached
    sources = []

    def look() -> Survey:
        sources.append(Pictures())
        return surveyed(sources[-1], data)

    for found in processes(count, look):
        assert_same(found, alone)
    assert sorted(i for source in sources for i in source.looked) == list(range(len(SIZES)))  # each looked at its share


def test_all_processes_sort_into_the_same_buckets_and_count_the_same_bad_ones(processes):
    def look() -> tuple[Buckets, dict[str, str]]:
        bad = BadItems(len(SIZES), 0.0)
        return look_at(Pictures(), SHAPES, DATA, bad, batch_size=2)[1], bad.reasons

    (alone, reasons), *others = [look(), *processes(3, look)]
    for buckets, same in others:
        assert buckets.shapes == alone.shapes and same == reasons
        np.testing.assert_array_equal(buckets.of, alone.of)


def test_a_process_that_cannot_look_ends_all_with_whose_error_it_is(processes):
    def look() -> Survey:
        source = Pictures()
        if hosts.index() == 1:
            source.captions = lambda index: (_ for _ in ()).throw(OSError("the disk is gone"))
        return surveyed(source, DATA)

    def said() -> str:
        with pytest.raises((ValueError, OSError)) as raised:
            look()
        return str(raised.value)

    assert processes(3, said) == ["process 1: the disk is gone", "the disk is gone", "process 1: the disk is gone"]


def test_pictures_take_a_bucket_of_their_form_and_those_that_are_too_small_are_bad_with_the_remedy(caplog):
    bad = BadItems(len(SIZES), 0.0)
    with caplog.at_level("INFO", "sdxl_eqx"):
        looked, buckets = look_at(Pictures(), SHAPES, DATA, bad, batch_size=2)
    assert looked.sizes.tolist() == [list(size or (0, 0)) for size in SIZES]
    taken = [buckets.shapes[i] if i >= 0 else None for i in buckets.of]
    tall, wide, square = (128, 64), (64, 128), (128, 128)
    assert taken[:4] == [tall, None, wide, wide] and taken[5] == wide and taken[10] == tall
    assert taken[4] is taken[6] is taken[9] is None
    assert set(buckets.shapes) <= {tall, wide, square, (64, 64)} and buckets.shapes[0] == wide
    assert bad.reasons == {
        "1.png": "torn",
        "6.png": "torn",
        "4.png": "130 x 40 pixels are smaller than 64; --bucket-upscale takes them",
        "9.png": "63 x 300 pixels are smaller than 64; --bucket-upscale takes them",
    }
    assert f"{len(buckets.shapes)} shapes of batches:\n{buckets.describe(2)}" in caplog.messages
    assert "3 pictures, 1.5 batches an epoch" in caplog.text
    assert sum(message.startswith("skipped ") for message in caplog.messages) == 4


def test_with_upscaling_small_pictures_take_part():
    bad = BadItems(len(SIZES), 0.0)
    _, buckets = look_at(Pictures(), SHAPES, dataclasses.replace(DATA, bucket_upscale=True), bad, batch_size=2)
    assert set(bad.reasons) == {"1.png", "6.png"}
    assert np.flatnonzero(buckets.of < 0).tolist() == [1, 6]


def test_without_buckets_all_that_can_be_read_take_the_square_whatever_their_size(caplog):
    bad = BadItems(len(SIZES), 0.0)
    data = dataclasses.replace(DATA, aspect_ratio_buckets=False)
    with caplog.at_level("INFO", "sdxl_eqx"):
        _, buckets = look_at(Pictures(), SHAPES, data, bad, batch_size=2)
    assert buckets.shapes == ((128, 128),)
    assert buckets.of.tolist() == [-1 if size is None else 0 for size in SIZES]
    assert set(bad.reasons) == {"1.png", "6.png"} and "shapes of batches" not in caplog.text


@pytest.mark.parametrize("bad_ones", [None, (20, 20)])
def test_too_many_samples_that_cannot_be_used_end_the_run_before_it_begins(bad_ones):
    source = Pictures([bad_ones] * 12 + [(64, 64)] * 30)
    with pytest.raises(ValueError, match=r"11 of 42 samples cannot be used, at most max\(10, 0\.01 x 42\).*0\.png"):
        look_at(source, SHAPES, DATA, BadItems(len(source), 0.01), batch_size=2)


def test_a_shape_that_the_model_cannot_take_is_refused():
    deep = dataclasses.replace(UNET, block_out_channels=(8,) * 7)
    shapes = dataclasses.replace(SHAPES, unet=deep)
    multiple = VAE_CONFIG.downscale * 2**6
    with pytest.raises(ValueError, match=f"--resolution 64: this model divides sides by {multiple}"):
        look_at(Pictures(), shapes, DATA, BadItems(len(SIZES), 0.0), batch_size=2)


def test_a_long_survey_says_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(looking, "SAID_EVERY", -1)
    with caplog.at_level("INFO", "sdxl_eqx"):
        surveyed(Pictures(), DATA)
    assert caplog.messages == [f"looked at {i} of {len(SIZES)} samples" for i in range(len(SIZES))]
