"""Arrays kept on disk by content key, in ArrayRecord shards that are written once and then only read."""

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int, Shaped

Arrays = dict[str, np.ndarray]

SUFFIX = ".array_record"
SHARD = 256 * 2**20
"""Bytes of a shard: what a run that is killed while it writes loses at most."""

KEY = "S32"
"""Keys are the first 128 bits of a SHA-256, in hexadecimal."""

BFLOAT16 = ":bfloat16"
"""Ends the name of an array of bfloat16, which safetensors does not read into NumPy."""

Keys = Shaped[np.ndarray, " _"]
"""Of dtype `KEY`."""


class Store:
    """What the shards of a folder hold. Reads are thread-safe.

    Raises:
        ValueError: a shard is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        paths = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
        self._shards = [self._open(path) for path in paths]
        keys = [self._keys(shard, path) for shard, path in zip(self._shards, paths, strict=True)]
        counts = [len(some) for some in keys]
        joined = np.concatenate(keys) if keys else np.empty(0, KEY)
        self._order = np.argsort(joined, kind="stable")
        self._sorted = joined[self._order]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._sorted)

    def find(self, keys: Keys) -> Int[np.ndarray, " n"]:
        """Where the arrays of each key lie, for `read`; -1 where there are none."""
        if not len(self._sorted):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[at] == keys, self._order[at], -1)

    def read(self, where: int) -> Arrays:
        """The arrays at a place that `find` gave."""
        shard = int(np.searchsorted(self._starts, where, side="right")) - 1
        record = safetensors.numpy.load(self._shards[shard][int(where - self._starts[shard])])
        return {
            name.removesuffix(BFLOAT16): array.view(ml_dtypes.bfloat16) if name.endswith(BFLOAT16) else array
            for name, array in record.items()
        }

    def _open(self, path: Path) -> ArrayRecordDataSource:
        with _damaged(path):
            return ArrayRecordDataSource(str(path))

    def _keys(self, shard: ArrayRecordDataSource, path: Path) -> Keys:
        """The last record of a shard says whose arrays the others are."""
        with _damaged(path):
            keys = safetensors.numpy.load(shard[len(shard) - 1])["keys"].view(KEY).reshape(-1)
            if len(keys) != len(shard) - 1:
                raise ValueError(f"{len(keys)} keys for {len(shard) - 1} records")
            return keys


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the reader's errors on a damaged file have no common class
        raise ValueError(f"{path} is no complete cache ({error}); delete it: what it held is encoded again.") from error


class StoreWriter:
    """Adds arrays to the folder of a store, in shards that appear there when they are whole.

    Several processes may write to one folder. As a context it finishes the last shard, or discards it on an error.

    Raises (in every method):
        OSError: the disk does not take it.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._writer: Any = None
        self._building = folder
        self._keys: list[bytes] = []
        self._bytes = 0

    def add(self, key: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under a key of 32 hexadecimal digits."""
        record = safetensors.numpy.save(dict(_storable(name, array) for name, array in arrays.items()))
        with self._explained():
            writer = self._writer or self._begin()
            writer.write(record)
        self._keys.append(key)
        self._bytes += len(record)
        if self._bytes >= self.shard_bytes:
            self.finish()

    def _begin(self) -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._building = self.folder / f".{uuid.uuid4().hex}.partial"
        self._writer = ArrayRecordWriter(str(self._building), "group_size:1,uncompressed")
        return self._writer

    def finish(self) -> None:
        """Put the shard that is being written where it belongs."""
        if self._writer is None:
            return
        keys = np.array(self._keys, KEY)
        with self._explained():
            self._writer.write(safetensors.numpy.save({"keys": keys.view(np.uint8)}))
            self._writer.close()
        self._writer, self._keys, self._bytes = None, [], 0
        with self._building.open("rb") as file:
            os.fsync(file.fileno())
        self._building.replace(self.folder / f"{self._building.stem[1:]}{SUFFIX}")

    def discard(self) -> None:
        """Remove what is not finished."""
        if self._writer is not None:
            with suppress(RuntimeError):  # of a writer that failed already
                self._writer.close()
            self._building.unlink(missing_ok=True)
            self._writer = None

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What is whole is kept after any error, so that encoding goes on from there."""
        try:
            if kind is None or not issubclass(kind, OSError):
                self.finish()
        finally:
            self.discard()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise OSError(
                f"the cache cannot be written ({error}); free space, or choose another --dataset-save-location."
            ) from error


def key_text(digests: Sequence[str]) -> Keys:
    """Hexadecimal digests as keys."""
    return np.array([digest[:32] for digest in digests], KEY)


def _storable(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    array = np.ascontiguousarray(array)
    return (name + BFLOAT16, array.view(np.uint16)) if array.dtype == ml_dtypes.bfloat16 else (name, array)
