"""Which source a data set's flags ask for, or its files show."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.assets import PREFIX, resolve
from sdxl_eqx.data.sources.files import Files, joined
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
"""How the files of each type end; pictures and their texts are an image folder."""


def open_source(
    data: DataConfig, *, seed: int, token: str, latents: Callable[[Sequence[Path]], LatentRecords]
) -> Source | LatentRecords:
    """The data set that the flags name; nothing of a picture is read yet.

    `seed` is that of synthetic pictures; `latents` opens TFRecords of what an encoder made, which only the model knows.

    Raises:
        ValueError: there is none, or it is not of the type that is asked for, naming flag and remedy.
        OSError: it cannot be read.
    """
    kind = data.dataset_type
    columns: dict[str, Any] = {"image_column": data.image_column, "caption_column": data.caption_column}
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
    paths = [name if is_file else joined(place, name) for name in names if name.endswith(ENDINGS[kind])]
    if kind == "hf" and not is_file:
        return Table(arrow_table(place, split=data.train_split), **columns, **most, folder=place, name=place)
    if not paths:
        raise ValueError(
            f"--dataset-type {kind}: {place} has no file that ends in {' or '.join(ENDINGS[kind])}; "
            "name another --train-data-dir, or leave the type out."
        )
    if kind == "webdataset":
        return Tars(paths, **columns, **most, token=token)
    if kind == "parquet":
        folder = place.rpartition("/")[0] if is_file else place
        return Table(parquet_table(paths), **columns, **most, folder=folder, name=place, files=files)
    local = [files.local_copy(path) for path in paths]
    if kind == "hf":
        return Table(arrow_files(local), **columns, **most, folder=str(local[0].parent), name=place)
    if kind == "arrayrecord":
        return ArrayRecords(local, **columns, **most)
    _refuse_what_is_encoded(data)
    return latents(local)


def _kind(place: str, names: Sequence[str]) -> str:
    """The type of a data set by its files.

    Raises:
        ValueError: they are of several types.
    """
    if any(name.rpartition("/")[2] in METADATA for name in names):
        return "imagefolder"
    found = [kind for kind, endings in ENDINGS.items() if any(name.endswith(endings) for name in names)]
    if len(found) > 1:
        raise ValueError(f"--train-data-dir {place}: holds files of {' and '.join(found)}; choose by --dataset-type.")
    return found[0] if found else "imagefolder"


def _refuse_what_is_encoded(data: DataConfig) -> None:
    """Refuse what would change pictures or captions that are encoded already.

    Raises:
        ValueError: naming the flag.
    """
    for name in ("aspect_ratio_buckets", "center_crop", "random_flip", "caption_shuffle"):
        if getattr(data, name):
            raise ValueError(
                f"--{name.replace('_', '-')}: has no effect on TFRecords of latents, which are encoded already; "
                "leave it out."
            )
    if not data.cache_latents_text_encoder_outputs:
        raise ValueError(
            "--no-cache-latents-text-encoder-outputs: TFRecords of latents are encoded already; leave it out."
        )
