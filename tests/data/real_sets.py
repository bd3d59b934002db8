"""Real data sets through the trainer's own data path: every kind of source alike, and crops that are where they say.

    python tests/data/real_sets.py FOLDER

needs npm, apt-get (Debian, after `apt-get update`) and dpkg-deb, 180 MB from their registries the first time, and
600 MB in FOLDER; everything is fetched and unpacked there, and stays for the next time. It draws FOLDER/page.png and
ends with exit code 1 where something is not as it should be.

1. 1,852 emoji (npm: @lobehub/fluent-emoji-3d, MIT, named by unicode-emoji-json, MIT) at 256 pixels, written as each
   kind of data set: all of them must give the same epoch of batches, by digest.
2. The stamps of Tux Paint (Debian: tuxpaint-stamps-default, GPL-2), photos and drawings of all sizes with a text
   beside each, in aspect-ratio buckets: every picture that is fed must be what its time_ids say, cut out of the
   original here in the plainest way. The page shows some of them, and in the original the crop that the time_ids name.
"""

import argparse
import hashlib
import io
import itertools
import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
from fetched_sets import emoji, over_white, stamps
from PIL import Image, ImageDraw, ImageFont
from sources.written_sets import FORMATS

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.bad import BadItems, BadSample
from sdxl_eqx.data.buckets import Buckets
from sdxl_eqx.data.captions import Visit
from sdxl_eqx.data.loader import make_stream, picture_reader
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.open import open_source
from sdxl_eqx.data.tokenizer import bundled_tokenizers
from sdxl_eqx.training.looking import sorted_into_buckets, surveyed

COUNT = 1852
"""Emoji that both packages have; each has a caption of its own."""

SEED = 3
RESOLUTION = 256
BATCH = 32
SHAPE = (192, 256)
"""(height, width) that the square emoji are cropped to, so that there is something to draw."""

ALIKE = 1.0
"""Mean of |difference| of pixels, of 255, up to which a crop is the one that its time_ids name. Cropping after scaling
and scaling the crop alone differ by their roundings."""

CELL = (640, 400)
"""(width, height) of a sample on the page, in pixels."""

ON_PAGE = 12
"""Samples on the page of each kind of bucket."""


class NoBad(BadItems):
    """Allows none: another sample would take the place of a bad one."""

    def add(self, bad: BadSample) -> None:
        """Raises: BadSample."""
        raise bad


@dataclass(frozen=True)
class Fed:
    """A sample as the trainer gets it."""

    index: int
    pixels: np.ndarray
    time_ids: np.ndarray
    is_mirrored: bool


@dataclass(frozen=True)
class Crop:
    """What `time_ids` say, in numbers of Python."""

    size: tuple[int, int]
    """Of the original; like the others (height, width)."""
    scaled: tuple[int, int]
    corner: tuple[int, int]
    """(top, left) in the scaled picture."""
    target: tuple[int, int]

    @classmethod
    def of(cls, time_ids: np.ndarray) -> "Crop":
        """Scaled just so much that it covers the target."""
        h, w, top, left, H, W = (int(value) for value in time_ids)
        scale = max(H / h, W / w)
        return cls((h, w), (max(H, round(h * scale)), max(W, round(w * scale))), (top, left), (H, W))

    def box(self, *, is_mirrored: bool) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in the pixels of the original as it is."""
        (h, w), (scaled_h, scaled_w), (top, left), (H, W) = self.size, self.scaled, self.corner, self.target
        if is_mirrored:
            left = scaled_w - W - left
        return left * w / scaled_w, top * h / scaled_h, (left + W) * w / scaled_w, (top + H) * h / scaled_h

    def cut(self, original: Image.Image, *, is_mirrored: bool, shift: int = 0) -> np.ndarray:
        """The pixels from the original: mirrored whole, scaled whole, then cropped, `shift` pixels aside."""
        if is_mirrored:
            original = original.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scaled = np.asarray(original.resize((self.scaled[1], self.scaled[0]), Image.Resampling.LANCZOS))
        (top, left), (H, W) = self.corner, self.target
        vertical = self.scaled[0] > H
        return np.roll(scaled, shift, axis=0 if vertical else 1)[top : top + H, left : left + W]


def data_config(place: Path, **options: Any) -> DataConfig:
    """The flags of all the data sets here."""
    return DataConfig(
        train_data_dir=str(place), resolution=RESOLUTION, random_flip=True, cache_latents_text_encoder_outputs=False,
        **options,
    )  # fmt: skip


def opened(data: DataConfig) -> Source:
    """The pictures of a data set."""

    def no_latents(paths: Sequence[Path]) -> Any:
        raise RuntimeError(f"{paths} hold pictures, not latents")

    return open_source(data, seed=SEED, token="", latents=no_latents)  # pyright: ignore[reportReturnType]


def batches(source: Source, data: DataConfig, buckets: Buckets, order: Order) -> Iterator[dict[str, np.ndarray]]:
    """The stream of a run, as the trainer makes it; no sample may be bad."""
    read = picture_reader(source, bundled_tokenizers(), data, lambda sample: buckets.shapes[buckets.of[sample]])
    bad = NoBad(len(source), 0.0)
    return make_stream(order, read, seed=SEED, num_threads=data.transform_images_num_proc, bad=bad)


def same_stream(folder: Path) -> bool:
    """Whether an epoch of the emoji is the same from each kind of data set."""
    began = time.perf_counter()
    samples = emoji(folder)
    captions = {one.captions for one in samples}
    size = sum(len(one.data) for one in samples)
    print(f"{len(samples)} emoji, {len(captions)} captions, {size / 1e6:.1f} MB, {time.perf_counter() - began:.1f} s")
    digests: dict[str, list[str]] = {}
    is_whole = len(captions) == COUNT
    for kind, write in FORMATS.items():
        place = folder / f"emoji-{kind}"
        if not place.exists():
            building = folder / f".emoji-{kind}"
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            write(building, samples, 5)
            building.rename(place)
        began = time.perf_counter()
        data = data_config(place)
        source = opened(data)
        opening = time.perf_counter() - began
        buckets = Buckets((SHAPE,), np.zeros(len(source), np.int16))
        stream = batches(source, data, buckets, Order(buckets.of, batch_size=BATCH, seed=SEED, shuffle=True))
        found = [next(stream)]  # threads and tokenizers are there after it
        count = -(-len(source) // BATCH) - 1
        began = time.perf_counter()
        found += itertools.islice(stream, count)
        seconds = time.perf_counter() - began
        digests[kind] = [digest(arrays) for arrays in found]
        seen = len({ids.tobytes() for arrays in found for ids in arrays["input_ids"]})
        corners = len({tuple(ids[2:4]) for arrays in found for ids in arrays["time_ids"]})
        is_whole = is_whole and seen == len(source) == COUNT
        print(
            f"{kind:12s} {type(source).__name__:12s} {len(source)} samples, opened in {opening:.2f} s, {count} batches "
            f"of {BATCH} in {seconds:.2f} s, {count * BATCH / seconds:.0f} samples/s, {seen} captions, {corners} "
            f"corners, digest {hashlib.sha256(''.join(digests[kind]).encode()).hexdigest()[:16]}",
            flush=True,
        )
    return is_whole and len({tuple(each) for each in digests.values()}) == 1


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Of the fields of a batch, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()


def true_crops(folder: Path) -> bool:
    """Whether every stamp is fed as its time_ids say, with and without enlarging; draws the page."""
    place = stamps(folder)
    cells, shown, is_right = [], set[int](), True
    for upscale in (False, True):
        data = data_config(place, aspect_ratio_buckets=True, bucket_upscale=upscale)
        source = opened(data)
        bad = BadItems(len(source), 0.5)
        looked = surveyed(source, data)
        for failure in looked.bad:
            bad.add(failure)
        buckets = sorted_into_buckets(source, looked, data, bad)
        usable = int((buckets.of >= 0).sum())
        print(
            f"{len(source)} stamps, bucket_upscale {upscale}: {len(looked.bad)} cannot be read, "
            f"{len(source) - usable - len(looked.bad)} are too small\n{buckets.describe(4)}"
        )
        fed = list(visits(source, data, buckets))
        right = [check(source, one) for one in fed]
        print(report(fed, right, usable), flush=True)
        is_right = is_right and all(ok for ok, _ in right) and len({one.index for one in fed}) == usable
        picked = chosen(fed, buckets, shown)
        shown |= {fed[i].index for i in picked}
        cells += [cell(source, fed[i], upscale) for i in picked]
    columns = 4
    page = Image.new("RGB", (columns * CELL[0], -(-len(cells) // columns) * CELL[1]), "white")
    for i, one in enumerate(cells):
        page.paste(one, (i % columns * CELL[0], i // columns * CELL[1]))
    page.save(folder / "page.png")
    print(f"{len(cells)} samples on {folder / 'page.png'}")
    return is_right


def visits(source: Source, data: DataConfig, buckets: Buckets) -> Iterator[Fed]:
    """Three epochs, less up to three samples of each bucket, which the next epoch begins with."""
    order = Order(buckets.of, batch_size=4, seed=SEED, shuffle=True)
    stream = batches(source, data, buckets, order)
    for i in range(order.batches_in(3)):
        arrays, ordered = next(stream), order.batch(i)
        for row, (sample, epoch) in enumerate(zip(ordered.samples.tolist(), ordered.epochs.tolist(), strict=True)):
            visit = Visit.draw(data, np.random.default_rng([SEED, sample, epoch]))
            yield Fed(sample, arrays["pixels"][row], arrays["time_ids"][row], visit.flip)


def original(source: Source, index: int) -> Image.Image:
    """The picture in the file."""
    return over_white(Image.open(io.BytesIO(source.picture(index))))


def check(source: Source, fed: Fed) -> tuple[bool, list[float]]:
    """Whether a sample is the crop of its time_ids, and its difference to that, to the same two pixels aside (where
    the picture goes on), and to the same not mirrored (where it is)."""
    crop, whole = Crop.of(fed.time_ids), original(source, fed.index)
    room = [scaled - side for scaled, side in zip(crop.scaled, crop.target, strict=True)]
    inside = all(0 <= at <= most for at, most in zip(crop.corner, room, strict=True))
    if not inside or crop.size != (whole.height, whole.width) or crop.target != fed.pixels.shape[:2]:
        return False, [255.0, 255.0, 255.0]

    def difference(*, is_mirrored: bool, shift: int = 0) -> float:
        wanted = crop.cut(whole, is_mirrored=is_mirrored, shift=shift)
        return float(np.abs(wanted.astype(float) - fed.pixels).mean())

    own = difference(is_mirrored=fed.is_mirrored)
    others = [difference(is_mirrored=fed.is_mirrored, shift=2), difference(is_mirrored=not fed.is_mirrored)]
    return own <= ALIKE, [own, *others]


def report(fed: Sequence[Fed], right: Sequence[tuple[bool, list[float]]], usable: int) -> str:
    """Figures of all samples."""
    own, shifted, other = np.array([differences for _, differences in right]).T
    mirrored = np.array([one.is_mirrored for one in fed])
    moved = sum(any(Crop.of(one.time_ids).corner) for one in fed)
    wrong = sorted({one.index for one, (ok, _) in zip(fed, right, strict=True) if not ok})
    return (
        f"{len(fed)} visits to {len({one.index for one in fed})} of {usable} samples, {mirrored.mean():.1%} mirrored, "
        f"{moved} cropped away from the corner: {sum(ok for ok, _ in right)} are what their time_ids say (difference "
        f"{np.median(own):.3f}, at most {own.max():.3f}; two pixels aside {np.median(shifted):.1f}, more than its own "
        f"in {(shifted > own).mean():.1%}; mirrored the other way {np.median(other):.1f}, more in "
        f"{(other > own).mean():.1%}){f'; WRONG: {wrong[:9]}' if wrong else ''}"
    )


def chosen(fed: Sequence[Fed], buckets: Buckets, shown: set[int]) -> list[int]:
    """Some visits of different samples in turn of every bucket, those first that lose most, half of them mirrored."""
    rest = [i for i in range(len(fed)) if fed[i].index not in shown]
    lost = [-np.prod(Crop.of(one.time_ids).target) / np.prod(Crop.of(one.time_ids).scaled) for one in fed]
    found: list[int] = []
    for number in itertools.count():
        shape = buckets.shapes[number // 2 % len(buckets.shapes)]
        taken = {fed[i].index for i in found}
        fits = [i for i in rest if fed[i].pixels.shape[:2] == shape and fed[i].index not in taken
                and fed[i].is_mirrored == bool(number % 2)]  # fmt: skip
        if fits:
            found.append(max(fits, key=lambda i: lost[i]))
        if len(found) == ON_PAGE or number > 40 * ON_PAGE:
            return found
    raise AssertionError("the count never ends")


def cell(source: Source, fed: Fed, upscale: bool) -> Image.Image:
    """The original with the crop drawn into it, what is fed beside it, and what is said of it beneath."""
    crop, whole = Crop.of(fed.time_ids), original(source, fed.index)
    picture = Image.new("RGB", CELL, "#dddddd")
    draw = ImageDraw.Draw(picture)
    side = 290
    scale = min(side / whole.width, side / whole.height)
    shown = whole.resize((max(1, round(whole.width * scale)), max(1, round(whole.height * scale))))
    picture.paste(shown, (15, 15))
    left, top, right, bottom = (15 + scale * value for value in crop.box(is_mirrored=fed.is_mirrored))
    draw.rectangle((left, top, right, bottom), outline="red", width=3)
    given = Image.fromarray(fed.pixels)
    scale = min(1.0, side / given.width, side / given.height)
    picture.paste(given.resize((round(given.width * scale), round(given.height * scale))), (330, 15))
    (H, W), (h, w), (at_top, at_left) = crop.target, crop.size, crop.corner
    lines = textwrap.wrap(source.captions(fed.index)[0], 70)[:2]
    lines.append(f"bucket {H} x {W}, upscale {upscale}, {'MIRRORED' if fed.is_mirrored else 'not mirrored'}")
    lines.append(f"time_ids: original {h} x {w}, crop top {at_top} left {at_left}, target {H} x {W}")
    for i, line in enumerate(lines):
        draw.text((15, 315 + 20 * i), line, fill="black", font=ImageFont.load_default(16))
    return picture


def main() -> int:
    """Both sets; exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets-cache"
    datasets.disable_progress_bars()
    logging.getLogger("sdxl_eqx").setLevel(logging.ERROR)  # a line for each picture that is too small
    is_same, is_true = same_stream(folder), true_crops(folder)
    print(f"one stream: {is_same}; true time_ids: {is_true}")
    return 0 if is_same and is_true else 1


if __name__ == "__main__":
    sys.exit(main())
