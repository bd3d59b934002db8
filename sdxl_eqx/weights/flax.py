"""Flax weights of published models (`.msgpack`) under the PyTorch names and in PyTorch's layout, read array by array.

`flax.serialization` writes a msgpack map of maps; a leaf is an extension type around (shape, name of dtype, bytes in
row-major order). Only what stands before those bytes is looked at here: they are mapped, and read when asked for.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from sdxl_eqx.weights.hub import FLAX
from sdxl_eqx.weights.read import LEFT_OUT
from sdxl_eqx.weights.skeletons import skeleton_places
from sdxl_eqx.weights.tensors import DTYPES, Tensor, Tensors

VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
"""Names of the VAE's attention in Flax; the UNet's has diffusers' own."""

EMBEDDINGS = ("token_embedding", "position_embedding")
"""Modules whose weight is a table of vectors, which Flax stores as PyTorch does."""

WRAPPER = "params/"
"""Start of every path where the whole tree of variables was saved, and not the weights alone."""

BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
"""Dtypes by the names that Flax writes."""


class Wanted(NamedTuple):
    """What a path of a Flax file stands for, and the shape it must have there."""

    key: str
    """The published name."""
    shape: tuple[int, ...]


def flax_paths(part: str, config: dict[str, Any]) -> dict[str, Wanted]:
    """Every path that the Flax file of a part must hold.

    Raises:
        ValueError: for a config of something that SDXL does not use.
    """
    wanted = {}
    for place in skeleton_places(part, config):
        for key in place.keys:
            path = _flax_path(part, key, len(place.shape))
            wanted[path] = Wanted(key, _flax_shape(path, place.shape))
    return wanted


def _flax_path(part: str, key: str, ndim: int) -> str:
    *words, last = key.split(".")
    modules: list[str] = []
    for word in words:
        if word.isdigit() and not part.startswith("text_encoder"):
            modules[-1] += f"_{word}"
        else:
            modules.append(word)
    if part == "vae":
        modules[-1] = VAE_ATTENTION.get(modules[-1], modules[-1])
    if last == "weight":
        last = "embedding" if modules[-1] in EMBEDDINGS else "scale" if ndim == 1 else "kernel"
    return "/".join([*modules, last])


def _axes(path: str, ndim: int) -> tuple[int, ...]:
    """Which axes of Flax's array are the axes of PyTorch's: (in, out) to (out, in), HWIO to OIHW."""
    if not path.endswith("/kernel"):
        return tuple(range(ndim))
    return (3, 2, 0, 1) if ndim == 4 else (1, 0)


def _flax_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    axes = _axes(path, len(shape))
    return tuple(shape[axes.index(i)] for i in range(len(shape)))


def read_flax(file: Path, part: str, config: dict[str, Any]) -> tuple[Tensors, list[str]]:
    """(tensors of one part in the published names and PyTorch's layout, paths left out), mapped and not read.

    Raises:
        ValueError: for a file that is damaged or something else, and for paths that are missing, unknown, held twice or
            of another shape than `config`, the part's JSON config, says.
    """
    if part not in FLAX:
        raise ValueError(f"{file}: there are no Flax weights of {part!r} for SDXL; there are of {', '.join(FLAX)}.")
    stored = open_flax(file)
    if all(path.startswith(WRAPPER) for path in stored):
        stored = {path.removeprefix(WRAPPER): tensor for path, tensor in stored.items()}
    wanted = flax_paths(part, config)
    left_out = [path for path in stored if path.rpartition("/")[2] in LEFT_OUT]
    unknown = [path for path in stored if path not in wanted and path not in left_out]
    for word, which in (("missing", sorted(wanted.keys() - stored.keys())), ("unknown", sorted(unknown))):
        if which:
            shown = ", ".join(which[:5]) + (f" and {len(which) - 5} more" if len(which) > 5 else "")
            raise ValueError(
                f"{file}: {len(which)} arrays {word}: {shown}. "
                f"These weights are not of the model that {part}/config.json describes."
            )
    tensors: Tensors = {}
    for path, tensor in stored.items():
        if path in left_out:
            continue
        key, shape = wanted[path]
        if tensor.shape != shape:
            raise ValueError(
                f"{file}: {path} has shape {tensor.shape}, the config says {shape}; "
                f"{part}/config.json and weights do not belong together."
            )
        axes = _axes(path, len(shape))
        tensors[key] = tensor.then(lambda x, axes=axes: x.transpose(axes), tuple(shape[i] for i in axes))
    return tensors, left_out


def open_flax(file: Path) -> Tensors:
    """Every array of a Flax file by its path (`conv_in/kernel`), in Flax's layout; the file is mapped and not read.

    Raises:
        ValueError: where it is no whole file of arrays, saying what it is instead as far as can be seen.
    """
    try:
        raw = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); fetch it again.") from None
    reader = _Reader(np.asarray(raw))
    try:
        tree = reader.value("the top")
        reader.check_end()
        if not isinstance(tree, dict):
            raise ValueError("holds no map of names to arrays")
        tensors: Tensors = {}
        _collect(tree, "", tensors)
    except ValueError as error:
        what = _what(raw[:512].tobytes(), len(raw))
        raise ValueError(f"{file}: {f'{what} ({error})' if what else error}; fetch or save it again.") from None
    return tensors


def _what(head: bytes, size: int) -> str:
    """What a file that is no Flax msgpack looks like; "" where nothing is known."""
    # A pickle says its protocol second; to msgpack its first byte is an empty map.
    if head[:2] == b"PK" or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "a PyTorch pickle under another name, which can run code when read and is never loaded"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it stands for"
    if b"<html" in head.lower() or head.lstrip().startswith(b"<!"):
        return "a web page"
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8:
        return "a safetensors file under another name; give it its own (.safetensors)"
    return ""


def _collect(tree: Mapping[str, Any], start: str, tensors: Tensors) -> None:
    """Put the arrays of a tree into `tensors`, by path."""
    for name, value in tree.items():
        path = start + name
        found = _joined(value, path) if isinstance(value, dict) and CHUNKED in value else value
        if isinstance(found, dict):
            _collect(found, path + "/", tensors)
        elif not isinstance(found, Tensor):
            raise ValueError(f"{path} holds {type(found).__name__}, where only arrays may be")
        elif path in tensors:
            raise ValueError(f"{path} is held twice")
        else:
            tensors[path] = found


CHUNKED = "__msgpack_chunked_array__"
"""Marks the map that Flax writes for an array of more than 1 GiB: its shape, and flat pieces of it, both by number."""


def _joined(chunked: Mapping[str, Any], path: str) -> Tensor:
    """The array of such a map."""
    sizes, pieces = (_numbered(chunked.get(name)) for name in ("shape", "chunks"))
    whole = _is_shape(sizes) and bool(pieces) and all(isinstance(p, Tensor) and len(p.shape) == 1 for p in pieces)
    if (
        not whole
        or any(piece.dtype != pieces[0].dtype for piece in pieces)
        or sum(piece.shape[0] for piece in pieces) != math.prod(sizes)
    ):
        raise ValueError(f"{path} is an array in pieces that do not make up its shape")
    shape = tuple(sizes)
    return Tensor(shape, pieces[0].dtype, lambda: np.concatenate([piece.read() for piece in pieces]).reshape(shape))


def _numbered(values: Any) -> list[Any]:
    """The list that Flax writes as a map from "0", "1" and so on; [] for anything else."""
    if not isinstance(values, dict) or values.keys() != {str(i) for i in range(len(values))}:
        return []
    return [values[str(i)] for i in range(len(values))]


def _is_shape(sizes: Any) -> bool:
    return isinstance(sizes, list) and all(type(n) is int and n >= 0 for n in sizes)


MAPS = (*range(0x80, 0x90), 0xDE, 0xDF)
"""First bytes of msgpack's maps."""

EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
"""First bytes of msgpack's extension types, and how many bytes their length takes."""

FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
"""First bytes of those whose length is fixed, and that length."""

BINARIES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
"""First bytes of msgpack's bytes, and how many bytes their length takes."""

ARRAY, COMPLEX, SCALAR = 1, 2, 3
"""Flax's extension types."""

SMALL = 512
"""Bytes that no name, shape or header of a Flax file exceeds."""

DEPTH = 32
"""Maps in maps that no Flax model exceeds."""


class _Reader:
    """Walks over a msgpack file from front to back and steps over the bodies of arrays.

    msgpack's own reader would take them into memory to pass them by, so it is given small pieces only.
    """

    def __init__(self, raw: np.ndarray):
        self.raw = raw
        self.at = 0

    def check_end(self) -> None:
        """Check that the whole file was read.

        Raises:
            ValueError: where more follows.
        """
        if self.at != len(self.raw):
            raise ValueError(f"has {len(self.raw) - self.at} bytes after the end of its msgpack")

    def value(self, path: str, depth: int = 0) -> Any:
        """What comes next: a dict of values, a `Tensor`, or a plain object.

        Raises:
            ValueError: where it is cut off or not as Flax writes it.
        """
        first = self._byte()
        if first in EXTENSIONS or first in FIXED_EXTENSIONS:
            return self._extension(path)
        if first not in MAPS:
            return self._small("unpack")
        if depth == DEPTH:
            raise ValueError(f"{path} is nested more than {DEPTH} deep, which no model is")
        found: dict[str, Any] = {}
        for _ in range(self._small("read_map_header")):
            name = self._small("unpack")
            if not isinstance(name, str):
                raise ValueError(f"{path} has the name {name!r}, which is no text")
            if name in found:
                raise ValueError(f"{name} is held twice in {path}")
            found[name] = self.value(f"{path}/{name}" if depth else name, depth + 1)
        return found

    def _extension(self, path: str) -> Tensor:
        first = self._byte()
        if first in FIXED_EXTENSIONS:
            size = FIXED_EXTENSIONS[first]
            self.at += 1
        else:
            size = self._length(EXTENSIONS)
        kind = self._byte()
        self.at += 1
        end = self.at + size
        if end > len(self.raw):
            raise ValueError(f"is cut off: {path} ends at byte {end}, the file at {len(self.raw)}")
        if kind not in (ARRAY, SCALAR):
            what = "a complex number" if kind == COMPLEX else f"of msgpack extension type {kind}"
            raise ValueError(f"{path} is {what}, where only arrays may be")
        tensor = self._array(path)
        if self.at != end:
            raise ValueError(f"{path} ends at byte {self.at}, where its header says {end}")
        return tensor

    def _array(self, path: str) -> Tensor:
        fields = self._small("read_array_header")
        shape, name = self._small("unpack"), self._small("unpack")
        size = self._length(BINARIES)
        if fields != 3 or not _is_shape(shape) or not isinstance(name, str):
            raise ValueError(f"{path} is no array as Flax writes it")
        dtype = BY_NAME.get(name)
        if dtype is None:
            raise ValueError(f"{path} has dtype {name}, which no weights have; float32, for one, is read")
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} has {size} bytes, which do not make {name} of shape {tuple(shape)}")
        body = self.raw[self.at : self.at + size]
        self.at += size
        return Tensor(tuple(shape), dtype, lambda: body.view(dtype).reshape(shape))

    def _byte(self) -> int:
        if self.at >= len(self.raw):
            raise ValueError(f"is cut off at byte {len(self.raw)}")
        return int(self.raw[self.at])

    def _length(self, widths: Mapping[int, int]) -> int:
        """The length at the start of what comes next, which must be of one of these kinds; stops after it."""
        width = widths.get(self._byte())
        begin = self.at + 1
        if width is None or begin + width > len(self.raw):
            raise ValueError(f"is not msgpack as Flax writes it, or cut off, at byte {self.at}")
        self.at = begin + width
        return int.from_bytes(self.raw[begin : self.at].tobytes(), "big")

    def _small(self, what: str) -> Any:
        """What msgpack's reader makes of what comes next, by its method of that name."""
        unpacker = msgpack.Unpacker(max_buffer_size=SMALL)
        unpacker.feed(self.raw[self.at : self.at + SMALL].tobytes())
        try:
            value = getattr(unpacker, what)()
        except (ValueError, msgpack.UnpackException) as error:
            raise ValueError(f"is not msgpack as Flax writes it, or cut off, at byte {self.at} ({error})") from None
        self.at += unpacker.tell()
        return value
