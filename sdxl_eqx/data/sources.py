"""Where samples come from: random access to (picture, caption) pairs, before any picture is read."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Example:
    """One sample: a picture's file and its caption."""

    path: Path
    caption: str


class ImageFolder:
    """A folder of pictures with metadata.jsonl: one JSON object a line, in the order of the samples.

    A random-access source in grain's sense. Every line is checked here, and that its picture exists; that it can be
    read is seen later.

    Raises:
        ValueError: with the file, the line, the rule it breaks and the remedy.
    """

    def __init__(
        self,
        folder: Path,
        *,
        image_column: str = "file_name",
        caption_column: str = "text",
        max_samples: int = -1,
    ):
        self.folder = folder
        metadata = folder / METADATA
        remedy = f"it must hold one JSON object a line, such as {_line(image_column, caption_column)}"
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; give a folder of pictures with {METADATA}, or asset:emoji")
        if not metadata.is_file():
            raise ValueError(f"{folder} has no {METADATA}: {remedy}")
        self.examples: list[Example] = []
        for number, line in enumerate(metadata.read_bytes().splitlines(), start=1):
            if len(self.examples) == max_samples:
                break
            if line.strip():
                try:
                    self.examples.append(_parse(line, folder, image_column, caption_column))
                except ValueError as error:
                    raise ValueError(f"{metadata} line {number}: {error}") from error
        if not self.examples:
            raise ValueError(f"{metadata} has no samples: {remedy}")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __repr__(self) -> str:
        return f"ImageFolder({str(self.folder)!r}, {len(self)} samples)"


def _line(image_column: str, caption_column: str) -> str:
    return json.dumps({image_column: "cat.png", caption_column: "a photo of a cat"})


def _parse(line: bytes, folder: Path, image_column: str, caption_column: str) -> Example:
    remedy = f"write a line such as {_line(image_column, caption_column)}"
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"no valid JSON in UTF-8 ({error}); {remedy}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, not an object; {remedy}")
    for flag, column in (("image", image_column), ("caption", caption_column)):
        if column not in fields:
            have = ", ".join(map(repr, fields)) or "none"
            raise ValueError(f"no field {column!r} (fields: {have}); --{flag}-column names the one to read")
        if not isinstance(fields[column], str):
            raise ValueError(f"field {column!r} must be a string, not {fields[column]!r}; {remedy}")
    name = PurePosixPath(fields[image_column])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{str(name)!r} leaves the folder; give a path inside {folder}, without '..'")
    path = folder / name
    try:
        there = path.is_file()
    except OSError:  # a name that no file system takes
        there = False
    if not there:
        raise ValueError(f"there is no picture {path}; add the file or remove the line")
    return Example(path, fields[caption_column])
