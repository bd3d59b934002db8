"""WebDataset shards: tars whose members of one key are a sample, read at random by an index of where each lies."""

import io
import json
import logging
import os
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Int32, Int64, UInt8

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources.files import (
    Files,
    FileState,
    cache_folder,
    cache_name,
    is_hidden,
    is_local,
    natural_order,
    whole_file,
)
from sdxl_eqx.data.sources.folder import PICTURES, TEXTS, report_further_lines, text_lines
from sdxl_eqx.data.sources.source import Source, texts

FORMAT = "1"
"""Changes with what an index holds."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How compressed files begin."""

_SAMPLE = np.dtype([("tar", "i4"), ("key", "i8"), ("key_end", "i8"), ("picture", "i8"), ("picture_size", "i8"),
                    ("caption", "i8"), ("caption_size", "i8"), ("is_json", "?")])  # fmt: skip
"""Where a sample lies: its tar, its key in the bytes of all keys, and its picture and caption in the tar."""

logger = logging.getLogger("sdxl_eqx")


class Tars(Source):
    """The samples of WebDataset tars, local or remote, in natural order of the tars and the order in each.

    A sample is the members of one key: of one path up to the first dot of the file's name. Its picture is the member
    whose extension is `image_column`, else the first with a picture's. Its caption is the member whose extension is
    `caption_column`, else .txt or .caption, as beside the pictures of an `ImageFolder`, else the field
    `caption_column` of .json; a `caption_column` other than `text` is looked for in .json before the texts are.

    The index of a tar is made once and lies beside it as NAME.tar.index, or under ~/.cache/sdxl_eqx/index where it
    cannot, or in `index_folder` where one is given. A tar that has changed gets another.

    Raises:
        ValueError: a tar is compressed, damaged or none, or no key of any has a picture and a caption.
        OSError: a tar cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        image_column: str = "image",
        caption_column: str = "text",
        max_samples: int = -1,
        token: str = "",
        index_folder: Path | None = None,
    ):
        if not paths:
            raise ValueError("there are no tars; give the paths of some")
        self.paths = natural_order(paths)
        self._caption_column = caption_column
        self._files = Files(token)
        self._index_folder = index_folder
        pictures = [{image_column.lower()}, {end[1:] for end in PICTURES}]
        captions = [{end[1:]} for end in TEXTS]
        captions.insert(len(captions) if caption_column == "text" else 0, {"json"})
        self._samples, self._keys = self._gather(pictures, [{caption_column.lower()}, *captions], max_samples)
        self._look_at_json()
        if not self._samples["is_json"].all():
            report_further_lines(self, self._line_text, 1000 if all(map(is_local, self.paths)) else 16)

    def __len__(self) -> int:
        return len(self._samples)

    def __repr__(self) -> str:
        return f"Tars({len(self.paths)} from {self.paths[0]!r} on, {len(self)} samples)"

    def name(self, index: int) -> str:
        """The tar's path and the key in it."""
        sample = self._samples[index]
        return f"{self.paths[sample['tar']]}:{_text(self._keys[sample['key'] : sample['key_end']])}"

    def captions(self, index: int) -> tuple[str, ...]:
        """The one in its text, or those in its .json, which is read now.

        Raises:
            BadSample: it cannot be read, or holds none.
        """
        data = self._read(index, "caption")
        try:
            if not self._samples[index]["is_json"]:
                return (text_lines(data)[0],)
            fields = json.loads(data.decode("utf-8-sig"))
            if not isinstance(fields, dict) or self._caption_column not in fields:
                have = ", ".join(map(repr, fields)) if isinstance(fields, dict) else f"none, a {type(fields).__name__}"
                raise ValueError(f"no field {self._caption_column!r} (fields: {have}); --caption-column names the one "
                                 "to read")  # fmt: skip
            return texts(fields[self._caption_column])
        except (ValueError, RecursionError) as error:
            raise BadSample(self.name(index), f"its caption: {error}") from error

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The bytes of its member, or the first `limit`.

        Raises:
            BadSample: they cannot be read.
        """
        return self._read(index, "picture", limit)

    def _line_text(self, index: int) -> bytes:
        return b"" if self._samples[index]["is_json"] else self._read(index, "caption")

    def _read(self, index: int, member: str, limit: int = -1) -> bytes:
        """The first `limit` bytes (-1: all) of a sample's picture or caption."""
        sample = self._samples[index]
        start, size = int(sample[member]), int(sample[f"{member}_size"])
        size = size if limit < 0 else min(size, limit)
        try:
            data = self._files.read(self.paths[sample["tar"]], start, start + size)
        except OSError as error:
            raise BadSample(self.name(index), f"{type(error).__name__}: {error}") from error
        if len(data) != size:
            raise BadSample(self.name(index), f"the tar ends {size - len(data)} bytes before its {member} does; if it "
                            "has changed, start again")  # fmt: skip
        return data

    def _gather(
        self, pictures: list[set[str]], captions: list[set[str]], max_samples: int
    ) -> tuple[np.ndarray, UInt8[np.ndarray, " bytes"]]:
        """The samples of all tars, and the bytes of their keys."""
        samples: list[np.ndarray] = []
        keys: list[np.ndarray] = []
        totals, left_out, first = Counter(), Counter(), dict[str, str]()
        seen = ""
        if new := sum(not any(place.is_file() for place in self._places(path)) for path in self.paths):
            logger.info("%d of %d tars have no index yet: it is made once and kept", new, len(self.paths))
        pool = ThreadPoolExecutor(8)  # for remote tars, which wait for the network
        try:
            for number, index in enumerate(pool.map(self._index, self.paths)):
                picture, caption = index.pick(pictures), index.pick(captions)
                rows = index.samples(picture, caption)
                rows["tar"] = number
                rows["key"] += totals["bytes"]
                rows["key_end"] += totals["bytes"]
                samples.append(rows)
                keys.append(index.keys)
                totals.update(bytes=len(index.keys), keys=len(picture), samples=len(rows))
                for why, count in index.left_out(picture, caption).items():
                    left_out[why] += count
                    first.setdefault(why, self.paths[number])
                seen = seen or index.summary()
                if 0 <= max_samples <= totals["samples"]:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
        if not totals["samples"]:
            raise ValueError(f"no key of {len(samples)} tars ({', '.join(self.paths[:3])}) has picture and caption; "
                             f"there are {seen or 'no keys'}; --image-column and --caption-column name the extensions, "
                             "or the field of .json")  # fmt: skip
        for why, count in left_out.items():
            logger.warning("%d %s in %d tars with %d keys, the first in %s: left out",
                           count, why, len(samples), totals["keys"], first[why])  # fmt: skip
        return np.concatenate(samples)[: max_samples if max_samples >= 0 else None], np.concatenate(keys)

    def _index(self, path: str) -> "TarIndex":
        """The index of a tar, from where it is kept or made now."""
        state = self._files.state(path)
        places = self._places(path)
        for place in places:
            try:
                if index := _load(place, state):
                    return index
            except ValueError as error:
                logger.warning("%s is damaged (%s): it is made again", place, error)
        with self._files.open(path) as file:
            index = _scan(file, path)
        reason = None
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                _save(index, place, state)
                return index
            except OSError as error:
                reason = error
        logger.warning("the index of %s cannot be kept, so that each run makes it again: %s", path, reason)
        return index

    def _places(self, path: str) -> list[Path]:
        """Where the index of a tar may lie, the first choice first."""
        if is_local(path):
            path = os.path.abspath(path.removeprefix("file://"))
        cached = (self._index_folder or cache_folder("index")) / f"{cache_name(path, path)}.index"
        return [Path(f"{path}.index"), cached] if is_local(path) and self._index_folder is None else [cached]

    def _look_at_json(self) -> None:
        """Refuse a caption column that no .json has, before a run counts every sample as bad.

        Raises:
            ValueError: none of some that are spread over all can be read.
        """
        all_json = np.flatnonzero(self._samples["is_json"])
        some = all_json[:: max(1, len(all_json) // 10)]
        reason = None
        for index in some:
            try:
                self.captions(int(index))
                return
            except BadSample as bad:
                reason = bad
        if len(some) == len(self) or len(some) >= 10:
            raise ValueError(f"none of the {len(some)} .json looked at has a caption, such as {reason}") from reason


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
        names = [_text(self.keys[start:end]) for start, end in pairwise(ends)]
        return f"keys such as {names} with extensions {sorted(self.extensions[:20])}" if names else ""

    def left_out(self, picture: Int64[np.ndarray, " keys"], caption: Int64[np.ndarray, " keys"]) -> Counter[str]:
        """How many are no samples, by why, given the member of each key that is its picture, and its caption, or -1."""
        counts = {
            "keys without a picture": int(np.count_nonzero(picture < 0)),
            "keys with a picture and no caption": int(np.count_nonzero((picture >= 0) & (caption < 0))),
            "links and sparse files": self.others,
        }
        return Counter({why: count for why, count in counts.items() if count})

    def pick(self, wanted: Sequence[set[str]]) -> Int64[np.ndarray, " keys"]:
        """The first member of each key that has an extension of the first of these sets, or of the next; -1 if none."""
        picked = np.full(len(self.key_ends), -1)
        for extensions in reversed(wanted):
            numbers = [number for number, extension in enumerate(self.extensions) if extension in extensions]
            members = np.flatnonzero(np.isin(self.extension, numbers))[::-1]  # so that the first is written last
            picked[self.key[members]] = members
        return picked

    def samples(self, picture: Int64[np.ndarray, " keys"], caption: Int64[np.ndarray, " keys"]) -> np.ndarray:
        """The rows of the keys that have both."""
        whole = np.flatnonzero((picture >= 0) & (caption >= 0))
        picture, caption = picture[whole], caption[whole]
        rows = np.zeros(len(whole), _SAMPLE)
        rows["key"] = np.concatenate([[0], self.key_ends[:-1]])[whole] if len(whole) else 0
        rows["key_end"] = self.key_ends[whole]
        rows["picture"], rows["picture_size"] = self.offset[picture], self.size[picture]
        rows["caption"], rows["caption_size"] = self.offset[caption], self.size[caption]
        json_number = self.extensions.index("json") if "json" in self.extensions else -1
        rows["is_json"] = self.extension[caption] == json_number
        return rows


_ARRAYS = ("key", "extension", "offset", "size", "keys", "key_ends")


def _scan(file: io.BufferedReader, path: str) -> TarIndex:
    """Read the headers of a tar.

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


def _text(key: UInt8[np.ndarray, " bytes"]) -> str:
    return key.tobytes().decode("utf-8", "surrogateescape")


def _save(index: TarIndex, path: Path, state: FileState) -> None:
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    head = {"format": FORMAT, "size": str(state.size), "stamp": state.stamp, "others": str(index.others)}
    head["extensions"] = json.dumps(index.extensions)
    head["crc32"] = _checksum(head, arrays)
    with whole_file(path) as partial:
        partial.write_bytes(safetensors.numpy.save(arrays, head))


def _load(path: Path, state: FileState) -> TarIndex | None:
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
