"""Tensors of safetensors files, read and written one at a time, so that no file is ever whole in memory."""

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sdxl_eqx.weights.destination import clear_remains

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The format's names of dtypes."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is read when it is asked for; `read` gives an array of that shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """A tensor that is in memory already."""
        return cls(array.shape, array.dtype, lambda: array)

    def then(self, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> "Tensor":
        """This tensor changed when it is read, in the same dtype."""
        return Tensor(shape, self.dtype, lambda: change(self.read()))

    def cast(self, dtype: np.dtype) -> "Tensor":
        """This tensor in another dtype; itself in its own, and where it holds no floating-point numbers."""
        if dtype == self.dtype or self.dtype not in FLOATS:
            return self

        def read() -> np.ndarray:
            # What is too large becomes infinity, which whoever takes the array looks for.
            with np.errstate(over="ignore"):
                return self.read().astype(dtype)

        return Tensor(self.shape, dtype, read)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


FLOATS = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))
"""The dtypes that weights may be of."""

Tensors = dict[str, Tensor]
"""Tensors by key."""


def open_file(file: Path) -> tuple[Tensors, dict[str, str]]:
    """(tensors, metadata) of a safetensors file, which is mapped and not read.

    Raises:
        ValueError: where it is no whole safetensors file, saying what it is instead as far as can be seen.
    """
    try:
        # The library checks the whole header: its length, the offsets and that they cover the file.
        with safe_open(file, framework="numpy") as handle:
            metadata = dict(handle.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: {_what(file)} ({error}); fetch or save it again.") from None
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length), object_pairs_hook=partial(_once, file))
    mapped = map_file(file)
    tensors: Tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{file}: {key} has dtype {entry['dtype']}, which is not supported; save it as F32.")
        begin = entry["data_offsets"][0]
        tensors[key] = mapped_tensor(mapped, 8 + length + begin, dtype, tuple(entry["shape"]))
    return tensors, metadata


def _once(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header, of which the library would take the last of two entries of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{file}: its header has {twice} twice; save it again.")
    return found


POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ: all pages of a range at once, which takes a third off the time of a conversion."""


def map_file(file: Path) -> mmap.mmap:
    """A file as memory, to read from."""
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def mapped_tensor(mapped: mmap.mmap, begin: int, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that lies in a mapped file from the byte `begin` on, in row-major order."""
    size = math.prod(shape) * dtype.itemsize

    def read() -> np.ndarray:
        if size:
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError, AttributeError):  # where the kernel does not know it
                mapped.madvise(POPULATE_READ, page, begin + size - page)
        return np.frombuffer(mapped, np.uint8, size, begin).view(dtype).reshape(shape)

    return Tensor(shape, dtype, read)


def _what(file: Path) -> str:
    """What a file that is no safetensors looks like."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(512)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "a PyTorch pickle under another name, which can run code when read and is never loaded"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it stands for"
    if b"<html" in head.lower() or head.lstrip().startswith(b"<!"):
        return "a web page"
    if size < 8:
        return f"only {size} bytes, which is no safetensors file"
    (length,) = struct.unpack("<Q", head[:8])
    if length > size - 8:
        return f"truncated or no safetensors file: its header says {length} bytes, the file has {size}"
    return "not a whole safetensors file"


def write_file(
    tensors: Mapping[str, Tensor], file: Path, *, metadata: Mapping[str, str], done: Callable[[int], None] | None = None
) -> None:
    """Write a safetensors file, one tensor after the other; `done` is told the bytes of each.

    The file appears under its name when it is whole and on the disk. Wide dtypes come first, so that all are aligned;
    else tensors lie in the order of `tensors`, which is that of the source, so that it is read from front to back.

    Raises:
        OSError: where it cannot be written; nothing is left.
        ValueError: where a tensor holds NaN or infinity; nothing is left.
    """
    order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key in order:
        tensor = tensors[key]
        size = tensor.nbytes
        entries[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    clear_remains(file)
    building = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with building.open("wb") as opened:
            opened.write(struct.pack("<Q", len(header)) + header)
            for key in order:
                array = tensors[key].read()
                if array.shape != tensors[key].shape or array.dtype != tensors[key].dtype:
                    raise AssertionError(f"{key} read as {array.dtype}{array.shape}, announced otherwise")
                for chunk in _chunks(array):
                    check_finite(chunk, key)
                    opened.write(chunk.view(np.uint8).data)
                if done is not None:
                    done(tensors[key].nbytes)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(building, file)
    finally:
        building.unlink(missing_ok=True)


def _chunks(array: np.ndarray, size: int = 2**18) -> Iterable[np.ndarray]:
    """The array in row-major order, in flat pieces of about `size` bytes; copied whole where it is not contiguous.

    Pieces of that size stay in the cache between one use and the next.
    """
    flat = (array if array.flags.c_contiguous else np.ascontiguousarray(array)).reshape(-1)
    step = max(size // array.dtype.itemsize, 1)
    for at in range(0, flat.size, step):
        yield flat[at : at + step]


EXPONENTS: dict[np.dtype, tuple[type[np.unsignedinteger], int]] = {
    DTYPES["F64"]: (np.uint64, 0x7FF0000000000000),
    DTYPES["F32"]: (np.uint32, 0x7F800000),
    DTYPES["F16"]: (np.uint16, 0x7C00),
    DTYPES["BF16"]: (np.uint16, 0x7F80),
}
"""The bits that are all set in what is not finite: in half precision, to look at them is several times as fast as
np.isfinite."""


def check_finite(array: np.ndarray, key: str) -> None:
    """Check that a tensor holds no NaN and no infinity; those that are no floating-point numbers pass.

    Raises:
        ValueError: naming the key.
    """
    if array.dtype in FLOATS and not all(_is_finite(piece) for piece in _chunks(array)):
        raise ValueError(
            f"{key}: holds NaN or infinity in {array.dtype}; the weights are damaged, or too large for that dtype: "
            "fetch them again, or take a wider --dtype."
        )


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype not in EXPONENTS:  # eight bits
        return bool(np.isfinite(array.astype(np.float32)).all())
    word, exponent = EXPONENTS[array.dtype]
    return int(np.max(array.view(word) & word(exponent), initial=0)) < exponent
