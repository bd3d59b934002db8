"""One list of samples written as each kind of data set that is read, in several files where the kind has them."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from array_record.python.array_record_module import ArrayRecordWriter

from sdxl_eqx.data.sources.examples import make_example

FIRST = 9
"""Number of the first file: the second one, 10, comes before it in the order of the alphabet."""


@dataclass(frozen=True)
class Sample:
    """A picture's file and its captions."""

    name: str
    """Of the file, with its ending."""
    data: bytes
    captions: tuple[str, ...]
    condition: bytes = b""
    """What a ControlNet sees, a PNG; samples without captions or this are written without their fields."""


def write_folder(folder: Path, samples: Sequence[Sample], files: int) -> None:
    """Pictures, and metadata.jsonl with their captions as lists; `files` has no meaning for it."""
    lines = []
    for one in samples:
        (folder / one.name).write_bytes(one.data)
        fields: dict[str, Any] = {"file_name": one.name, "text": one.captions}
        if not one.captions:
            del fields["text"]
        if one.condition:
            fields["conditioning_image_file_name"] = f"maps/{Path(one.name).stem}.png"
            (folder / "maps").mkdir(exist_ok=True)
            (folder / fields["conditioning_image_file_name"]).write_bytes(one.condition)
        lines.append(json.dumps(fields, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def write_parquet(folder: Path, samples: Sequence[Sample], files: int) -> None:
    """Files with a column of pictures and one of lists of captions, as the library `datasets` writes them."""
    for number, part in _parts(samples, files):
        _table(part).to_parquet(str(folder / f"part-{number}.parquet"))


def write_tars(folder: Path, samples: Sequence[Sample], files: int) -> None:
    """Tars with a picture and a .json with its captions for each key, as `webdataset` has them."""
    for number, part in _parts(samples, files):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for one in part:
                _add(tar, one.name, one.data)
                stem = Path(one.name).stem
                if one.captions:
                    _add(tar, f"{stem}.json", json.dumps({"text": one.captions}).encode())
                if one.condition:
                    _add(tar, f"{stem}.conditioning_image.png", one.condition)


def write_records(folder: Path, samples: Sequence[Sample], files: int) -> None:
    """ArrayRecords of tf.train.Examples, whose caption feature has a value for each caption."""
    for number, part in _parts(samples, files):
        writer = ArrayRecordWriter(str(folder / f"part-{number}.array_record"), "group_size:1")
        for one in part:
            said = {"text": [caption.encode() for caption in one.captions]} if one.captions else {}
            seen = {"conditioning_image": [one.condition]} if one.condition else {}
            writer.write(make_example({"image": [one.data], **said, **seen}))
        writer.close()


def write_arrow(folder: Path, samples: Sequence[Sample], files: int) -> None:
    """What `save_to_disk` of the library `datasets` writes."""
    _table(samples).save_to_disk(str(folder), num_shards=files)


FORMATS: dict[str, Callable[[Path, Sequence[Sample], int], None]] = {
    "imagefolder": write_folder,
    "parquet": write_parquet,
    "webdataset": write_tars,
    "arrayrecord": write_records,
    "hf": write_arrow,
}
"""Each writes samples, in their order, into an empty folder, as so many files."""


def _parts(samples: Sequence[Sample], files: int) -> Iterator[tuple[int, Sequence[Sample]]]:
    bounds = [len(samples) * i // files for i in range(files + 1)]
    for i in range(files):
        yield FIRST + i, samples[bounds[i] : bounds[i + 1]]


def _table(samples: Sequence[Sample]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    pictures = [{"bytes": one.data, "path": None} for one in samples]
    columns: dict[str, list[Any]] = {"image": pictures, "text": [list(one.captions) for one in samples]}
    if any(one.condition for one in samples):
        features["conditioning_image"] = datasets.Image()
        seen = [{"bytes": one.condition, "path": None} if one.condition else None for one in samples]
        columns["conditioning_image"] = seen
    if not any(one.captions for one in samples):
        del columns["text"], features["text"]
    return datasets.Dataset.from_dict(columns, features=features)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
