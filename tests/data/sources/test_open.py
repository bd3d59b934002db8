import uuid
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
from written_sets import FORMATS, Sample

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.sources import open as opening
from sdxl_eqx.data.sources.examples import make_example, make_tensor
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.sources.open import ENDINGS, SYNTHETIC_COUNT, open_source
from sdxl_eqx.data.sources.records import ArrayRecords
from sdxl_eqx.data.sources.synthetic import Synthetic
from sdxl_eqx.data.sources.tables import Table
from sdxl_eqx.data.sources.tars import Tars

SAMPLES = [Sample(f"{i}.png", b"picture %d" % i, (f"caption {i}",)) for i in range(4)]
CLASSES = {"imagefolder": ImageFolder, "parquet": Table, "webdataset": Tars, "arrayrecord": ArrayRecords, "hf": Table}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root)
    monkeypatch.setenv("HOME", str(root))


@pytest.fixture
def remote():
    root = f"memory://{uuid.uuid4().hex}"
    yield root
    fsspec.filesystem("memory").rm(root, recursive=True)


def no_latents(paths) -> LatentRecords:
    raise AssertionError(f"{paths} are no latents")


def source(place: str | Path = "", *, seed=0, token="", latents=no_latents, **options: Any) -> Any:
    return open_source(DataConfig(train_data_dir=str(place), **options), seed=seed, token=token, latents=latents)


def written(kind: str, folder: Path, files: int = 2) -> Path:
    folder.mkdir(parents=True)
    FORMATS[kind](folder, SAMPLES, files)
    return folder


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def content(source):
    return [(source.captions(i), source.picture(i)) for i in range(len(source))]


def expected(samples=SAMPLES):
    return [(one.captions, one.data) for one in samples]


def write_latents(path: Path, count=3):
    """As MaxDiffusion does, for pictures of 32 pixels."""
    from test_records import framed

    shapes = {"pixel_values": (4, 4, 4), "prompt_embeds": (77, 8), "text_embeds": (6,)}
    tensors = {name: [make_tensor(np.ones(shape, np.float32))] for name, shape in shapes.items()}
    path.write_bytes(count * framed(make_example(tensors)))


def read_latents(paths) -> LatentRecords:
    return LatentRecords(paths, scaling_factor=0.5, channels=4)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("asked", [False, True], ids=["found", "asked for"])
def test_the_type_is_found_by_the_files_and_may_be_asked_for(tmp_path, kind, asked):
    found = source(written(kind, tmp_path / "set"), dataset_type=kind if asked else "auto")
    assert type(found) is CLASSES[kind] and content(found) == expected()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("place", ["{}/", "file://{}", "{}/.."], ids=["slash", "file", "folder above"])
def test_a_folder_may_be_written_in_other_ways_and_its_files_lie_deeper(tmp_path, kind, place):
    folder = written(kind, tmp_path / "all" / "set")
    assert content(source(place.format(folder))) == expected()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_remote_folder_gives_what_a_local_one_does(tmp_path, remote, kind):
    fsspec.filesystem("memory").put(str(written(kind, tmp_path / "set")), remote, recursive=True)
    found = source(remote)
    assert type(found) is CLASSES[kind] and content(found) == expected()


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "imagefolder"])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_one_file_is_a_data_set_too(tmp_path, kind, prefix):
    folder = written(kind, tmp_path / "set")
    first = min(folder.glob("*9*") if kind != "hf" else folder.glob("*00000-of*"))
    assert content(source(f"{prefix}{first}")) == expected(SAMPLES[:2])


@pytest.mark.parametrize("kind", FORMATS)
def test_only_the_first_samples_where_a_number_is_given(tmp_path, kind):
    folder = written(kind, tmp_path / "set")
    for most, count in ((1, 1), (3, 3), (9, 4), (-1, 4)):
        assert content(source(folder, max_train_samples=most)) == expected(SAMPLES[:count])


@pytest.mark.parametrize("kind", FORMATS)
def test_the_columns_asked_for_are_read(tmp_path, kind):
    folder = written(kind, tmp_path / "set")
    with pytest.raises(ValueError, match=r"--caption-column names the"):
        source(folder, caption_column="prompt")
    if kind in ("parquet", "hf"):  # the only column of pictures serves under any name
        assert content(source(folder, image_column="jpg")) == expected()
    elif kind == "arrayrecord":
        with pytest.raises(ValueError, match=r"no feature 'jpg' .*--image-column names the"):
            source(folder, image_column="jpg")


@pytest.mark.parametrize(("kind", "ending"), [(kind, end) for kind, ends in ENDINGS.items() for end in ends])
@pytest.mark.parametrize("of", ["", "-00001-of-00010"])
def test_every_ending_tells_its_type_also_in_a_folder_and_with_the_number_of_its_shard(tmp_path, kind, ending, of):
    touched(tmp_path, f"in/a{ending}{of}", "in/LICENSE", "a.png")
    assert opening._kind("", [f"in/a{ending}{of}", "LICENSE", "a.png"]) == kind
    (tmp_path / "in" / f"a{ending}{of}").write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(ValueError, match=r"compressed|damaged|no ArrayRecord|cannot be read|write or copy"):
        source(tmp_path, latents=read_latents)


def test_the_number_of_a_shard_is_no_part_of_its_ending_in_any_source(tmp_path):
    for kind in ("parquet", "webdataset", "arrayrecord"):
        folder = written(kind, tmp_path / kind, 1)
        (file,) = folder.iterdir()
        file.rename(folder / f"{file.name}-00000-of-00001")
        assert content(source(folder)) == expected()


@pytest.mark.parametrize(
    "names", [("a.parquet", "a.tar"), ("a.arrow", "in/a.tfrecord", "b.parquet"), ("a.tgz", "a.riegeli")]
)
def test_files_of_several_types_are_an_error_that_names_them(tmp_path, names):
    with pytest.raises(ValueError, match=r"--train-data-dir .*: holds files of \w+ and \w+.*choose by --dataset-type"):
        source(touched(tmp_path, *names))


def test_of_several_types_the_one_asked_for_is_read(tmp_path):
    folder = written("parquet", tmp_path / "set")
    FORMATS["webdataset"](folder, SAMPLES[:3], 1)
    assert content(source(folder, dataset_type="parquet")) == expected()
    assert content(source(folder, dataset_type="webdataset")) == expected(SAMPLES[:3])


def test_metadata_of_pictures_comes_before_other_files(tmp_path):
    folder = written("imagefolder", tmp_path / "set")
    touched(folder, "archive.tar", "table.parquet")
    assert content(source(folder)) == expected()
    touched(tmp_path / "other", "my_metadata.jsonl", "a.tar")
    assert opening._kind("", ["my_metadata.jsonl", "a.tar"]) == "webdataset"


@pytest.mark.parametrize("kind", ENDINGS)
def test_a_folder_without_files_of_the_type_asked_for_is_an_error(tmp_path, kind):
    folder = touched(tmp_path / "set", "a.png", "a.parquetx", "a.arrow.bak", "a.tar.idx", "tfrecord")
    with pytest.raises(ValueError, match=rf"--dataset-type {kind}: .*set has no file that ends in \{ENDINGS[kind][0]}"):
        source(folder, dataset_type=kind)


def test_an_empty_and_a_missing_folder_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no pictures \(kinds of file: none\)"):
        source(tmp_path)
    for kind in ("auto", *FORMATS):
        with pytest.raises(ValueError, match=r"nowhere is no folder; give one that is there"):
            source(tmp_path / "nowhere", dataset_type=kind)


def test_a_place_that_nothing_reads_is_an_error():
    with pytest.raises(ValueError, match="nothing reads s4://"):
        source("s4://bucket/set")


@pytest.mark.parametrize("name", ["a.png", "metadata.jsonl", "a.zip"])
def test_a_file_that_is_no_data_set_is_an_error(tmp_path, name):
    with pytest.raises(ValueError, match="is a file; name the folder of pictures that it lies in"):
        source(touched(tmp_path, name) / name)
    with pytest.raises(ValueError, match=f"--dataset-type parquet: .*{name} has no file that ends in .parquet"):
        source(tmp_path / name, dataset_type="parquet")


def test_the_bundled_pictures_have_a_name_and_other_names_are_an_error():
    assert len(source("asset:emoji")) == 64 and len(source("asset:emoji", max_train_samples=5)) == 5
    with pytest.raises(ValueError, match="'asset:cats' names no bundled asset; known are asset:emoji"):
        source("asset:cats")


@pytest.mark.parametrize(("most", "count"), [(-1, SYNTHETIC_COUNT), (3, 3)])
def test_synthetic_pictures_need_no_files(most, count):
    found = source(dataset_type="synthetic", max_train_samples=most, resolution=24, seed=7)
    assert isinstance(found, Synthetic) and (found.count, found.resolution, found.seed) == (count, 24, 7)


def test_a_data_set_of_the_hub_is_asked_for_with_its_revision_and_token(monkeypatch):
    asked = []

    def hub_table(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_dict({"image": [b"a", b"b", b"c"], "text": ["A", "B", "C"]})

    monkeypatch.setattr(opening, "hub_table", hub_table)
    options: dict[str, Any] = {"dataset_config_name": "small", "train_split": "test", "hf_data_dir": "in"}
    found = source(dataset_name="owner/set@v2", token="secret", max_train_samples=2, hf_train_files="*.csv", **options)
    assert isinstance(found, Table) and content(found) == [(("A",), b"a"), (("B",), b"b")]
    assert "owner/set@v2" in found.name(0)
    source(dataset_name="owner/set")
    wanted = {"config_name": "small", "split": "test", "data_dir": "in", "data_files": "*.csv"}
    none = {"config_name": "", "split": "train", "data_dir": "", "data_files": ""}
    assert asked == [
        ("owner/set", {**wanted, "revision": "v2", "token": "secret"}),
        ("owner/set", {**none, "revision": None, "token": ""}),
    ]


@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "remote"])
def test_of_several_splits_the_one_asked_for_is_read(tmp_path, remote, is_remote):
    train, test = (datasets.load_from_disk(str(written("hf", tmp_path / name))) for name in "ab")
    assert isinstance(train, datasets.Dataset) and isinstance(test, datasets.Dataset)
    splits = datasets.DatasetDict({"train": train, "test": test.select([2])})
    splits.save_to_disk(str(tmp_path / "set"))
    fsspec.filesystem("memory").put(str(tmp_path / "set"), remote, recursive=True)
    place = remote if is_remote else tmp_path / "set"
    assert content(source(place)) == expected()
    assert content(source(place, train_split="test")) == expected(SAMPLES[2:3])
    with pytest.raises(ValueError, match=r"has no split 'val', only t.*t.*; give one with --train-split"):
        source(place, train_split="val")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_paths_in_a_table_start_from_its_folder(tmp_path, remote, monkeypatch, kind):
    table = datasets.Dataset.from_dict({"image": ["in/a.png"], "text": ["a"]})
    (tmp_path / "set" / "in").mkdir(parents=True)
    (tmp_path / "set" / "in" / "a.png").write_bytes(b"picture")
    if kind == "parquet":
        table.to_parquet(str(tmp_path / "set" / "a.parquet"))
    else:
        table.save_to_disk(str(tmp_path / "saved"))
        (arrow,) = (tmp_path / "saved").glob("*.arrow")
        arrow.rename(tmp_path / "set" / "a.arrow")
    fsspec.filesystem("memory").put(str(tmp_path / "set"), remote, recursive=True)
    monkeypatch.chdir(tmp_path / "set")
    for place in (tmp_path / "set", tmp_path / "set" / f"a.{kind}", f"a.{kind}", remote, f"{remote}/a.{kind}"):
        assert content(source(place)) == [(("a",), b"picture")]


def test_records_of_latents_are_opened_by_the_model_in_natural_order(tmp_path):
    for number in (10, 9):
        write_latents(tmp_path / f"a{number}.tfrec")
    asked = []

    def latents(paths):
        asked.extend(paths)
        return read_latents(paths)

    assert len(source(tmp_path, latents=latents)) == 6
    assert asked == [tmp_path / "a9.tfrec", tmp_path / "a10.tfrec"]
    assert len(source(tmp_path / "a10.tfrec", latents=latents)) == 3


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"aspect_ratio_buckets": True}, "--aspect-ratio-buckets"),
        ({"center_crop": True}, "--center-crop"),
        ({"random_flip": True}, "--random-flip"),
        ({"caption_shuffle": True}, "--caption-shuffle"),
        ({"cache_latents_text_encoder_outputs": False}, "--no-cache-latents-text-encoder-outputs"),
    ],
)
def test_what_would_change_encoded_pictures_is_refused_with_its_flag(tmp_path, options, flag):
    write_latents(tmp_path / "a.tfrecord")
    with pytest.raises(ValueError, match=rf"^{flag}: .*encoded already; leave it out"):
        source(tmp_path, latents=read_latents, **options)
