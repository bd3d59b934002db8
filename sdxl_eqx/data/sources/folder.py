"""Folders of pictures, with their captions in metadata files or in a text beside each picture."""

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources.files import Files, is_local, joined
from sdxl_eqx.data.sources.source import Conditioned, Source, texts, texts_or

METADATA = ("metadata.csv", "metadata.jsonl")
"""Files whose lines are samples; a picture's path in them begins at their own folder."""

TEXTS = (".txt", ".caption")
"""Ends of the texts beside pictures; the first that is there counts."""

PICTURES = frozenset([".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
                      ".jpx", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff",
                      ".webp"])  # fmt: skip
"""Ends of the names of pictures, in lower case, of those that Pillow reads."""

FILE_NAME = "file_name"
"""The picture's column in metadata without the one asked for."""

logger = logging.getLogger("sdxl_eqx")


class ImageFolder(Conditioned):
    """The pictures of a folder and of those in it, local or remote.

    Where it has metadata.jsonl or metadata.csv, in any folder, their lines are the samples, in their order, and every
    line is checked here. Otherwise every picture is one, in natural order of the paths, and the first line of its
    text (a.txt or a.caption beside a.png) that is not empty its caption. That pictures and texts can be read is seen
    later.

    Args:
        folder: local or remote.
        image_column: field of the picture's path; `file_name` will do.
        caption_column: field of the captions.
        condition_column: field of the path of what a ControlNet sees, with or without `_file_name`; '' is none.
        caption: that of pictures that have none, which are refused where it is ''.
        max_samples: only the first so many; -1 is all.
        token: the Hub's.

    Raises:
        ValueError: with the file, the line, the rule it breaks and the remedy.
        OSError: the folder cannot be read.
    """

    def __init__(
        self,
        folder: str,
        *,
        image_column: str = "image",
        caption_column: str = "text",
        condition_column: str = "",
        caption: str = "",
        max_samples: int = -1,
        token: str = "",
    ):
        self.folder = folder
        self._columns = (image_column, caption_column)
        self._caption = caption
        self._condition_columns = (condition_column, f"{condition_column}_{FILE_NAME}") if condition_column else ()
        self._conditions: list[str] = []
        """The path of what a ControlNet sees of each, '' where there is none; empty where it is not asked for."""
        self._files = Files(token)
        self._names: list[str] = []
        self._captions: list[str | tuple[str, ...]] = []
        """One string where there is one caption, since a million tuples take 56 MB; empty where there are texts."""
        self._texts: list[str] = []
        """The text of each picture, '' where it has none; empty where there is metadata."""
        listed = self._files.listing(folder)
        metadata = [name for name in listed if os.path.basename(name) in METADATA]
        if metadata:
            self._join(metadata, set(listed), max_samples)
        else:
            self._pair(listed, max_samples)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"ImageFolder({self.folder!r}, {len(self)} samples)"

    def name(self, index: int) -> str:
        """The picture's path, from the folder on."""
        return self._names[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """Those of its line, or the one in its text, which is read now.

        Raises:
            BadSample: the text cannot be read, or has none.
        """
        if not self._texts:
            captions = self._captions[index]
            return (captions,) if isinstance(captions, str) else captions
        text = self._texts[index]
        try:
            data = self._text(index)
            return (text_lines(data)[0] if data.strip() or not self._caption else self._caption,)
        except (OSError, ValueError) as error:
            raise BadSample(self.name(index), f"its text {text}: {error}") from error

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The bytes of its file, or the first `limit`.

        Raises:
            BadSample: they cannot be read.
        """
        try:
            return self._files.read(joined(self.folder, self._names[index]), 0, limit)
        except OSError as error:
            raise BadSample(self.name(index), f"{type(error).__name__}: {error}") from error

    def condition(self, index: int) -> bytes:
        """The bytes of the file that its line names.

        Raises:
            BadSample: it names none, or they cannot be read.
        """
        path = self._conditions[index] if self._conditions else ""
        if not path:
            raise BadSample(self.name(index), f"its line has no {' or '.join(self._condition_columns) or 'condition'}")
        try:
            return self._files.read(joined(self.folder, path))
        except OSError as error:
            raise BadSample(self.name(index), f"what a ControlNet sees, {path}: {error}") from error

    def _text(self, index: int) -> bytes:
        text = self._texts[index]
        return self._files.read(joined(self.folder, text)) if text else b""

    def _join(self, metadata: list[str], listed: set[str], max_samples: int) -> None:
        """Take the lines of all metadata files."""
        example = _example(self._columns[1])
        for file in metadata:
            own = os.path.dirname(file)
            if os.path.join(own, METADATA[0]) in listed and os.path.join(own, METADATA[1]) in listed:
                where = joined(self.folder, own) if own else self.folder
                raise ValueError(f"{where} has both {' and '.join(METADATA)}; keep one of them")
            path = joined(self.folder, file)
            lines = csv_lines if file.endswith(".csv") else json_lines
            wanted = None if max_samples < 0 else max_samples - len(self)
            try:
                for number, fields in islice(lines(self._files.read(path), example), wanted):
                    try:
                        self._take(fields, own, listed, example)
                    except ValueError as error:
                        raise ValueError(f"line {number}: {error}") from error
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
        if not self._names:
            where = ", ".join(joined(self.folder, file) for file in metadata[:3])
            raise ValueError(f"{where} has no samples: it must hold one a line, such as {example}")
        if self._condition_columns and not any(self._conditions):
            where, wanted = joined(self.folder, metadata[0]), " or ".join(map(repr, self._condition_columns))
            raise ValueError(f"{where}: no line has a field {wanted} with the path of what a ControlNet sees; "
                             "--conditioning-image-column names the one to read")  # fmt: skip
        left_out = sum(map(is_picture, listed - set(self._names) - set(self._conditions)))
        if left_out and len(self) != max_samples:
            logger.warning("%d pictures of %s are in no metadata file: left out", left_out, self.folder)

    def _take(self, fields: dict[str, Any], own: str, listed: set[str], example: str) -> None:
        """Add the sample of a line of the metadata of the folder `own`."""
        image_column, caption_column = self._columns
        needed = [("image", (image_column, FILE_NAME))]
        for flag, columns in needed if self._caption else [*needed, ("caption", (caption_column,))]:
            if not any(column in fields for column in columns):
                have = ", ".join(map(repr, fields)) or "none"
                wanted = " or ".join(map(repr, dict.fromkeys(columns)))
                raise ValueError(f"no field {wanted} (fields: {have}); --{flag}-column names the one to read")
        column = image_column if image_column in fields else FILE_NAME
        written = fields[column]
        remedy = f"write a line such as {example}"
        if not isinstance(written, str):
            raise ValueError(f"field {column!r} must be a string, not {repr(written)[:80]}; {remedy}")
        said = fields.get(caption_column)
        try:
            captions = (self._caption,) if self._caption and not said else texts_or(texts(said), self._caption)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"field {caption_column!r}: {error}; {remedy}") from error
        name = f"{own}/{written}" if own else written
        self._names.append(name if name in listed else self._found(written, own, listed))
        self._captions.append(captions[0] if len(captions) == 1 else captions)
        if self._condition_columns:
            seen = next((fields[column] for column in self._condition_columns if fields.get(column)), "")
            if not isinstance(seen, str):
                raise ValueError(f"field {self._condition_columns[0]!r} must be a path, not {repr(seen)[:80]}")
            self._conditions.append(self._inside(seen, own) if seen else "")

    def _found(self, written: str, own: str, listed: set[str]) -> str:
        """The path, from the folder on, of a picture that is written otherwise than it is listed."""
        name = self._inside(written, own)
        if name not in listed and not self._files.is_file(joined(self.folder, name)):
            raise ValueError(f"there is no picture {joined(self.folder, name)}; add the file or remove the line")
        return name

    def _inside(self, written: str, own: str) -> str:
        """The path, from the folder on, of what the metadata of the folder `own` names."""
        path = PurePosixPath(written)
        if path.is_absolute() or ".." in path.parts:
            inside = joined(self.folder, own) if own else self.folder
            raise ValueError(f"{str(path)!r} leaves the folder; give a path inside {inside}, without '..'")
        return str(PurePosixPath(own) / path)

    def _pair(self, listed: list[str], max_samples: int) -> None:
        """Take each picture with the text beside it."""
        found: dict[str, str] = {}
        for name in listed:
            stem, end = os.path.splitext(name)
            if end.lower() in TEXTS and (stem not in found or end.lower() == TEXTS[0]):
                found[stem] = name
        pictures = [name for name in listed if is_picture(name)]
        ways = f"metadata.jsonl with a line for each, such as {_example(self._columns[1])}"
        if not pictures:
            ends = sorted({os.path.splitext(name)[1] or name for name in listed})[:9]
            raise ValueError(
                f"{self.folder} has no metadata.jsonl, no metadata.csv and no pictures (kinds of file: "
                f"{', '.join(ends) or 'none'}); give it pictures of a kind that Pillow reads, and {ways}"
            )
        if self._condition_columns:
            raise ValueError(f"{self.folder} has no metadata.jsonl and no metadata.csv to name what a ControlNet sees; "
                             f"give it one whose lines have the field {self._condition_columns[0]!r}")  # fmt: skip
        if not found and not self._caption:
            raise ValueError(f"{self.folder} has pictures but no captions; give it {ways}, a text beside each picture, "
                             f"such as {os.path.splitext(pictures[0])[0]}.txt, or all of them one caption with "
                             "--instance-prompt")  # fmt: skip
        stems = {os.path.splitext(name)[0] for name in pictures}
        if alone := [text for stem, text in found.items() if stem not in stems]:
            logger.warning("%d texts of %s have no picture of a kind that is read beside them, such as %s: left out",
                           len(alone), self.folder, alone[0])  # fmt: skip
        self._names = pictures[:max_samples] if max_samples >= 0 else pictures
        missing = [name for name in self._names if os.path.splitext(name)[0] not in found]
        if missing and not self._caption:
            raise ValueError(
                f"{len(missing)} of {len(self)} pictures of {self.folder} have no text, such as {missing[0]}: write "
                f"its caption into {os.path.splitext(missing[0])[0]}.txt, move the picture away, or give those without "
                "one with --instance-prompt"
            )
        self._texts = [found.get(os.path.splitext(name)[0], "") for name in self._names]
        looks = 1000 if is_local(self.folder) else 16  # a remote one takes a tenth of a second
        report_further_lines(self, self._text, looks)


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name."""
    return os.path.splitext(name)[1].lower() in PICTURES


def text_lines(data: bytes) -> list[str]:
    """The lines of a picture's text that are not empty; the first is the caption, as kohya's sd-scripts have it.

    Raises:
        ValueError: there are none, or it is not UTF-8.
    """
    text = data.decode("utf-8-sig").replace("\r", "\n")  # splitlines would cut at form feeds and other rare marks too
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError("empty; write the caption into it")
    return lines


def report_further_lines(source: Source, read: Callable[[int], bytes], looks: int) -> None:
    """Say in the log how many texts, of `looks` that are spread over all, have lines that do not count."""
    step = max(1, -(-len(source) // looks))
    looked = range(0, len(source), step)
    if further := sum(_has_further_lines(read, index) for index in looked):
        logger.warning("%d of %d texts of %s%s have further lines; only the first is the caption",
                       further, len(looked), source, "" if step == 1 else " that were looked at")  # fmt: skip


def _has_further_lines(read: Callable[[int], bytes], index: int) -> bool:
    try:
        return len(text_lines(read(index))) > 1
    except (OSError, ValueError):  # a bad sample, and said when it is one
        return False


def json_lines(data: bytes, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines, each with the number of its line.

    Raises:
        ValueError: a line is no JSON object; with its number, and the example as the remedy.
    """
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"line {number}: no valid JSON in UTF-8 ({error}); write a line such as {example}"
            ) from error
        if not isinstance(fields, dict):
            raise ValueError(
                f"line {number}: a JSON {type(fields).__name__}, not an object; write a line such as {example}"
            )
        yield number, fields


def csv_lines(data: bytes, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of comma-separated values below the row of their columns, each with the number of its first line.

    Raises:
        ValueError: a row is not as long as the first, or not quoted rightly; with its number.
    """
    try:
        text = data.decode("utf-8-sig")
    except ValueError as error:
        raise ValueError(f"no UTF-8 ({error}); save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"line {number}: {error}; quote a value that holds commas, quotes or line ends, "
                             'and double the quotes in it: "a ""big"" cat"') from error  # fmt: skip
        if row is None:
            return
        if not any(value.strip() for value in row):
            continue
        if not columns:
            columns = row
        elif len(row) != len(columns):
            raise ValueError(f"line {number}: {len(row)} values for the {len(columns)} columns {columns}; "
                             'quote a value that holds commas: "a big, red cat"')  # fmt: skip
        else:
            yield number, dict(zip(columns, row, strict=True))


def _example(caption_column: str) -> str:
    return json.dumps({FILE_NAME: "cat.png", caption_column: "a photo of a cat"})
