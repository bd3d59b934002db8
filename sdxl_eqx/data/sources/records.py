"""Files of records: ArrayRecords of pictures and captions, and random access to TFRecords through an index."""

import logging
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import google_crc32c
import numpy as np
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from safetensors import SafetensorError

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources.examples import parse_example
from sdxl_eqx.data.sources.files import cache_name, whole_file
from sdxl_eqx.data.sources.source import Conditioned, texts, texts_or

INDEX_FORMAT = 1
"""Part of what an index must hold to be used: raise it when that changes."""

logger = logging.getLogger("sdxl_eqx")


class Shards:
    """Which file a sample lies in, of files that follow one another; as many samples as they hold, or `max_samples`.

    Raises:
        ValueError: there are no samples.
    """

    def __init__(self, paths: Sequence[str | Path], counts: Sequence[int], max_samples: int = -1):
        self.paths = [Path(path) for path in paths]
        self._ends = list(accumulate(counts))
        total = self._ends[-1] if self._ends else 0
        self.count = total if max_samples < 0 else min(total, max_samples)
        if not self.count:
            named = f" in {self.paths[0]}" if len(self.paths) == 1 else f" in {len(self.paths)} files"
            raise ValueError(f"there are no records{named}; give files that hold some with --train-data-dir")

    def find(self, index: int) -> tuple[int, int]:
        """The file, and the sample's place in it.

        Raises:
            IndexError: there are fewer samples.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def name(self, index: int) -> str:
        """The record and its file, for people; records count from 0."""
        file, place = self.find(index)
        return f"record {place} of {self.paths[file]}"


class ArrayRecords(Conditioned):
    """ArrayRecord files whose records are tf.train.Examples, one file after the other.

    The image feature holds the bytes of a picture's file, the caption feature one or more captions (see `texts`), the
    feature `condition_column`, if it is not '', what a ControlNet sees. The first record tells whether they are there.
    A record is one piece: a caption or a header costs reading all of it. `caption` is that of records that have none;
    where it is '' these are bad samples.

    Raises:
        ValueError: a file is none of this kind, there are no records, or the first one lacks a feature.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        image_column: str,
        caption_column: str,
        condition_column: str = "",
        caption: str = "",
        max_samples: int = -1,
    ):
        self.image_column = image_column
        self.condition_column = condition_column
        self._caption = caption
        self.caption_column = caption_column
        self._files = [_open_array_record(path) for path in paths]
        self._shards = Shards(paths, [len(file) for file in self._files], max_samples)
        try:
            first = self._features(0)
        except BadSample as error:
            raise ValueError(f"{error}. --dataset-type arrayrecord reads records that are tf.train.Examples") from error
        columns = [("image", image_column), ("caption", "" if caption else caption_column)]
        for flag, column in [*columns, ("conditioning-image", condition_column)]:
            if column and not isinstance(first.get(column), list):
                have = ", ".join(sorted(first)) or "none"
                raise ValueError(
                    f"{self.name(0)} has no feature {column!r} of bytes (features: {have}); "
                    f"--{flag}-column names the one to read"
                )

    def __len__(self) -> int:
        return self._shards.count

    def __repr__(self) -> str:
        return f"ArrayRecords({len(self._files)} files, {len(self)} samples)"

    def name(self, index: int) -> str:
        """The record and its file; records count from 0."""
        return self._shards.name(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of all values of the caption feature.

        Raises:
            BadSample: it cannot be read, or has none.
        """
        try:
            values = self._values(index, self.caption_column, [self._caption.encode()] if self._caption else None)
            return texts_or([text for value in values for text in texts(value)], self._caption)
        except UnicodeDecodeError as error:
            raise BadSample(self.name(index), f"its caption is no UTF-8 ({error})") from error

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The first value of the image feature, or its first `limit` bytes.

        Raises:
            BadSample: it cannot be read, or has none.
        """
        data = self._values(index, self.image_column)[0]
        return data if limit < 0 else data[:limit]

    def condition(self, index: int) -> bytes:
        """The first value of the feature of what a ControlNet sees.

        Raises:
            BadSample: it cannot be read, or has none.
        """
        return self._values(index, self.condition_column)[0]

    def _values(self, index: int, column: str, otherwise: list[bytes] | None = None) -> list[bytes]:
        """The values of a feature, or `otherwise` where it has none."""
        values = self._features(index).get(column)
        if otherwise and (values is None or not len(values)):
            return otherwise
        if not isinstance(values, list) or not values:
            raise BadSample(self.name(index), f"it has no bytes in feature {column!r}")
        return values

    def _features(self, index: int) -> dict[str, list[bytes] | np.ndarray]:
        file, place = self._shards.find(index)
        try:
            return parse_example(self._files[file][place])
        except (RuntimeError, ValueError) as error:  # the reader's own is RuntimeError
            raise BadSample(self.name(index), str(error)) from error


def _open_array_record(path: str | Path) -> ArrayRecordDataSource:
    try:
        return ArrayRecordDataSource(str(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} is no ArrayRecord file, or not all of it ({error}); write or copy it again"
        ) from error


class TFRecords:
    """Random access to the records of one TFRecord file, from any thread.

    Where the records lie is found once, by going through the file from length to length, and kept as FILE.index beside
    it, or in `index_folder` where that cannot be written. The checksums of lengths and of what is read are verified.

    Raises:
        ValueError: the file is no TFRecord file, is compressed, damaged or cut off; with the byte it happens at.
    """

    def __init__(self, path: str | Path, *, index_folder: Path | None = None):
        self.path = Path(path)
        self._offsets = _offsets(self.path, index_folder)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __repr__(self) -> str:
        return f"TFRecords({str(self.path)!r}, {len(self)} records)"

    def record(self, index: int) -> bytes:
        """The bytes of a record.

        Raises:
            IndexError: there are fewer records.
            ValueError: they are damaged, or the file has changed.
            OSError: the file cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        start, end = (int(offset) for offset in self._offsets[index : index + 2])
        # Opened anew each time: sets have more files than a process may keep open.
        with self.path.open("rb", buffering=0) as file:
            frame = os.pread(file.fileno(), end - start, start)
        if len(frame) != end - start or _length(frame) != end - start - _FRAME:
            raise ValueError(f"{self.path}: record {index} at byte {start} is not what it was; the file has changed")
        data = frame[_HEADER.size : -_CHECKSUM.size]
        if _CHECKSUM.unpack(frame[-_CHECKSUM.size :])[0] != _masked_crc(data):
            raise ValueError(f"{self.path}: record {index} at byte {start} is damaged, its checksum is another")
        return data


_HEADER = struct.Struct("<QI")
"""Length of the record and the masked checksum of these 8 bytes."""

_CHECKSUM = struct.Struct("<I")
"""Masked checksum of the record, behind it."""

_FRAME = _HEADER.size + _CHECKSUM.size


def _masked_crc(data: bytes) -> int:
    """CRC-32C, turned and shifted as TensorFlow stores it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _length(frame: bytes) -> int:
    """The length a record's header gives, or -1 where it is none."""
    if len(frame) < _HEADER.size:
        return -1
    length, checksum = _HEADER.unpack_from(frame)
    return length if checksum == _masked_crc(frame[:8]) else -1


def _offsets(path: Path, index_folder: Path | None) -> np.ndarray:
    """Where each record begins, and where the last one ends."""
    status = path.stat()
    stamp = np.array([INDEX_FORMAT, status.st_size, status.st_mtime_ns], np.int64)
    places = [path.with_name(f"{path.name}.index")]
    if index_folder is not None:  # where files of different folders may have one name
        places.append(index_folder / f"{cache_name(str(path.resolve()), str(path))}.index")
    for place in places:
        if (found := _read_index(place, stamp)) is not None:
            return found
    offsets = _scan(path, status.st_size)
    _keep(places, {"offsets": offsets, "stamp": stamp}, path)
    return offsets


def _scan(path: Path, size: int) -> np.ndarray:
    offsets = array("q", [0])
    with path.open("rb", buffering=0) as file:
        while (start := offsets[-1]) < size:
            header = os.pread(file.fileno(), _HEADER.size, start)
            where = f"{path}: record {len(offsets) - 1} at byte {start}"
            if not start and header[:2] == b"\x1f\x8b":
                raise ValueError(f"{path} is compressed, which allows no random access; unpack it with gunzip")
            length = _length(header)
            if length < 0 and len(header) == _HEADER.size:
                raise ValueError(f"{where} is damaged, or this is no TFRecord file; write or copy it again")
            if length < 0 or start + _FRAME + length > size:
                raise ValueError(f"{where} is cut off, the file ends at byte {size}; write or copy it again")
            offsets.append(start + _FRAME + length)
    return np.array(offsets, np.int64)


def _read_index(place: Path, stamp: np.ndarray) -> np.ndarray | None:
    """The offsets in an index that was made of this very file, or None."""
    try:
        found = safetensors.numpy.load(place.read_bytes())
    except (OSError, SafetensorError):  # there is none, or not all of it
        return None
    offsets = found.get("offsets")
    if offsets is None or not np.array_equal(found.get("stamp", ()), stamp):
        return None
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not offsets.size:
        return None
    fits = offsets[0] == 0 and offsets[-1] == stamp[1] and (np.diff(offsets) >= _FRAME).all()
    return offsets if fits else None


def _keep(places: Sequence[Path], index: dict[str, np.ndarray], path: Path) -> None:
    """Write the index to the first place that takes it, all of it or nothing."""
    failures = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(place) as partial:
                partial.write_bytes(safetensors.numpy.save(index))
            return
        except OSError as error:
            failures.append(str(error))
    logger.warning("the index of %s cannot be kept, each run makes it again (%s)", path, "; ".join(failures))
