"""What is encoded once is what the encoders give, and is encoded no second time."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_step import TEXT, TEXT_2, UNET, VAE_CONFIG

from sdxl_eqx.config import DataConfig, DiffusionSchedulerConfig, ModelConfig, RunConfig, TrainConfig
from sdxl_eqx.data.bad import BadItems
from sdxl_eqx.data.buckets import Buckets
from sdxl_eqx.data.cache import Cached, open_stores
from sdxl_eqx.data.pictures import read_picture
from sdxl_eqx.data.store import Arrays, Store, StoreWriter
from sdxl_eqx.data.transforms import mirror, resize_and_crop
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.specs import put
from sdxl_eqx.training import encoding
from sdxl_eqx.training.encoding import Encoding
from sdxl_eqx.training.looking import surveyed
from sdxl_eqx.training.program import Program
from sdxl_eqx.weights.model import Model

N = 10
"""Pictures; those of one shape are encoded by eights."""

SHAPES = ((16, 16), (16, 24))
BUCKET = np.arange(N) % 5 // 4
"""Of ten pictures two take the wide shape."""

CONFIG = TrainConfig(
    run=RunConfig(seed=3),
    model=ModelConfig(activations_dtype="float32"),
    data=DataConfig(train_data_dir="pictures", resolution=16, transform_images_num_proc=2),
)
TOLERANCE = 1e-5


class Pictures:
    """A source in memory: pictures of 20 x 30 pixels, of which some may be torn, with one or two captions each."""

    def __init__(self, torn: tuple[int, ...] = (), headless: tuple[int, ...] = ()):
        self.said = [(f"a {i}",) if i % 2 else (f"a {i}", f"b {i}") for i in range(N)]
        self.files = []
        rng = np.random.default_rng(0)
        for i in range(N):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(file, "PNG")
            data = file.getvalue()
            self.files.append(data[:8] if i in headless else data[:200] if i in torn else data)

    def __len__(self) -> int:
        return N

    def name(self, index: int) -> str:
        return f"{index}.png"

    def captions(self, index: int) -> tuple[str, ...]:
        return self.said[index]

    def picture(self, index: int, limit: int = -1) -> bytes:
        return self.files[index] if limit < 0 else self.files[index][:limit]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Compile without optimization, and each program once."""
    compiled: dict[Any, Any] = {}
    make = Encoding._compiled

    def once(self: Encoding, function: Callable[..., Any], size: int) -> Any:
        key = function, size, self.layout.mesh.size
        if key not in compiled:
            compiled[key] = make(self, function, size)
        return compiled[key]

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoding, "_compiled", once)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def parts() -> ModelParts:
    """The small model of `tiny_step`, without weights."""
    read = ModelParts.read(ModelConfig("asset:tiny-sdxl", train_new_unet=True), DiffusionSchedulerConfig(), token="")
    return dataclasses.replace(read, unet=UNET, vae=VAE_CONFIG, text=TEXT, text_2=TEXT_2, model=Model({}, {}))


@dataclass
class Done:
    """An encoded data set."""

    cached: Cached
    bad: BadItems
    new: tuple[int, int]
    """Pictures and captions that were not there before."""


@dataclass
class Job:
    """Encodes into one folder."""

    folder: Path
    parts: ModelParts
    encoders: Encoders
    config: TrainConfig = CONFIG
    devices: int = 1

    def encoding(self) -> Encoding:
        """The encoders on the devices."""
        program = Program.make(self.config, self.parts, jax.devices()[: self.devices], None)
        laid_out = jax.tree.map(put, self.encoders, program.layout.shardings(self.encoders))
        return Encoding(self.config, program.layout, program.encoding, self.parts, laid_out)

    def __call__(self, source: Any) -> Done:
        """Encode what is missing."""
        before = self.held()
        seen, bad = surveyed(source, self.config.data), BadItems(N, 0.0)
        for failure in seen.bad:
            bad.add(failure)
        of = np.where(seen.counts > 0, BUCKET, -1)
        on_host = hosts.to_host(self.encoders)
        cached = self.encoding().cached(source, self.folder, seen, Buckets(SHAPES, of), bad, on_host=on_host)
        after = self.held()
        return Done(cached, bad, (after[0] - before[0], after[1] - before[1]))

    def held(self) -> tuple[int, int]:
        """Pictures and captions in the folder."""
        pictures, texts = open_stores(self.folder)
        return len(pictures), len(texts)


@pytest.fixture
def job(tmp_path: Path, parts: ModelParts, encoders: Encoders) -> Callable[..., Job]:
    """Makes a job of a folder of its own with a changed config of data."""

    def make(devices: int = 1, **data: Any) -> Job:
        changed = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **data))
        return Job(tmp_path / "cache", parts, encoders, changed, devices)

    return make


@jax.jit
def moments(encoders: Encoders, pixels: Any) -> dict[str, Any]:
    """The posterior of pictures in 0..255."""
    found = encoders.vae.encode(pixels.astype(jnp.float32) / 127.5 - 1)
    return {"mean": found.mean, "logvar": found.logvar}


embeddings = jax.jit(Encoders.encode_text)


def read(store: Store, keys: Any) -> list[Arrays]:
    """What a store has under these keys, all of which must be there."""
    where = store.find(keys)
    assert (where >= 0).all()
    return [store.read(int(i)) for i in where]


def files(folder: Path) -> set[Path]:
    """All that lie in a cache."""
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("devices", [1, 8])
def test_pictures_are_cached_as_the_encoder_gives_their_crop_and_its_mirror_image(devices, job, encoders):
    source = Pictures()
    made = job(devices, random_flip=True)
    done = made(source)
    assert done.new[0] == 2 * N and done.cached.usable.all() and done.bad.count == 0
    found = read(open_stores(made.folder)[0], done.cached.contents.pictures)
    for b, target in enumerate(SHAPES):
        crops = []
        samples = [i for i in range(N) if BUCKET[i] == b]
        for i in samples:
            top, left = (int(x) for x in found[i]["time_ids"][2:4])
            picture = read_picture(source.picture(i), source.name(i), target=target)
            crops.append(resize_and_crop(picture, target, (top, left)))
        crops += [mirror(*crop) for crop in crops]
        wanted = moments(encoders, np.stack([pixels for pixels, _ in crops]))
        for row, i in enumerate([*samples, *(i + N for i in samples)]):
            np.testing.assert_array_equal(found[i].pop("time_ids"), crops[row][1], strict=True)
            for name, array in wanted.items():
                np.testing.assert_allclose(found[i].pop(name), array[row], atol=TOLERANCE, strict=True)
            assert not found[i]


@pytest.mark.parametrize("devices", [1, 8])
def test_captions_and_the_empty_prompt_are_cached_as_the_encoders_give_them(devices, job, parts, encoders):
    source = Pictures()
    made = job(devices)
    done = made(source)
    said = [*(caption for one in source.said for caption in one), ""]
    assert done.new[1] == len(said) == len(done.cached.contents.text)
    context, pooled = embeddings(encoders, *map(jnp.asarray, parts.tokenize(said)))
    empty = made.encoding().empty()
    for i, found in enumerate(read(open_stores(made.folder)[1], done.cached.contents.text)):
        for name, array in (("context", context[i]), ("pooled", pooled[i])):
            if said[i] == "":
                np.testing.assert_allclose(empty[name], array, atol=TOLERANCE, strict=True)
            np.testing.assert_allclose(found.pop(name), array, atol=TOLERANCE, strict=True)
        assert not found


def test_a_second_run_encodes_nothing_and_says_nothing_of_it(job, caplog):
    with caplog.at_level("INFO", "sdxl_eqx"):
        job()(Pictures())
        said = [message for message in caplog.messages if message.startswith("encod")]
        assert said[0] == f"encoding {N} pictures and 16 captions once, into {job().folder}"
        assert said[1].endswith(f"{N} samples are ready") and len(said) == 2
        before = files(job().folder)
        caplog.clear()
        again = job(devices=8)(Pictures())
    assert again.new == (0, 0) and again.cached.usable.all()
    assert files(job().folder) == before
    assert not [message for message in caplog.messages if message.startswith("encod")]


def test_a_changed_caption_encodes_that_caption_alone(job):
    source = Pictures()
    was = job()(source).cached.contents
    source.said[4] = ("a 4", "another")
    done = job()(source)
    assert done.new == (0, 1) and done.cached.usable.all()
    changed = np.flatnonzero(was.text != done.cached.contents.text)
    assert changed.tolist() == [7]  # two captions of every even sample before it, one of every odd one


def test_another_vae_encodes_all_pictures_and_no_caption_and_other_text_encoders_the_captions_alone(job, encoders):
    job()(Pictures())
    other = job()
    other.encoders = dataclasses.replace(encoders, vae=jax.tree.map(lambda x: 1.01 * x, encoders.vae))
    assert other(Pictures()).new == (N, 0)
    other.encoders = dataclasses.replace(encoders, text_encoder_2=jax.tree.map(lambda x: -x, encoders.text_encoder_2))
    assert other(Pictures()).new == (0, 16)
    assert job()(Pictures()).new == (0, 0)  # what was there is there still


def test_in_another_dtype_the_captions_are_encoded_again_and_kept_in_it(job):
    job()(Pictures())
    other = job()
    other.config = dataclasses.replace(other.config, model=ModelConfig(activations_dtype="bfloat16"))
    done = other(Pictures())
    assert done.new == (0, 16)
    (found,) = read(open_stores(other.folder)[1], done.cached.contents.text[-1:])
    assert {array.dtype.name for array in found.values()} == {"bfloat16"}


def test_where_captions_change_latents_alone_are_encoded_and_the_log_says_why(job, caplog):
    with caplog.at_level("INFO", "sdxl_eqx"):
        done = job(caption_shuffle=True)(Pictures())
    assert done.new == (N, 0) and done.cached.usable.all()
    assert "latents alone: captions change from visit to visit" in caplog.text


def test_pictures_that_cannot_be_used_are_counted_once_named_and_left_out(job, caplog):
    """One without a header, which the survey finds, and two whose header is whole."""
    source = Pictures(torn=(4, 7), headless=(2,))
    made = job(random_flip=True)
    with caplog.at_level("WARNING", "sdxl_eqx"):
        done = made(source)
    assert set(done.bad.reasons) == {"2.png", "4.png", "7.png"} and len(caplog.messages) == 3
    assert done.new[0] == 2 * (N - 3)
    assert np.flatnonzero(~done.cached.usable).tolist() == [2, 4, 7]
    again = made(source)  # they are tried again, and counted again
    assert again.new == (0, 0) and set(again.bad.reasons) == set(done.bad.reasons)


def test_too_many_bad_pictures_end_encoding_as_soon_as_they_are_met_with_the_remedy(job, monkeypatch):
    chunks = []
    monkeypatch.setattr(encoding, "_write_pictures", lambda *args: chunks.append(args))
    with pytest.raises(ValueError, match=r"10 of 10 samples cannot be used.*--max-bad-fraction"):
        job()(Pictures(torn=tuple(range(N))))
    assert len(chunks) == 1  # not that of the tenth


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_encoding_that_was_interrupted_keeps_what_it_had_and_goes_on_from_there(error, job, monkeypatch):
    made, source = job(), Pictures()
    calls = []

    def write(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error("now")
        write_pictures(*args)

    write_pictures = encoding._write_pictures
    monkeypatch.setattr(encoding, "_write_pictures", write)
    with pytest.raises(error, match="now"):
        made(source)
    assert made.held() == (8, 0)  # the first shape
    monkeypatch.setattr(encoding, "_write_pictures", write_pictures)
    done = made(source)
    assert done.new == (N - 8, 16) and done.cached.usable.all()
    assert not list(made.folder.rglob("*.partial"))


def test_a_full_disk_costs_the_shard_that_was_being_written_alone(job, monkeypatch):
    made, source, real = job(), Pictures(), StoreWriter.add
    written = []

    def add(self: StoreWriter, key: bytes, arrays: Any) -> None:
        self.shard_bytes = 3000  # a few pictures
        if len(written) == 7:
            raise OSError("no space left")
        real(self, key, arrays)
        written.append(key)

    monkeypatch.setattr(StoreWriter, "add", add)
    with pytest.raises(OSError, match="no space left"):
        made(source)
    kept, _ = made.held()
    assert 0 < kept < 7 and not list(made.folder.rglob("*.partial"))
    monkeypatch.setattr(StoreWriter, "add", real)
    done = made(source)
    assert done.new == (N - kept, 16) and done.cached.usable.all()


def test_a_process_that_does_not_see_what_another_one_encoded_says_so(job, monkeypatch):
    """As on hosts with a folder of their own each."""
    made = job()

    def write(writer: Any, contents: Any, chunk: Any, *rest: Any) -> None:
        """Of the other shape alone."""
        if 0 not in chunk:
            write_pictures(writer, contents, chunk, *rest)

    write_pictures = encoding._write_pictures
    monkeypatch.setattr(encoding, "_write_pictures", write)
    with pytest.raises(ValueError, match=r"another process encoded 0\.png.*share --dataset-save-location"):
        made(Pictures())
