"""What a ControlNet sees, and captions for pictures that have none, whatever kind of data set holds them."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_sets import FORMATS, Sample

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources import Conditioned, texts_or
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.sources.joined import Joined, Picked
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.data.sources.open import open_source
from sdxl_eqx.data.sources.tars import Tars

COLUMN = "conditioning_image"
SAMPLES = [Sample(f"{i}.png", b"picture %d" % i, (f"caption {i}",), b"map %d" % i if i != 2 else b"") for i in range(4)]
"""Of the third one a ControlNet can see nothing."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root)
    monkeypatch.setenv("HOME", str(root))


def no_latents(paths) -> LatentRecords:
    raise AssertionError(f"{paths} are no latents")


def written(kind: str, folder: Path, samples: list[Sample]) -> Path:
    folder.mkdir()
    FORMATS[kind](folder, samples, 2)
    return folder


def opened(folder: Path, **options: Any) -> Any:
    return open_source(DataConfig(train_data_dir=str(folder)), seed=0, token="", latents=no_latents, **options)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_kind_has_what_a_controlnet_sees_of_a_sample_or_names_the_one_without(kind, tmp_path):
    source = opened(written(kind, tmp_path / "set", SAMPLES), condition_column=COLUMN)
    assert isinstance(source, Conditioned)
    assert [source.condition(i) for i in (0, 1, 3)] == [b"map 0", b"map 1", b"map 3"]
    assert [source.picture(i) for i in range(4)] == [one.data for one in SAMPLES]
    with pytest.raises(BadSample) as bad:
        source.condition(2)
    assert bad.value.name == source.name(2)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_set_without_the_column_is_refused_with_the_flag(kind, tmp_path):
    folder = written(kind, tmp_path / "set", SAMPLES)
    with pytest.raises(ValueError, match=r"'edges'.*--conditioning-image-column names the"):
        opened(folder, condition_column="edges")


@pytest.mark.parametrize("kind", FORMATS)
def test_what_a_controlnet_sees_is_no_picture_where_none_is_trained(kind, tmp_path, caplog):
    source = opened(written(kind, tmp_path / "set", SAMPLES))
    assert [source.picture(i) for i in range(len(source))] == [one.data for one in SAMPLES]
    with pytest.raises(BadSample):
        source.condition(0)


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_without_captions_take_the_one_for_all(kind, tmp_path):
    some = [Sample(one.name, one.data, ()) for one in SAMPLES]
    if kind != "parquet" and kind != "hf":  # in a table a column is there for all rows
        some[1] = SAMPLES[1]
    folder = written(kind, tmp_path / "set", some)
    source = opened(folder, caption="a dog")
    assert [source.captions(i) for i in range(4)] == [one.captions or ("a dog",) for one in some]
    assert [source.picture(i) for i in range(4)] == [one.data for one in SAMPLES]


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord", "imagefolder", "webdataset"])
def test_captions_that_are_blank_or_missing_among_others_take_the_one_for_all(kind, tmp_path):
    some = [SAMPLES[0], Sample("1.png", b"picture 1", ("",)), Sample("2.png", b"picture 2", (" ", "seen"))]
    source = opened(written(kind, tmp_path / "set", some), caption="a dog")
    assert [source.captions(i) for i in range(3)] == [("caption 0",), ("a dog",), ("seen",)]
    source = opened(tmp_path / "set")
    assert source.captions(2) == (" ", "seen")


def test_blank_captions_stay_where_there_is_no_other():
    assert texts_or(["", "a"], "") == ("", "a")
    assert texts_or(["", "a"], "b") == ("a",)
    assert texts_or([" "], "b") == ("b",)


def lines(folder: Path, *fields: dict[str, Any]) -> Path:
    for name in ("a.png", "b.png", "maps/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"text": "t", **one}) for one in fields))
    return folder


@pytest.mark.parametrize("field", [COLUMN, f"{COLUMN}_file_name"])
def test_a_line_of_a_folder_names_the_map_under_either_name(field, tmp_path, caplog):
    folder = lines(tmp_path, {"file_name": "a.png", field: "./maps/a.png"}, {"file_name": "b.png", field: ""})
    source = ImageFolder(str(folder), condition_column=COLUMN)
    assert source.condition(0) == b"maps/a.png"
    with pytest.raises(BadSample, match=r"b.png: its line has no conditioning_image or conditioning_image_file_name"):
        source.condition(1)
    assert not caplog.records, "a map is no picture that was left out"


def test_a_map_that_is_not_there_is_a_bad_sample_and_one_outside_the_folder_refused(tmp_path):
    folder = lines(tmp_path, {"file_name": "a.png", COLUMN: "maps/b.png"})
    with pytest.raises(BadSample, match=r"a.png: what a ControlNet sees, maps/b.png: .*No such file"):
        ImageFolder(str(folder), condition_column=COLUMN).condition(0)
    for path, rule in (("../a.png", "leaves the folder"), (3, "must be a path, not 3")):
        lines(tmp_path, {"file_name": "a.png", COLUMN: path})
        with pytest.raises(ValueError, match=f"line 1: .*{rule}"):
            ImageFolder(str(folder), condition_column=COLUMN)


def test_pictures_with_texts_alone_have_no_maps(tmp_path):
    for name in ("a.png", "a.txt"):
        (tmp_path / name).write_text("a")
    with pytest.raises(ValueError, match=r"no metadata\.jsonl and no metadata\.csv to name what a ControlNet sees"):
        ImageFolder(str(tmp_path), condition_column=COLUMN)


def test_a_folder_of_pictures_alone_is_one_where_there_is_a_caption_for_all(tmp_path, caplog):
    for name in ("a.png", "b.png", "c.png", "b.txt", "c.txt"):
        (tmp_path / name).write_text({"b.txt": "own\nmore", "c.txt": " \n"}.get(name, name))
    with caplog.at_level(logging.WARNING, "sdxl_eqx"):
        source = ImageFolder(str(tmp_path), caption="a dog")
    assert [(source.name(i), source.captions(i)) for i in range(3)] == [
        ("a.png", ("a dog",)), ("b.png", ("own",)), ("c.png", ("a dog",)),
    ]  # fmt: skip
    assert "1 of 3 texts of" in caplog.text


def test_keys_without_a_caption_are_samples_of_a_tar_only_where_there_is_one_for_all(tmp_path, caplog):
    some = [SAMPLES[0], Sample("1.png", b"picture 1", ())]
    folder = written("webdataset", tmp_path / "set", some)
    paths = [str(path) for path in folder.glob("*.tar")]
    assert len(Tars(paths)) == 1 and "1 keys with a picture and no caption" in caplog.text
    caplog.clear()
    assert len(Tars(paths, caption="a dog")) == 2 and not caplog.records


def test_sources_made_of_others_have_what_these_have(tmp_path):
    own = opened(written("imagefolder", tmp_path / "set", SAMPLES), condition_column=COLUMN)
    picked = Picked(own, np.array([3, 0, 3]))
    both = Joined({"some": picked, "all": own})
    assert [both.condition(i) for i in (0, 1, 2, 3)] == [b"map 3", b"map 0", b"map 3", b"map 0"]
    assert [both.picture(i, 9) for i in (0, 3)] == [b"picture 3", b"picture 0"]
    assert [both.captions(i) for i in (1, 2)] == [("caption 0",), ("caption 3",)]
    assert [both.name(i) for i in (0, 3, 6)] == ["some: 3.png", "all: 0.png", "all: 3.png"]
    assert (len(picked), len(both)) == (3, 7)


def test_latents_that_are_encoded_go_with_neither(tmp_path):
    (tmp_path / "a.tfrecord").touch()
    with pytest.raises(ValueError, match=r"^--train-controlnet: has no effect on TFRecords of latents"):
        opened(tmp_path, condition_column=COLUMN)
    with pytest.raises(ValueError, match=r"^--instance-prompt: has no effect on TFRecords of latents"):
        opened(tmp_path, caption="a dog")
