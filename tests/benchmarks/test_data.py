import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.benchmarks import data, decoding
from sdxl_eqx.benchmarks.config import DataBenchmark
from sdxl_eqx.benchmarks.data import Workload, measure
from sdxl_eqx.benchmarks.decoding import Decode, psnr
from sdxl_eqx.benchmarks.figures import Figure, table
from sdxl_eqx.benchmarks.jpegs import make_jpegs, noise
from sdxl_eqx.benchmarks.timing import alternated, pinned
from sdxl_eqx.data.batch import LatentBatch, to_batch
from sdxl_eqx.data.pictures import picture_size

ROOT = Path(__file__).resolve().parents[2]
TINY = Workload(
    decodes=(Decode(64, 32, 5.0), Decode(48, 32)),
    pictures=2,
    picture_batches=1,
    hashed_bytes=2**10,
    batch_size=2,
    samples=4,
    latent_side=4,
    context=(77, 8),
    pooled=4,
    cached_batches=2,
    steps=2,
    step_seconds=0.01,
)
HAS_AFFINITY = hasattr(os, "sched_getaffinity")


@pytest.fixture
def run(tmp_path):
    """The JSON of one tiny round."""
    file = tmp_path / "figures.json"

    def figures(**flags) -> dict:
        measure(DataBenchmark(rounds=1, json=str(file), **flags), TINY)
        return json.loads(file.read_text("utf-8"))

    return figures


def test_everything_that_is_asked_for_is_measured_and_written(run):
    values = run()
    assert values.keys() == {"machine", "versions", "photos", "figures"}
    assert values["machine"]["cores"] >= 1 and values["versions"]["simplejpeg"]
    figures = {one["name"]: one for one in values["figures"]}
    asked = {name: one["asked"] for name, one in figures.items()}
    assert asked == {
        "JPEG 64 -> 32, one core": ">= 5x",
        "JPEG 64 -> 32, worst PSNR": ">= 35 dB",
        "JPEG 64 -> 32, median PSNR": "",
        "JPEG 48 -> 32, one core": "",
        "JPEG 48 -> 32, worst PSNR": ">= 35 dB",
        "JPEG 48 -> 32, median PSNR": "",
        "JPEG 64 -> 32, two threads beside one": ">= 1.6x",
        "SHA-256, two threads beside one": "",
        "encoded samples from a cache, two cores": ">= 300 samples/s",
        "of a step of 10 ms waits for 2 of them": "< 1 %",
    }
    for one in figures.values():
        assert one["ours"] > 0 and len(one["rounds"]) == 1
        assert one["unit"] in ("ms", "dB", "samples/s", "%")
        assert (one["ratio"] is None) == (one["baseline"] is None) == (one["baseline_rounds"] == [])
        if one["ratio"] is not None:
            assert one["ratio"] == pytest.approx(one["baseline"] / one["ours"])


def test_a_slower_decoder_shows(run, monkeypatch):
    def slow(read=decoding.read_picture):
        def slow_read(*args, **options):
            time.sleep(0.03)
            return read(*args, **options)

        return slow_read

    monkeypatch.setattr(decoding, "read_picture", slow())
    decode = run()["figures"][0]
    assert decode["ours"] >= 30
    assert decode["ratio"] < 1
    assert decode["reached"] is False


def test_a_less_exact_decoder_shows(run, monkeypatch):
    whole = decoding.resize_and_crop
    monkeypatch.setattr(
        decoding, "resize_and_crop", lambda *args: (whole(*args)[0] // 2, whole(*args)[1])
    )  # half as bright
    worst = run()["figures"][1]
    assert worst["ours"] < 20 and worst["reached"] is False


def test_a_loader_that_keeps_the_step_waiting_shows(run, monkeypatch):
    batches = data.Batches

    class Slow(batches):
        def _read(self):
            time.sleep(0.005)
            return super()._read()

    monkeypatch.setattr(data, "Batches", Slow)
    share = run()["figures"][-1]
    assert share["ours"] >= 50 and share["reached"] is False


def test_the_cache_holds_what_training_reads(tmp_path):
    config = data.DataConfig(resolution=8 * TINY.latent_side)
    contents = data._fill(tmp_path, TINY, config)
    cached = data.Cached(tmp_path, contents)
    assert cached.usable.all()
    sample = cached.reader(data.Jpegs([]), data.bundled_tokenizers())(1, np.random.default_rng(0))
    batch = to_batch({name: array[None] for name, array in sample.items()})
    assert isinstance(batch, LatentBatch)
    assert batch.mean.shape == batch.logvar.shape == (1, 4, 4, 4)
    assert batch.context.shape == (1, 77, 8) and batch.context.dtype == batch.pooled.dtype == "bfloat16"
    np.testing.assert_array_equal(batch.time_ids, [[32, 32, 0, 0, 32, 32]])


@pytest.mark.skipif(not HAS_AFFINITY, reason="this system pins no threads")
def test_pinning_is_undone_also_after_an_error(run):
    before = os.sched_getaffinity(0)
    with pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ZeroDivisionError), pinned(1):
        _ = 1 / 0
    assert os.sched_getaffinity(0) == before
    run()
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not HAS_AFFINITY, reason="this system pins no threads")
def test_decoding_has_one_core(run, monkeypatch):
    seen = set()

    def plain(data, side, plain=decoding.plain):
        seen.add(len(os.sched_getaffinity(0)))
        return plain(data, side)

    monkeypatch.setattr(decoding, "plain", plain)
    run()
    assert seen == {1}


def test_what_is_compared_takes_turns_at_being_first():
    clock = itertools.count(0.0)
    ours, baseline = alternated(lambda: next(clock), lambda: next(clock), 3)
    assert (ours, baseline) == ((0, 3, 4), (1, 2, 5))


def test_a_ratio_is_baseline_through_ours_of_median_rounds():
    one = Figure("a", "ms", (2.0, 50.0, 1.0), (7.0, 8.0, 100.0), least=4.0)
    assert (one.ours, one.baseline, one.ratio, one.reached) == (2.0, 8.0, 4.0, True)
    assert Figure("a", "ms", (2.1,), (8.0,), least=4.0).reached is False
    assert Figure("a", "%", (1.0,), below=1.0).reached is False
    assert Figure("a", "%", (0.9,), below=1.0).reached is True
    assert Figure("a", "dB", (35.0,), least=35.0).reached is True
    assert Figure("a", "dB", (35.0,)).reached is None
    assert Figure("a", "ms", (1.0,), (9.0,), least=4.0, note="means nothing on one core").reached is None


def test_the_table_says_all_of_it():
    figures = [
        Figure("slow", "ms", (8.0,), (4.0,), least=5.0),
        Figure("near", "dB", (41.25,), least=35.0),
        Figure("alone", "ms", (1234.5,), (1234.5,), least=1.6, note="means nothing on one core"),
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(figures).splitlines()]
    assert rows[0] == ["", "ours", "baseline", "ratio", "asked", "reached"]
    assert rows[2] == ["slow", "8.00 ms", "4.00 ms", "0.50x", ">= 5x", "no"]
    assert rows[3] == ["near", "41.2 dB", "", "", ">= 35 dB", "yes"]
    assert rows[4] == ["alone", "1234 ms", "1234 ms", "1.00x", ">= 1.6x", "means nothing on one core"]


def test_psnr_is_that_of_its_definition_and_finite_for_equal_pictures():
    one = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(one, one + 5) == psnr(one + 5, one) == pytest.approx(10 * np.log10(255**2 / 25))
    other = one.copy()
    other[0, 0, 0] += 1
    assert psnr(one, one) == psnr(one, other) == pytest.approx(10 * np.log10(255**2 * 192))


def test_noise_follows_its_seed_and_has_the_spectrum_of_photographs():
    pixels = noise(0, 256)
    np.testing.assert_array_equal(pixels, noise(0, 256))
    assert (pixels != noise(1, 256)).mean() > 0.9
    power = np.abs(np.fft.rfft2(pixels.mean(axis=-1))) ** 2
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None])
    low, high = (power[(f > a) & (f < 2 * a)].mean() for a in (0.02, 0.08))
    assert 2 < np.log2(low / high) / 2 < 2.8  # amplitudes as 1/f ** 1.2


def test_photographs_come_in_every_size(tmp_path, caplog):
    for name, size in (("b.png", (80, 64)), ("a.jpg", (100, 200)), ("c.png", (64, 64))):
        Image.new("RGB", size, (200, 10, 30)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    files = make_jpegs(2, [32, 72], str(tmp_path))
    assert {side: len(found) for side, found in files.items()} == {32: 2, 72: 2}
    for side, found in files.items():
        for one in found:
            assert picture_size(lambda n, one=one: one if n < 0 else one[:n], "a JPEG") == (side, side)
    (warning,) = caplog.messages
    assert "b.png is enlarged for a side of 72" in warning


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"rounds": 0}, "--rounds 0: must be at least 1"),
        ({"json": "/no/such/folder/figures.json"}, "--json /no/such/folder/figures.json: must be a file in a folder"),
        ({"photos": "/no/such/folder"}, "--photos /no/such/folder: must be a folder"),
    ],
)
def test_a_wrong_flag_is_said_before_anything_is_measured(flags, says):
    with pytest.raises(ValueError) as error:
        measure(DataBenchmark(**flags))
    assert says in str(error.value)


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must hold pictures"):
        make_jpegs(1, [32], str(tmp_path))


def test_the_script_has_its_subcommand_and_ends_with_one_message_on_a_wrong_flag():
    ended = subprocess.run(
        [sys.executable, "scripts/benchmark.py", "data", "--rounds", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: --rounds 0: must be at least 1."
