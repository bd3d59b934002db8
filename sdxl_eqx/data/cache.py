"""What the frozen encoders make of each sample, computed once and kept in one ArrayRecord file."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import grain
import numpy as np
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, Float32, Int32, UInt8

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.loader import Arrays, BadItems, Read
from sdxl_eqx.data.sources import ImageFolder
from sdxl_eqx.data.tokenizer import Tokenizers, tokenize
from sdxl_eqx.data.transforms import BadPicture, mirror, read_picture, resize_and_crop

FORMAT = 1
"""Part of the key: raise it when the file's content changes."""

Moments = tuple[Float32[np.ndarray, "b h w c"], Float32[np.ndarray, "b h w c"]]
EncodePictures = Callable[[UInt8[np.ndarray, "b R R 3"]], Moments]
"""sRGB pixels in 0..255 -> mean and logvar of the VAE's posterior, not scaled."""

Text = tuple[Float[np.ndarray, "b s e"], Float[np.ndarray, "b p"]]
EncodeCaptions = Callable[[Int32[np.ndarray, "b 77"], Int32[np.ndarray, "b 77"]], Text]
"""Ids of both tokenizers -> context and pooled text."""


T = TypeVar("T")


@runtime_checkable
class Together(Protocol):
    """How the processes of a run do something: all raise what one of them raises, or says unlike the others."""

    def __call__(self, work: Callable[[], T], says: Callable[[T], Any] = ..., /) -> T:
        """What `work` gives, of which every process `says` the same (JSON)."""
        ...


def alone(work: Callable[[], T], says: Callable[[T], Any] = lambda made: None, /) -> T:
    """As one process does it."""
    return work()


class CachedSource:
    """Random access to cached samples: dictionaries of mean, logvar, context, pooled, time_ids, and of
    mean_flipped, logvar_flipped, time_ids_flipped where pictures may be mirrored. Reads are thread-safe.

    `empty` is the encoded empty prompt: context and pooled, without a batch axis.

    Raises:
        ValueError: the file is damaged or belongs to another key.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        remedy = f"delete {path}, it is written again"
        try:
            self._records = ArrayRecordDataSource(str(path))
            last = safetensors.numpy.load(self._records[len(self._records) - 1])
            found = last.pop("key").tobytes().hex()
        except Exception as error:  # the reader's errors on a damaged file have no common class
            raise ValueError(f"{path} is no complete cache ({error}); {remedy}") from error
        if found != key:
            raise ValueError(f"{path} must hold the cache of key {key}, not of {found}; {remedy}")
        self.empty: Arrays = last

    def __len__(self) -> int:
        return len(self._records) - 1

    def __getitem__(self, index: int) -> Arrays:
        return safetensors.numpy.load(self._records[index])

    def __repr__(self) -> str:
        return f"CachedSource({str(self.path)!r}, {len(self)} samples)"


def cache_key(source: ImageFolder, model_fingerprint: str, config: DataConfig, seed: int) -> str:
    """A hash of all that a cache depends on: every picture's bytes, captions, order, model, crops, seed, format.

    `model_fingerprint` must change with the VAE, the text encoders, their tokenizers and their dtype.
    """
    fields = ("resolution", "center_crop", "random_flip", "max_bad_fraction")
    settings = {name: getattr(config, name) for name in fields}
    head = {"format": FORMAT, "model": model_fingerprint, "seed": seed, "samples": len(source), **settings}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for example in source.examples:
        try:
            with example.path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:  # counted as bad when it is to be encoded
            digest.update(b"unreadable")
        digest.update(hashlib.sha256(example.caption.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def cache_path(folder: Path, key: str) -> Path:
    """Where the cache of a key lies."""
    return folder / f"latents-{key[:16]}.array_record"


def open_cache(folder: Path, key: str) -> CachedSource | None:
    """The complete cache of this very key, or None.

    Raises:
        ValueError: there is one, and it is damaged.
    """
    path = cache_path(folder, key)
    return CachedSource(path, key) if path.is_file() else None


def write_cache(
    source: ImageFolder,
    folder: Path,
    *,
    key: str,
    encode_pictures: EncodePictures,
    encode_captions: EncodeCaptions,
    tokenizers: Tokenizers,
    config: DataConfig,
    seed: int,
    batch_size: int,
    bad: BadItems,
    progress: Callable[[int], None] = lambda written: None,
    is_writer: bool = True,
    together: Together = alone,
) -> None:
    """Encode every sample once, one crop each, drawn from `seed` and the sample's index. All or nothing is written.

    Of several processes that encode together, one `is_writer`; what one of them alone may fail in, reading and
    writing, they do `together`, so that none waits for another that has ended.

    The encoders only ever see `batch_size` samples. `progress` is told after each batch how many samples are written.
    Context and pooled text keep float16, and are float32 otherwise.

    Raises:
        ValueError: too many pictures are bad, as `BadItems` says.
        OSError: the file cannot be written.
    """

    def encode(items: list[Arrays]) -> Iterator[Arrays]:
        padded = items + items[-1:] * (batch_size - len(items))
        inputs = {name: np.stack([item[name] for item in padded]) for name in padded[0]}
        outputs = {"time_ids": inputs["time_ids"]}
        outputs["mean"], outputs["logvar"] = encode_pictures(inputs["pixels"])
        outputs["context"], outputs["pooled"] = encode_captions(inputs["input_ids"], inputs["input_ids_2"])
        if config.random_flip:
            outputs["time_ids_flipped"] = inputs["time_ids_flipped"]
            outputs["mean_flipped"], outputs["logvar_flipped"] = encode_pictures(inputs["pixels_flipped"])
        return ({name: _storable(array[i]) for name, array in outputs.items()} for i in range(len(items)))

    file = together(lambda: _CacheFile(cache_path(folder, key)) if is_writer else None)

    def write(records: Iterable[Arrays]) -> None:
        if file is not None:
            file.write(records)

    try:
        written = 0
        chunks = _chunks(_prepared(source, tokenizers, config, seed, bad), batch_size)
        while chunk := together(lambda: next(chunks, []), lambda chunk: [index for index, _ in chunk]):
            together(partial(write, encode([item for _, item in chunk])))
            written += len(chunk)
            progress(written)
        if not written:
            raise bad.error()
        ids, ids_2 = (tokenize(tokenizer, [""] * batch_size)[0] for tokenizer in tokenizers)
        context, pooled = encode_captions(ids, ids_2)
        last = {"context": _storable(context[0]), "pooled": _storable(pooled[0])}
        last["key"] = np.frombuffer(bytes.fromhex(key), np.uint8)
        together(partial(write, [last]))
        together(lambda: file and file.finish())
    finally:
        if file is not None:
            file.discard()


class _CacheFile:
    """A cache that is being written; there is none before it is finished.

    Raises (in every method):
        OSError: where the disk does not take it.
    """

    def __init__(self, target: Path):
        self.target = target
        self.partial = target.parent / f".{target.stem}-{uuid.uuid4().hex[:8]}.partial"
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self.writer = ArrayRecordWriter(str(self.partial), "group_size:1,zstd:1")

    def write(self, records: Iterable[Arrays]) -> None:
        """Add records."""
        for record in records:
            with self._explained():
                self.writer.write(safetensors.numpy.save(record))

    def finish(self) -> None:
        """Put the file where it belongs."""
        with self._explained():
            self.writer.close()
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        self.partial.replace(self.target)

    def discard(self) -> None:
        """Remove what is not finished."""
        with suppress(RuntimeError):  # of a writer that failed already
            self.writer.close()
        self.partial.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise OSError(
                f"the cache cannot be written ({error}); free space, or choose another --dataset-save-location."
            ) from error


def cached_reader(caption_dropout: float, random_flip: bool, empty: Arrays) -> Read:
    """Reads an item of a `CachedSource` into the fields of a `LatentBatch`, with random flip and caption dropout."""

    def read(item: Arrays, rng: np.random.Generator) -> Arrays:
        suffix = "_flipped" if random_flip and rng.random() < 0.5 else ""
        text = empty if rng.random() < caption_dropout else item
        arrays = {name: item[name + suffix] for name in ("mean", "logvar", "time_ids")}
        return {**arrays, "context": text["context"], "pooled": text["pooled"]}

    return read


def _prepared(
    source: ImageFolder,
    tokenizers: Tokenizers,
    config: DataConfig,
    seed: int,
    bad: BadItems,
) -> Iterator[tuple[int, Arrays]]:
    """Each good sample's index and what the encoders need of it, in order; threads read ahead."""

    def prepare(index: int, example: Any) -> tuple[int, Arrays] | BadPicture:
        try:
            picture = read_picture(example.path)
        except BadPicture as error:
            return error
        rng = np.random.default_rng([seed, index])
        square, time_ids = resize_and_crop(
            picture, config.resolution, center_crop=config.center_crop, flip=False, rng=rng
        )
        item = {"pixels": square, "time_ids": time_ids}
        if config.random_flip:
            item["pixels_flipped"], item["time_ids_flipped"] = mirror(square, time_ids)
        (item["input_ids"],), (item["input_ids_2"],) = (tokenize(t, [example.caption])[0] for t in tokenizers)
        return index, item

    threads = config.transform_images_num_proc
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    for item in grain.MapDataset.source(source).map_with_index(prepare).to_iter_dataset(options):
        if isinstance(item, BadPicture):
            bad.add(item)
        else:
            yield item


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _storable(array: np.ndarray) -> np.ndarray:
    """Contiguous, in a dtype that safetensors reads into NumPy."""
    return np.ascontiguousarray(array, array.dtype if array.dtype in (np.float16, np.float32) else np.float32)
