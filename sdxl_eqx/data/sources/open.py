"""Which source a data set's flags ask for, or its files show."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.assets import PREFIX, resolve
from sdxl_eqx.data.sources.files import Files, is_local, joined
from sdxl_eqx.data.sources.folder import METADATA, ImageFolder
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.sources.records import ArrayRecords
from sdxl_eqx.data.sources.source import Source
from sdxl_eqx.data.sources.synthetic import Synthetic
from sdxl_eqx.data.sources.tables import Table, arrow_files, arrow_table, hub_table, parquet_table
from sdxl_eqx.data.sources.tars import Tars

log = logging.getLogger("sdxl_eqx")

SYNTHETIC_COUNT = 1000
"""Samples of a synthetic data set whose number is not given."""

ENDINGS = {
    "parquet": (".parquet",),
    "hf": (".arrow",),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "arrayrecord": (".array_record", ".arrayrecord", ".riegeli"),
    "tfrecord": (".tfrecord", ".tfrecords", ".tfrec"),
}
"""How the files of each type end, or go on with -00000-of-00002; pictures and their texts are an image folder."""

SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` of the library `datasets` writes beside the arrow files of one split, or of several."""


def open_source(
    data: DataConfig,
    *,
    seed: int,
    token: str,
    latents: Callable[[Sequence[Path]], LatentRecords],
    condition_column: str = "",
    caption: str = "",
) -> Source | LatentRecords:
    """The data set that the flags name; nothing of a picture is read yet.

    Args:
        data: the flags.
        seed: that of synthetic pictures.
        token: the Hub's.
        latents: opens TFRecords of what an encoder made, which only the model knows.
        condition_column: where what a ControlNet sees is found; '' where none is trained.
        caption: that of pictures that have none.

    Raises:
        ValueError: there is none, or it is not of the type that is asked for, naming flag and remedy.
        OSError: it cannot be read.
    """
    kind = data.dataset_type
    columns: dict[str, Any] = {"image_column": data.image_column, "caption_column": data.caption_column,
                               "condition_column": condition_column, "caption": caption}  # fmt: skip
    most: dict[str, Any] = {"max_samples": data.max_train_samples}
    if kind == "synthetic":
        count = SYNTHETIC_COUNT if data.max_train_samples == -1 else data.max_train_samples
        return Synthetic(count, data.resolution, seed)
    if data.dataset_name:
        name, _, revision = data.dataset_name.partition("@")
        table = hub_table(
            name, config_name=data.dataset_config_name, split=data.train_split, revision=revision or None, token=token,
            data_dir=data.hf_data_dir, data_files=data.hf_train_files,
        )  # fmt: skip
        return Table(table, **columns, **most, name=data.dataset_name)
    place = str(resolve(data.train_data_dir)) if data.train_data_dir.startswith(PREFIX) else data.train_data_dir
    files = Files(token)
    is_file = files.is_file(place)
    names = [place] if is_file else files.listing(place)
    kind = _kind(place, names) if kind == "auto" else kind
    if kind == "imagefolder":
        if is_file:
            raise ValueError(f"--train-data-dir {place}: is a file; name the folder of pictures that it lies in.")
        return ImageFolder(place, **columns, **most, token=token)
    where: dict[str, Any] = {"folder": (os.path.dirname(place) or ".") if is_file else place, "files": files}
    if kind == "hf" and is_local(place) and any(name in SAVED for name in names):
        saved = arrow_table(files.local_copy(place), split=data.train_split)
        return Table(saved, **columns, **most, **where, name=place)
    if kind == "hf" and SAVED[1] in names:
        names = _of_split(place, names, data.train_split)
    paths = [name if is_file else joined(place, name) for name in names if _is_of(kind, name)]
    if not paths:
        raise ValueError(
            f"--dataset-type {kind}: {place} has no file that ends in {' or '.join(ENDINGS[kind])}; "
            "name another --train-data-dir, or leave the type out."
        )
    if kind == "webdataset":
        return Tars(paths, **columns, **most, token=token)
    if kind == "parquet":
        return Table(parquet_table(paths), **columns, **most, **where, name=place)
    local = [files.local_copy(path) for path in paths]
    if kind == "hf":
        return Table(arrow_files(local), **columns, **most, **where, name=place)
    if kind == "arrayrecord":
        return ArrayRecords(local, **columns, **most)
    _refuse_what_is_encoded(data, {"train_controlnet": condition_column, "instance_prompt": caption})
    return latents(local)


def _kind(place: str, names: Sequence[str]) -> str:
    """The type of a data set by its files.

    Raises:
        ValueError: they are of several types.
    """
    if any(name.rpartition("/")[2] in METADATA for name in names):
        return "imagefolder"
    found = [kind for kind in ENDINGS if any(_is_of(kind, name) for name in names)]
    if len(found) > 1:
        raise ValueError(f"--train-data-dir {place}: holds files of {' and '.join(found)}; choose by --dataset-type.")
    return found[0] if found else "imagefolder"


def _is_of(kind: str, name: str) -> bool:
    return re.sub(r"-\d+-of-\d+$", "", name).endswith(ENDINGS[kind])


def _of_split(place: str, names: Sequence[str], split: str) -> list[str]:
    """The files of one split of those that `save_to_disk` wrote, each into a folder of its name.

    Raises:
        ValueError: there is no such split.
    """
    found = [name for name in names if name.startswith(f"{split}/")]
    if not found:
        splits = dict.fromkeys(name.partition("/")[0] for name in names if "/" in name)
        raise ValueError(f"{place} has no split {split!r}, only {', '.join(splits)}; give one with --train-split")
    return found


def _refuse_what_is_encoded(data: DataConfig, others: Mapping[str, str]) -> None:
    """Refuse what would change pictures or captions that are encoded already.

    Raises:
        ValueError: naming the flag.
    """
    own = {name: getattr(data, name) for name in ("aspect_ratio_buckets", "center_crop", "random_flip",
                                                  "caption_shuffle")}  # fmt: skip
    for name, value in {**own, **others}.items():
        if value:
            raise ValueError(
                f"--{name.replace('_', '-')}: has no effect on TFRecords of latents, which are encoded already; "
                "leave it out."
            )
    if not data.cache_latents_text_encoder_outputs:
        raise ValueError(
            "--no-cache-latents-text-encoder-outputs: TFRecords of latents are encoded already; leave it out."
        )
