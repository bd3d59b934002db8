"""Tables of pictures and captions, read with Hugging Face's `datasets`: of the Hub, and parquet and arrow files."""

import glob
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources.files import Files, is_local, joined, natural_order
from sdxl_eqx.data.sources.source import Conditioned, texts, texts_or

if TYPE_CHECKING:  # importing it takes seconds, which only those pay who read tables
    import datasets

logger = logging.getLogger("sdxl_eqx")


class Table(Conditioned):
    """The rows of a `datasets.Dataset`, which stays on disk: nothing is kept of a row.

    Pictures are bytes, paths, or structs of both ({bytes, path}, as the library's own image columns are), captions
    whatever `texts` takes. Where there is no column of the name asked for, the only one of pictures will do.

    Args:
        dataset: the rows.
        image_column: column of the pictures.
        caption_column: column of the captions.
        condition_column: column of what a ControlNet sees, of the kinds of the pictures; '' is none.
        caption: that of rows that have none; where it is '' these are bad samples.
        max_samples: only the first so many; -1 is all.
        folder: what paths of pictures start from, local or remote.
        name: what the table is called in messages.
        files: reads the pictures that are paths.

    Raises:
        ValueError: a column is not there or of a kind that is none of these, or there are no rows.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        *,
        image_column: str,
        caption_column: str,
        condition_column: str = "",
        caption: str = "",
        max_samples: int = -1,
        folder: str | None = None,
        name: str = "",
        files: Files | None = None,
    ):
        self._name = name or "the table"
        self._folder = folder
        self._files = files or Files()
        self._count = len(dataset) if max_samples < 0 else min(len(dataset), max_samples)
        if not self._count:
            raise ValueError(f"{self._name} has no rows; give one that has, or another --train-split")
        image_column = _image_column(dataset, image_column, condition_column, self._name)
        pictures = "pictures, their bytes or their paths"
        _check(dataset, image_column, "image", _is_picture, pictures, self._name)
        self._caption = caption
        has_captions = not caption or caption_column in dataset.column_names
        if has_captions:
            _check(dataset, caption_column, "caption", _is_caption, "strings, lists of them or JSON", self._name)
        if condition_column:
            _check(dataset, condition_column, "conditioning-image", _is_picture, pictures, self._name)
        # In arrow format a row is a view of the file. In any other its values are copied, and pictures decoded.
        self._pictures = dataset.select_columns([image_column]).with_format("arrow")
        self._texts = dataset.select_columns([caption_column]).with_format("arrow") if has_captions else None
        self._conditions = dataset.select_columns([condition_column]).with_format("arrow") if condition_column else None
        first = self._found(self._pictures, 0, 0)
        if isinstance(first, str) and re.match("https?://", first):
            raise ValueError(
                f"{self.name(0)}: column {image_column!r} holds addresses in the web ({first}); fetch the pictures "
                "first, for example with img2dataset, and give those"
            )

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Table({self._name!r}, {len(self)} samples)"

    def name(self, index: int) -> str:
        """The number of the row, from 0, and the table."""
        return f"row {index} of {self._name}"

    def captions(self, index: int) -> tuple[str, ...]:
        """Those in the row's caption column.

        Raises:
            BadSample: there are none.
        """
        if self._texts is None:
            return (self._caption,)
        try:
            said = _cell(self._texts, index)[0].as_py()
            return (self._caption,) if self._caption and not said else texts_or(texts(said), self._caption)
        except (OSError, ValueError) as error:
            raise BadSample(self.name(index), str(error)) from error

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The bytes in the row, of which only those that are asked for are read, or those of the file it names.

        Raises:
            BadSample: there are none, or the file cannot be read.
        """
        return self._read(self._pictures, index, limit, "picture")

    def condition(self, index: int) -> bytes:
        """The bytes in the row's column of what a ControlNet sees, or those of the file it names.

        Raises:
            BadSample: there are none, or the file cannot be read.
        """
        if self._conditions is None:
            raise BadSample(self.name(index), "no column of what a ControlNet sees was asked for")
        return self._read(self._conditions, index, -1, "picture for a ControlNet to see")

    def _read(self, column: "datasets.Dataset", index: int, limit: int, what: str) -> bytes:
        try:
            found = self._found(column, index, limit)
            if found is None:
                raise ValueError(f"it has no {what}")
            return found if isinstance(found, bytes) else self._files.read(self._resolved(found), 0, limit)
        except (OSError, ValueError) as error:
            raise BadSample(self.name(index), str(error)) from error

    @staticmethod
    def _found(column: "datasets.Dataset", index: int, limit: int) -> bytes | str | None:
        """The bytes of the picture in a row of a table of one column, or else its path."""
        cell = _cell(column, index)
        parts = [cell]
        if names := [field.name for field in cell.type] if _kind(cell.type) == "struct" else []:
            parts = [] if cell.null_count else [cell.field(name) for name in ("bytes", "path") if name in names]
        for part in parts:
            if not part.null_count:
                return part[0].as_py() or None if _kind(part.type) == "string" else _bytes(part, limit)
        return None

    def _resolved(self, path: str) -> str:
        if os.path.isabs(path) or not is_local(path):
            return path
        if self._folder is None:
            raise ValueError(f"its picture is {path!r}, of which the table does not say in what folder it lies")
        return joined(self._folder, path)


def hub_table(
    name: str,
    *,
    config_name: str = "",
    split: str = "train",
    revision: str | None = None,
    token: str = "",
    data_dir: str = "",
    data_files: str = "",
    cache_dir: str | None = None,
) -> "datasets.Dataset":
    """A data set of the Hub, fetched and converted once into the library's cache.

    Where the Hub is out of reach or refuses, or HF_HUB_OFFLINE is set, what is newest in the cache serves, whatever
    the revision; the library warns of it.

    Raises:
        ValueError: it can be neither fetched nor found, with the library's reason and the remedy, never the token.
    """
    token = token.strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"--dataset-name {name!r}: the access token has characters that no token has; copy it again")
    remedy = (
        "check --dataset-name, --dataset-config-name, --train-split, --hf-data-dir, --hf-train-files and the "
        "connection, give --hf-access-token or set HF_TOKEN where it is gated or private, or give a folder with "
        "--train-data-dir"
    )
    with _explained(f"--dataset-name {name!r}", remedy, token):
        return _library().load_dataset(
            name,
            config_name or None,
            split=split,
            revision=revision,
            token=token or None,
            data_dir=data_dir or None,
            data_files=data_files or None,
            cache_dir=cache_dir,
        )


def parquet_table(paths: Sequence[str | Path], *, cache_dir: str | None = None) -> "datasets.Dataset":
    """Parquet files, local or by URL, one after the other, converted once into the library's cache.

    Raises:
        ValueError: one of them is not there or damaged, or their columns differ.
    """
    return _converted("parquet", paths, cache_dir)


def arrow_files(paths: Sequence[str | Path], *, cache_dir: str | None = None) -> "datasets.Dataset":
    """Local arrow files, one after the other, where they are; those of arrow's file format, which the library does not
    write, are converted once into its cache.

    Raises:
        ValueError: one of them is not there or damaged, or their columns differ.
    """
    library = _library()
    with _explained(_listed(paths), "write or copy them again"):
        if b"ARROW1" not in {_head(path) for path in paths}:
            return library.concatenate_datasets([library.Dataset.from_file(str(path)) for path in paths])
    return _converted("arrow", paths, cache_dir)


def _head(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(6)


def arrow_table(folder: str | Path, *, split: str = "train", cache_dir: str | None = None) -> "datasets.Dataset":
    """What `save_to_disk` wrote to a local folder, of several splits the one asked for, or the arrow files in it.

    Raises:
        ValueError: there is none of these, it is damaged, or has no such split.
    """
    library = _library()
    if not any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")):
        paths = natural_order(glob.glob(os.path.join(glob.escape(str(folder)), "*.arrow")))
        if not paths:
            raise ValueError(f"{folder} has no arrow files, nor a data set of save_to_disk; give one that has")
        return arrow_files(paths, cache_dir=cache_dir)
    with _explained(str(folder), "save it again"):
        found = library.load_from_disk(str(folder))
    if isinstance(found, library.Dataset):
        return found
    if split not in found:
        raise ValueError(f"{folder} has no split {split!r}, only {', '.join(found)}; give one with --train-split")
    return found[split]


def _library() -> Any:
    import datasets

    if not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
    return datasets


def _converted(kind: str, paths: Sequence[str | Path], cache_dir: str | None) -> "datasets.Dataset":
    # The library takes paths for patterns.
    files = [glob.escape(str(path)) if is_local(str(path)) else str(path) for path in paths]
    with _explained(_listed(paths), "write or copy them again"):
        return _library().load_dataset(kind, data_files=files, split="train", cache_dir=cache_dir)


def _listed(paths: Sequence[str | Path]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"


@contextmanager
def _explained(what: str, remedy: str, token: str = "") -> Iterator[None]:
    """Turns whatever the library raises into a ValueError that names the cause and not the token."""
    try:
        yield
    except Exception as error:  # those of HTTP, arrow and the file systems have no common class
        reasons, cause = [], error
        while cause is not None and len(reasons) < 3:
            reasons.append(f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}")
            cause = cause.__cause__
        said = ", from ".join(reasons)
        said = said.replace(token, "(the token)") if token else said
        # From None, and without what looks like a token of the environment: requests are quoted with their headers.
        raise ValueError(f"{what}: {_TOKEN.sub('(a token)', said)}; {remedy}") from None


_TOKEN = re.compile(r"Bearer [\w.~+/=-]+|hf_[A-Za-z0-9]{20,}")


def _image_column(dataset: "datasets.Dataset", column: str, condition_column: str, name: str) -> str:
    """The column asked for, or the only one of pictures (but for those that a ControlNet sees) where there is none of
    that name."""
    from datasets import Image

    pictures = [found for found, feature in dataset.features.items() if isinstance(feature, Image)]
    pictures = [found for found in pictures if found != condition_column]
    if column in dataset.column_names or len(pictures) != 1:
        return column
    logger.info("%s has no column %r; %r, the only one of pictures, is read", name, column, pictures[0])
    return pictures[0]


def _check(
    dataset: "datasets.Dataset", column: str, flag: str, is_one: Callable[[Any], bool], kinds: str, name: str
) -> None:
    remedy = f"--{flag}-column names the one to read"
    if column not in dataset.column_names:
        have = ", ".join(map(repr, dataset.column_names))
        raise ValueError(f"{name} has no column {column!r} (columns: {have}); {remedy}")
    kind = dataset.features.arrow_schema.field(column).type
    if not is_one(kind):
        raise ValueError(f"{name}: column {column!r} must be of {kinds}, not of {kind}; {remedy}")


def _kind(arrow_type: Any) -> str:
    """struct, list, string or bytes, whichever of their forms it has; '' for any other."""
    import pyarrow as pa

    if isinstance(arrow_type, pa.BaseExtensionType):
        arrow_type = arrow_type.storage_type
    if arrow_type in (pa.string(), pa.large_string(), pa.string_view()):
        return "string"
    if arrow_type in (pa.binary(), pa.large_binary(), pa.binary_view()):
        return "bytes"
    if pa.types.is_struct(arrow_type):
        return "struct"
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return "list" if any(is_one(arrow_type) for is_one in lists) else ""


def _is_picture(arrow_type: Any) -> bool:
    if _kind(arrow_type) == "struct":
        return {("bytes", "bytes"), ("path", "string")} & {
            (field.name, _kind(field.type)) for field in arrow_type
        } != set()
    return _kind(arrow_type) in ("bytes", "string")


def _is_caption(arrow_type: Any) -> bool:
    if _kind(arrow_type) == "struct":
        return any(_kind(field.type) == "string" for field in arrow_type)
    if _kind(arrow_type) == "list":
        return _kind(arrow_type.value_type) == "string"
    return _kind(arrow_type) in ("bytes", "string")


def _cell(column: "datasets.Dataset", index: int) -> Any:
    """An arrow array of the one value in a row of a table of one column."""
    row: Any = column[index]  # in arrow format a table
    return row.column(0).chunk(0)


def _bytes(array: Any, limit: int) -> bytes:
    """The one value of an array of bytes, or its beginning; taken from its buffers, since arrow's own ways copy all of
    it at least once more."""
    import pyarrow as pa

    if array.type not in (pa.binary(), pa.large_binary()):
        array = array.cast(pa.large_binary())
    _, offsets, data = array.buffers()
    if data is None:
        return b""
    kind = np.int32 if array.type == pa.binary() else np.int64
    start, end = np.frombuffer(offsets, kind)[array.offset : array.offset + 2].tolist()
    size = end - start if limit < 0 else min(limit, end - start)
    return data.slice(start, size).to_pybytes()
