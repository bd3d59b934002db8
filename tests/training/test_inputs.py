"""What of the flags of ControlNets and DreamBooth reaches the data."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.data.sources import Conditioned
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.flags import merge
from sdxl_eqx.training import inputs
from sdxl_eqx.training.inputs import Inputs, read_data_and_model


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Data alone are opened."""
    monkeypatch.setattr(inputs.ModelParts, "read", lambda *args, **options: object.__new__(inputs.ModelParts))


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 16), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


def opened(folder: Path, **values: Any) -> Any:
    return read_data_and_model(merge(TrainConfig(), {"train_data_dir": str(folder), **values}))


def subject(tmp_path: Path, **values: Any) -> Any:
    """Three pictures of a subject and five of its class, of which four are asked for."""
    pictures(tmp_path / "mine", 3)
    pictures(tmp_path / "dogs", 5)
    named = {"instance_prompt": "a sks dog", "class_data_dir": str(tmp_path / "dogs"), "class_prompt": "a dog",
             "prior_loss_weight": 0.3, "num_class_images": 4}  # fmt: skip
    return opened(tmp_path / "mine", **{**named, **values})


def test_a_subject_alone_is_a_folder_without_captions_and_without_weights(tmp_path):
    found = opened(pictures(tmp_path / "mine", 3), instance_prompt="a sks dog")
    assert [found.source.captions(i) for i in range(3)] == [("a sks dog",)] * 3
    assert found.weights is None and found.trained_on == 3


def test_a_class_beside_it_comes_as_often_with_its_own_caption_and_weight(tmp_path):
    found = subject(tmp_path)
    assert [found.source.captions(i) for i in range(8)] == [("a sks dog",), ("a dog",)] * 4
    np.testing.assert_array_equal(found.weights, np.array([1, 0.3] * 4, np.float32))
    assert [found.source.name(i) for i in range(0, 8, 2)] == [f"instance: {i}.png" for i in (0, 1, 2, 0)]
    assert [found.source.name(i) for i in range(1, 8, 2)] == [f"class: {i}.png" for i in range(4)]
    assert found.trained_on == 8 and len(found.held) == 0


def test_samples_of_the_subject_are_held_out_of_it_with_all_their_copies(tmp_path):
    found = subject(tmp_path, eval_split="0.3")
    held = [found.source.name(int(i)).removeprefix("held out: ") for i in found.held]
    trained = [found.source.name(i) for i in range(found.trained_on)]
    assert len(held) == 1 and found.trained_on == 8
    assert {name for name in trained if name.startswith("instance")} == {
        f"instance: {i}.png" for i in range(3) if f"{i}.png" not in held
    }
    assert all(found.source.captions(int(i)) == ("a sks dog",) for i in found.held)


def test_fewer_pictures_of_the_class_than_are_asked_for_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^--class-data-dir .*dogs: holds 5 pictures, and --num-class-images asks fo"):
        subject(tmp_path, num_class_images=6)


@pytest.mark.parametrize("inner", ["mine", "dogs"])
def test_a_class_inside_the_subject_s_folder_or_around_it_is_refused(tmp_path, inner):
    outer = pictures(tmp_path / "outer", 2)
    pictures(outer / "inner", 2)
    folders = (outer / "inner", outer) if inner == "mine" else (outer, outer / "inner")
    with pytest.raises(ValueError, match=r"^--class-data-dir .*must lie outside --train-data-dir"):
        opened(folders[0], instance_prompt="a", class_data_dir=str(folders[1]), class_prompt="b", num_class_images=1)


def test_records_of_latents_have_no_class_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_open_latents", lambda parts, paths, *, data: object.__new__(LatentRecords))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.tfrecord").touch()
    pictures(tmp_path / "dogs", 1)
    with pytest.raises(ValueError, match=r"^--class-data-dir: TFRecords of latents are encoded already"):
        opened(tmp_path / "mine", class_data_dir=str(tmp_path / "dogs"), class_prompt="b", num_class_images=1)


def test_records_of_latents_train_no_text_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_open_latents", lambda parts, paths, *, data: object.__new__(LatentRecords))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.tfrecord").touch()
    with pytest.raises(ValueError, match=r"^--train-text-encoder: TFRecords hold text that is encoded already"):
        opened(tmp_path / "mine", train_text_encoder=True)


@pytest.mark.parametrize("trains", [False, True])
def test_maps_are_looked_for_only_where_a_controlnet_is_trained(tmp_path, trains):
    folder = pictures(tmp_path / "mine", 2)
    fields = {"file_name": "0.png", "text": "a", "edges": "1.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(fields))
    asked = {"train_controlnet": trains, "conditioning_image_column": "edges"}
    source = opened(folder, **asked).source
    assert isinstance(source, Conditioned)
    if trains:
        assert source.condition(0) == (folder / "1.png").read_bytes()
    asked["conditioning_image_column"] = "conditioning_image"
    if trains:
        with pytest.raises(ValueError, match="--conditioning-image-column names the one to read"):
            opened(folder, **asked)
    else:
        opened(folder, **asked)


def test_inputs_without_weights_are_made_as_before():
    assert [field.name for field in dataclasses.fields(Inputs)][-1] == "weights"
    assert Inputs.__dataclass_fields__["weights"].default is None
