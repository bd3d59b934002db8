"""The index of a tar: where the members of each key lie, made by reading its headers once."""

import io
import json
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Int32, Int64, UInt8

from sdxl_eqx.data.sources.files import FileState, is_hidden, whole_file

FORMAT = "1"
"""Changes with what an index holds."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How compressed files begin."""

SAMPLE = np.dtype([("tar", "i4"), ("key", "i8"), ("key_end", "i8"), ("picture", "i8"), ("picture_size", "i8"),
                   ("caption", "i8"), ("caption_size", "i8"), ("condition", "i8"), ("condition_size", "i8"),
                   ("is_json", "?")])  # fmt: skip
"""Where a sample lies: its tar, its key in the bytes of all keys, and its picture, its caption and what a ControlNet
sees of it in the tar; of the last two, where there is none, the size is -1."""


Members = Int64[np.ndarray, " keys"]
"""The member of each key that is something of it; -1 where there is none."""


@dataclass(frozen=True)
class TarIndex:
    """Where the members of a tar lie, of those files that have a key and an extension."""

    key: Int32[np.ndarray, " members"]
    """The number of each member's key."""
    extension: Int32[np.ndarray, " members"]
    """The number of each member's extension."""
    offset: Int64[np.ndarray, " members"]
    size: Int64[np.ndarray, " members"]
    keys: UInt8[np.ndarray, " bytes"]
    """All keys, one after another, in the order in which the tar first has them."""
    key_ends: Int64[np.ndarray, " keys"]
    extensions: list[str]
    """In lower case."""
    others: int
    """Links and sparse files, which are left out."""

    def summary(self) -> str:
        """A few keys and extensions, for people; empty where there are none."""
        ends = [0, *self.key_ends[:3].tolist()]
        names = [key_text(self.keys[start:end]) for start, end in pairwise(ends)]
        return f"keys such as {names} with extensions {sorted(self.extensions[:20])}" if names else ""

    def left_out(self, picture: Members, caption: Members, *, needs_caption: bool) -> Counter[str]:
        """How many are no samples, by why, given the member of each key that is its picture, and its caption, or -1."""
        lacking = (picture >= 0) & (caption < 0) & needs_caption
        counts = {
            "keys without a picture": int(np.count_nonzero(picture < 0)),
            "keys with a picture and no caption": int(np.count_nonzero(lacking)),
            "links and sparse files": self.others,
        }
        return Counter({why: count for why, count in counts.items() if count})

    def pick(self, wanted: Sequence[set[str]]) -> Members:
        """The first member of each key that has an extension of the first of these sets, or of the next; -1 if none."""
        picked = np.full(len(self.key_ends), -1)
        for extensions in reversed(wanted):
            numbers = [number for number, extension in enumerate(self.extensions) if extension in extensions]
            members = np.flatnonzero(np.isin(self.extension, numbers))[::-1]  # so that the first is written last
            picked[self.key[members]] = members
        return picked

    def samples(self, picture: Members, caption: Members, condition: Members, *, needs_caption: bool) -> np.ndarray:
        """The rows of the keys that have a picture, and a caption where it is needed."""
        whole = np.flatnonzero((picture >= 0) & ((caption >= 0) | (not needs_caption)))
        rows = np.zeros(len(whole), SAMPLE)
        rows["key"] = np.concatenate([[0], self.key_ends[:-1]])[whole] if len(whole) else 0
        rows["key_end"] = self.key_ends[whole]
        for name, of_keys in (("picture", picture), ("caption", caption), ("condition", condition)):
            member = of_keys[whole]
            there = member >= 0
            rows[name][there], rows[f"{name}_size"] = self.offset[member[there]], -1
            rows[f"{name}_size"][there] = self.size[member[there]]
        json_number = self.extensions.index("json") if "json" in self.extensions else -1
        captions = caption[whole]
        rows["is_json"] = (captions >= 0) & (self.extension[captions] == json_number) if len(whole) else False
        return rows


_ARRAYS = ("key", "extension", "offset", "size", "keys", "key_ends")


def scan(file: io.BufferedReader, path: str) -> TarIndex:
    """Read the headers of the tar of this path.

    Raises:
        ValueError: it is compressed, damaged, or no tar.
    """
    begin = file.read(6)
    for magic, method in COMPRESSED.items():
        if begin.startswith(magic):
            raise ValueError(f"{path} is compressed ({method}), which cannot be read at random; unpack it to a "
                             "plain .tar, pictures are compressed anyway")  # fmt: skip
    file.seek(0)
    key, extension, offset, size, key_ends = array("i"), array("i"), array("q"), array("q"), array("q")
    keys = bytearray()
    numbers: dict[str, int] = {}
    extensions: dict[str, int] = {}
    taken: set[tuple[int, int]] = set()
    others = 0
    last = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] # half a kilobyte each otherwise
                if member.offset <= last or member.size < 0:
                    raise tarfile.ReadError(f"a header that points back, at byte {member.offset}")
                last = member.offset
                is_whole = member.isreg() and not member.issparse()
                others += not is_whole and not member.isdir()
                parts = _key(member.name)
                if not is_whole or parts is None:
                    continue
                kind = extensions.setdefault(parts[1], len(extensions))
                number = numbers.get(parts[0], -1)
                if number < 0 or (number, kind) in taken:  # a key that has this already begins anew
                    number = numbers[parts[0]] = len(key_ends)
                    keys += parts[0].encode("utf-8", "surrogateescape")
                    key_ends.append(len(keys))
                taken.add((number, kind))
                key.append(number)
                extension.append(kind)
                offset.append(member.offset_data)
                size.append(member.size)
            end = tar.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes what is no header for the end
            raise tarfile.ReadError(f"no header at byte {end}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or no tar ({error}); copy or download it again") from error
    return TarIndex(
        key=np.array(key, np.int32),
        extension=np.array(extension, np.int32),
        offset=np.array(offset, np.int64),
        size=np.array(size, np.int64),
        keys=np.frombuffer(bytes(keys), np.uint8),
        key_ends=np.array(key_ends, np.int64),
        extensions=list(extensions),
        others=others,
    )


def _key(name: str) -> tuple[str, str] | None:
    """A member's key and extension, as the webdataset library has them; None where it lacks one, or is hidden."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or any(map(is_hidden, folder.split("/"))):
        return None
    return f"{folder}{slash}{stem}", extension.lower()


def key_text(key: UInt8[np.ndarray, " bytes"]) -> str:
    """A key from its bytes."""
    return key.tobytes().decode("utf-8", "surrogateescape")


def save(index: TarIndex, path: Path, state: FileState) -> None:
    """Write the index of a tar of this state to a file, all of it or nothing."""
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    head = {"format": FORMAT, "size": str(state.size), "stamp": state.stamp, "others": str(index.others)}
    head["extensions"] = json.dumps(index.extensions)
    head["crc32"] = _checksum(head, arrays)
    with whole_file(path) as partial:
        partial.write_bytes(safetensors.numpy.save(arrays, head))


def load(path: Path, state: FileState) -> TarIndex | None:
    """The index in a file; None where there is none, or it is of another state of the tar.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "np") as file:
            head = file.metadata() or {}
            if (head.get("format"), head.get("size"), head.get("stamp")) != (FORMAT, str(state.size), state.stamp):
                return None
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error
    if head.pop("crc32", "") != _checksum(head, arrays):
        raise ValueError("its checksum is another")
    return TarIndex(**arrays, extensions=json.loads(head["extensions"]), others=int(head["others"]))


def _checksum(head: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    crc = zlib.crc32(json.dumps(head, sort_keys=True).encode())
    for name in _ARRAYS:
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), crc)
    return str(crc)
