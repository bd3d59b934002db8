"""What a ControlNet sees lies over its picture, whatever is cropped, mirrored, scaled or kept."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.bad import BadItems, BadSample
from sdxl_eqx.data.batch import Batch, LatentBatch, to_batch
from sdxl_eqx.data.cache import PICTURES, TEXT, Cached, Contents, open_stores
from sdxl_eqx.data.captions import Visit
from sdxl_eqx.data.control import read_control
from sdxl_eqx.data.loader import make_stream, picture_reader
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.pictures import Picture, read_picture
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.store import StoreWriter
from sdxl_eqx.data.survey import survey
from sdxl_eqx.data.tokenizer import bundled_tokenizers
from sdxl_eqx.data.transforms import as_of_size

CONFIG = DataConfig(resolution=32, random_flip=True)
SHAPES = ((32, 32), (24, 40))
N = 8


@pytest.fixture(scope="module")
def tokenizers():
    return bundled_tokenizers()


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return file.getvalue()


def slope(h: int, w: int) -> np.ndarray:
    """A smooth picture in which every place has a colour of its own."""
    y, x = (np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w
    colours = np.stack([np.repeat(y[:, None], w, 1), np.repeat(x[None], h, 0), np.outer(y, x)], axis=-1)
    return np.round(255 * colours).astype(np.uint8)


def write(folder: Path, maps: dict[int, bytes | None] | None = None, kind: str = "png") -> ImageFolder:
    """N pictures of noise of several sizes, of which each is its own map; of some another one, or none."""
    folder.mkdir()
    rng, found = np.random.default_rng(0), []
    for i in range(N):
        size = [(64, 80), (90, 50), (300, 200)][i % 3]
        (folder / f"{i}.{kind}").write_bytes(encoded(rng.integers(0, 256, (*size, 3), np.uint8), kind.upper()))
        fields = {"file_name": f"{i}.{kind}", "text": f"a {i}", "conditioning_image": f"{i}.{kind}"}
        if maps and i in maps:
            data = maps[i]
            fields["conditioning_image"] = "" if data is None else f"map{i}.png"
            if data is not None:
                (folder / f"map{i}.png").write_bytes(data)
        found.append(json.dumps(fields))
    (folder / "metadata.jsonl").write_text("\n".join(found))
    return ImageFolder(str(folder), condition_column="conditioning_image")


def target(sample: int) -> tuple[int, int]:
    return SHAPES[sample % 2]


def cached(source: ImageFolder, cache: Path, config: DataConfig = CONFIG) -> Cached:
    """A cache whose moments are pixels."""
    seen = survey(source, range(N), digests=True, num_threads=2)
    one = Contents.of(seen, SHAPES, np.arange(N) % 2, config, seed=5, vae="vae", text="text")
    with StoreWriter(cache / PICTURES) as writer:
        for index in one.missing_pictures(open_stores(cache)[0]):
            pixels, time_ids = one.pixels(source, int(index))
            mean = pixels.astype(np.float32)
            writer.add(bytes(one.pictures[index]), {"mean": mean, "logvar": mean, "time_ids": time_ids})
    with StoreWriter(cache / TEXT) as writer:
        for key in dict.fromkeys(one.text):
            writer.add(bytes(key), {"context": np.zeros((77, 4), np.float32), "pooled": np.zeros(4, np.float32)})
    return Cached(cache, one)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("center_crop", [False, True])
def test_a_picture_that_is_its_own_map_is_seen_as_it_is_trained_on(tmp_path, tokenizers, kind, center_crop):
    config = DataConfig(resolution=32, random_flip=True, center_crop=center_crop)
    source = write(tmp_path / "set", kind=kind)
    read = picture_reader(source, tokenizers, config, target, with_control=True)
    flips = set()
    for sample, epoch in itertools.product(range(N), range(3)):
        rng = [0, sample, epoch]
        arrays = read(sample, np.random.default_rng(rng))
        np.testing.assert_array_equal(arrays["control"], arrays["pixels"])
        flips.add(Visit.draw(config, np.random.default_rng(rng)).flip)
    assert flips == {False, True}


def test_it_is_also_where_latents_are_kept_and_the_map_is_read_anew(tmp_path, tokenizers):
    source = write(tmp_path / "set")
    read = cached(source, tmp_path / "cache").reader(source, tokenizers, with_control=True)
    crops = set()
    for sample, epoch in itertools.product(range(N), range(3)):
        arrays = read(sample, np.random.default_rng([0, sample, epoch]))
        np.testing.assert_array_equal(arrays["control"], arrays["mean"].astype(np.uint8))
        crops.add((sample, *arrays["time_ids"][2:4].tolist()))
    assert len(crops) > N, "some visits are mirrored, and the recorded crop with them"


def test_what_is_drawn_for_a_visit_is_the_same_with_and_without_a_map(tmp_path, tokenizers):
    source = write(tmp_path / "set")
    plain = picture_reader(source, tokenizers, CONFIG, target)
    read = picture_reader(source, tokenizers, CONFIG, target, with_control=True)
    for sample in range(N):
        arrays, other = (r(sample, np.random.default_rng([0, sample])) for r in (read, plain))
        assert arrays.keys() - other.keys() == {"control"}
        for name in other:
            np.testing.assert_array_equal(arrays[name], other[name])


@pytest.mark.parametrize("map_size", [(64, 80), (32, 40), (160, 200), (61, 77)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_map_of_another_size_lies_over_the_same_places(tmp_path, tokenizers, map_size, kind):
    (tmp_path / "a.png").write_bytes(encoded(slope(64, 80)))
    (tmp_path / "map").write_bytes(encoded(slope(*map_size), kind))
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "text": "a", "conditioning_image": "map"})
    )
    source = ImageFolder(str(tmp_path), condition_column="conditioning_image")
    for size in [(32, 32), (24, 40), (40, 24)]:
        read = picture_reader(source, tokenizers, CONFIG, lambda sample, size=size: size, with_control=True)
        for epoch in range(4):
            arrays = read(0, np.random.default_rng(epoch))
            np.testing.assert_allclose(arrays["control"].astype(int), arrays["pixels"].astype(int), atol=7)


@pytest.mark.parametrize(("map_size", "wide"), [((64, 160), True), ((128, 80), False), ((30, 200), True)])
def test_of_a_map_of_another_ratio_the_middle_counts(map_size, wide):
    """As if it had been scaled to cover the picture and cropped in its middle first."""
    size, seen = (64, 80), slope(*map_size)
    scale = max(size[0] / map_size[0], size[1] / map_size[1])
    h, w = round(map_size[0] * scale), round(map_size[1] * scale)
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    covering = np.asarray(Image.fromarray(seen).resize((w, h), Image.Resampling.LANCZOS))
    expected = write_one(covering[top : top + size[0], left : left + size[1]])
    assert (left > 0) == wide and (top > 0) == (not wide)
    for target_size, corner in (((32, 32), (0, 3)), ((24, 40), (4, 0))):
        got = read_control(write_one(seen), 0, size, target_size, corner, flip=False)
        want = read_control(expected, 0, size, target_size, corner, flip=False)
        np.testing.assert_allclose(got.astype(int), want.astype(int), atol=4)
        flipped = read_control(write_one(seen), 0, size, target_size, corner, flip=True)
        np.testing.assert_array_equal(flipped, got[:, ::-1])


class One(ImageFolder):
    """One sample with a map."""

    def __init__(self, data: bytes):
        self.data = data

    def name(self, index):
        return "one"

    def condition(self, index):
        return self.data


def write_one(pixels: np.ndarray) -> One:
    return One(encoded(pixels))


def test_a_map_of_the_picture_s_size_is_left_as_it_was_decoded():
    picture = Picture(slope(8, 6), (64, 48), (0.0, 0.0, 7.5, 6.0))
    assert as_of_size(picture, (64, 48)) is picture
    other = as_of_size(picture, (32, 48))
    assert other.size == (32, 48) and other.box == (1.875, 0.0, 5.625, 6.0)


def test_grey_and_transparent_maps_become_srgb():
    grey = One(encoded(slope(64, 80)[..., 0]))
    assert read_control(grey, 0, (64, 80), (16, 16), (0, 0), flip=False).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("data", "reason"), [(None, "its line has no conditioning_image"), (b"torn", "what a ControlNet sees of it: its")]
)
def test_a_sample_without_a_map_or_with_a_broken_one_is_counted_and_another_takes_its_place(
    tmp_path, tokenizers, data, reason
):
    source = write(tmp_path / "set", {3: data})
    store = cached(source, tmp_path / "cache")
    for read in (
        picture_reader(source, tokenizers, CONFIG, target, with_control=True),
        store.reader(source, tokenizers, with_control=True),
    ):
        with pytest.raises(BadSample, match=f"^3.png: {reason}"):
            read(3, np.random.default_rng(0))
        bad = BadItems(N, 0.5)
        order = Order(np.arange(N) % 2, batch_size=4, seed=0, shuffle=True)
        batches = list(itertools.islice(make_stream(order, read, seed=0, num_threads=2, bad=bad), 4))
        assert list(bad.reasons) == ["3.png"] and bad.reasons["3.png"].startswith(reason)
        assert all(len(batch["control"]) == 4 for batch in batches)
    picture_reader(source, tokenizers, CONFIG, target)(3, np.random.default_rng(0))


def test_four_processes_see_what_one_sees(tmp_path, tokenizers):
    source = write(tmp_path / "set", {3: None})
    read = cached(source, tmp_path / "cache").reader(source, tokenizers, with_control=True)
    order = Order(np.arange(N) % 2, batch_size=4, seed=0, shuffle=True)

    def batches(rows: list[int]) -> list[dict[str, np.ndarray]]:
        stream = make_stream(order, read, seed=0, num_threads=2, rows=rows, bad=BadItems(N, 0.5))
        return list(itertools.islice(stream, 5))

    shares = [batches([row]) for row in range(4)]
    for step, batch in enumerate(batches([0, 1, 2, 3])):
        for name in batch:
            np.testing.assert_array_equal(batch[name], np.concatenate([share[step][name] for share in shares]))


def test_batches_have_it_beside_what_is_trained_on(tmp_path, tokenizers):
    source = write(tmp_path / "set")
    fresh = picture_reader(source, tokenizers, CONFIG, target, with_control=True)
    kept = cached(source, tmp_path / "cache").reader(source, tokenizers, with_control=True)
    for read, kind in ((fresh, Batch), (kept, LatentBatch)):
        one = to_batch({name: x[None] for name, x in read(1, np.random.default_rng(0)).items()})
        assert isinstance(one, kind) and one.control is not None
        assert one.control.shape == (1, 24, 40, 3) and one.control.dtype == np.uint8


def test_a_map_is_decoded_no_larger_than_it_is_needed():
    """A JPEG of eight times the size is decoded at an eighth of it."""
    data = encoded(slope(512, 640), "JPEG")
    assert read_picture(data, "a", target=(64, 80)).pixels.shape == (64, 80, 3)
    seen = read_control(One(data), 0, (64, 80), (64, 80), (0, 0), flip=False)
    np.testing.assert_allclose(seen.astype(int), slope(64, 80).astype(int), atol=6)


def test_a_map_of_another_ratio_is_decoded_as_large_as_its_middle_needs():
    """Of a square a quarter lies over a picture four times as wide as high; at an eighth stripes would be grey."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, np.arange(512) // 8 % 2 == 1] = 255
    seen = read_control(One(encoded(stripes, "JPEG")), 0, (64, 256), (64, 64), (0, 96), flip=False)
    assert seen.std() > 100
