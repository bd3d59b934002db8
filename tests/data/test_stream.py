"""Batches of pictures from a folder: the same pixels, sizes and captions however many hosts and threads read them, and
wherever they were interrupted."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.bad import BadItems
from sdxl_eqx.data.batch import Batch, to_batch
from sdxl_eqx.data.buckets import Buckets, choose_buckets
from sdxl_eqx.data.loader import make_stream, picture_reader, position
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.pictures import read_picture, scaled_size
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.survey import survey
from sdxl_eqx.data.tokenizer import Tokenizers, bundled_tokenizers, tokenize
from sdxl_eqx.data.transforms import mirror, resize_and_crop

CONFIG = DataConfig(resolution=128, random_flip=True, caption_dropout=0.3)
N = 22
"""Pictures, of which no batch ends an epoch."""

BATCH, SEED = 8, 5
BROKEN = (3, 16)
"""Pictures whose header alone is whole: found out when they are read for a batch."""

ROWS = {
    "one": [range(8)],
    "four": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "four, mixed": [[0, 4], [1, 5], [2, 6], [3, 7]],
}
STEPS = 9
"""Batches of somewhat more than three epochs."""


@dataclass(frozen=True)
class Data:
    """A folder of pictures in buckets, and what reads it."""

    source: ImageFolder
    sizes: list[tuple[int, int]]
    """(height, width) of each picture."""
    buckets: Buckets
    tokenizers: Tokenizers

    def batches(
        self, count: int, *, rows: Sequence[int] = ROWS["one"][0], threads: int = 2, start: int = 0,
        bad: BadItems | None = None,
    ) -> list[Batch]:  # fmt: skip
        """So many batches of a new process, from batch `start` on."""
        order = Order(self.buckets.of, batch_size=BATCH, seed=SEED, shuffle=True)
        read = picture_reader(self.source, self.tokenizers, CONFIG, lambda i: self.buckets.shapes[self.buckets.of[i]])
        bad = bad or BadItems(N, 0.5)
        stream = make_stream(order, read, seed=SEED, num_threads=threads, rows=rows, bad=bad)
        if start:
            stream.set_state(position(start, len(rows)))
        batches = [to_batch(arrays) for arrays in itertools.islice(stream, count)]
        pictures = [batch for batch in batches if isinstance(batch, Batch)]
        assert len(pictures) == count
        return pictures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Pictures of three forms, no two of one size, each with two captions."""
    folder: Path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(N):
        h, w = ((130 + i, 70 + i), (66 + i, 140 + i), (128 + i, 150 - i))[i % 3]
        coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
        file = folder / f"{i:02d}.png"
        coarse.resize((w, h), Image.Resampling.BICUBIC).save(file)
        if i in BROKEN:
            file.write_bytes(file.read_bytes()[:1000])
        lines.append(json.dumps({"file_name": file.name, "text": [f"a cat, number {i}", f"number {i}, a dog, a hat"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    source = ImageFolder(str(folder))
    seen = survey(source, range(N), digests=False, num_threads=2)
    sizes = [(h, w) for h, w in seen.sizes.tolist()]
    assert not seen.bad and len(set(sizes)) == N
    return Data(source, sizes, choose_buckets(seen.sizes, 128, count=3, upscale=False), bundled_tokenizers())


@pytest.fixture(scope="module")
def alone(data: Data) -> list[Batch]:
    """What one host reads without an interruption."""
    return data.batches(STEPS)


def fields(batch: Batch) -> dict[str, np.ndarray]:
    """Its arrays by their names."""
    return {name: np.asarray(array) for name, array in vars(batch).items() if array is not None}


def assert_same(batches: Sequence[Batch], others: Sequence[Batch]) -> None:
    """That two hosts gave the same, bit for bit."""
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name, array in fields(batch).items():
            np.testing.assert_array_equal(array, fields(other)[name], err_msg=name, strict=True)


def joined(shares: Sequence[list[Batch]], rows: Sequence[Sequence[int]]) -> list[Batch]:
    """The batches of all devices, from the rows of each host."""
    place = np.argsort(np.concatenate(rows))
    return [
        Batch(**{name: np.concatenate([fields(part)[name] for part in parts])[place] for name in fields(parts[0])})
        for parts in zip(*shares, strict=True)
    ]


def test_batches_are_of_one_shape_each_and_of_several_in_all(data, alone):
    assert len(data.buckets.shapes) == 3
    shapes = [np.shape(batch.pixels) for batch in alone]
    assert {(h, w) for _, h, w, _ in shapes} == set(data.buckets.shapes)
    assert all((b, c) == (BATCH, 3) for b, _, _, c in shapes)


def test_every_row_is_the_crop_that_its_time_ids_say_of_a_picture_with_one_of_its_captions_or_none(data, alone):
    """Sizes tell pictures apart, so that each row is checked against a reading of its file by itself."""
    flips, dropped, visited = set(), 0, set()
    for batch in map(fields, alone):
        for pixels, time_ids, ids, ids_2 in zip(
            batch["pixels"], batch["time_ids"], batch["input_ids"], batch["input_ids_2"], strict=True
        ):
            h, w, top, left, H, W = map(int, time_ids)
            sample = data.sizes.index((h, w))
            visited.add(sample)
            assert (H, W) == pixels.shape[:2] == data.buckets.shapes[data.buckets.of[sample]]
            picture = read_picture(data.source.picture(sample), data.source.name(sample), target=(H, W))
            as_it_is = resize_and_crop(picture, (H, W), (top, left))
            mirrored = mirror(*resize_and_crop(picture, (H, W), (top, scaled_size((h, w), (H, W))[1] - W - left)))
            flip = not np.array_equal(as_it_is[0], pixels)
            flips.add(flip)
            for found, wanted in zip((pixels, time_ids), mirrored if flip else as_it_is, strict=True):
                np.testing.assert_array_equal(found, wanted, strict=True)
            said = ["", *data.source.captions(sample)]
            first, second = (tokenize(tokenizer, said, 1)[0].tolist() for tokenizer in data.tokenizers)
            assert first.index(ids.tolist()) == second.index(ids_2.tolist())
            dropped += first.index(ids.tolist()) == 0
    assert flips == {False, True} and 0.15 < dropped / (STEPS * BATCH) < 0.45
    assert visited == set(range(N)) - set(BROKEN)


@pytest.mark.parametrize("hosts", ["four", "four, mixed"])
def test_the_rows_of_four_hosts_are_together_the_batches_of_one(data, alone, hosts):
    rows = ROWS[hosts]
    assert_same(joined([data.batches(STEPS, rows=own) for own in rows], rows), alone)


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_any_number_of_threads_reads_the_same(data, alone, threads):
    assert_same(data.batches(STEPS, threads=threads), alone)


@pytest.mark.parametrize("start", [1, 4, 7])
def test_a_stream_goes_on_within_an_epoch_as_if_never_interrupted(data, alone, start):
    assert start * BATCH % N
    assert_same(data.batches(STEPS - start, start=start, threads=3), alone[start:])


def test_four_hosts_go_on_where_one_stopped(data, alone):
    rows = ROWS["four"]
    shares = [data.batches(STEPS - 4, rows=own, start=4, threads=1) for own in rows]
    assert_same(joined(shares, rows), alone[4:])


def test_what_cannot_be_read_is_named_once_and_replaced_by_a_picture_of_the_same_shape(data):
    bad = BadItems(N, 0.5)
    batches = data.batches(STEPS, bad=bad)
    assert set(bad.reasons) == {data.source.name(i) for i in BROKEN}
    assert all(len(np.asarray(batch.pixels)) == BATCH for batch in batches)
