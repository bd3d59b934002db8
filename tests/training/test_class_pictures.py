"""Pictures of a class that the model draws: as many as lack, the same ones after any interruption, and no others."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.config import GenerateConfig, TrainConfig
from sdxl_eqx.flags import merge
from sdxl_eqx.generation.memory import OutOfMemory
from sdxl_eqx.training import class_pictures
from sdxl_eqx.training.class_pictures import draw_class_pictures, make_class_pictures


class Drawer:
    """Draws pictures that show their seed, and remembers what it was asked for."""

    def __init__(self, fails_at: int = -1):
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.fails_at = fails_at

    def __call__(self, prompt, /, *, seeds):
        if len(self.asked) == self.fails_at:
            raise RuntimeError("the power went")
        self.asked.append((prompt, tuple(seeds)))
        return np.stack([np.full((4, 6, 3), seed % 256, np.uint8) for seed in seeds])


def seen(folder: Path) -> dict[str, int]:
    """The seed that each picture shows."""
    return {path.name: int(np.asarray(Image.open(path))[0, 0, 0]) for path in sorted(folder.iterdir())}


def test_an_empty_folder_is_filled_and_a_full_one_left_alone(tmp_path):
    draw, folder = Drawer(), tmp_path / "new" / "dogs"
    assert make_class_pictures(draw, folder, "a dog", 5, 7, at_once=2) == 5
    assert draw.asked == [("a dog", (7, 8)), ("a dog", (9, 10)), ("a dog", (11,))]
    assert seen(folder) == {f"class_{i:05d}.png": 7 + i for i in range(5)}
    assert make_class_pictures(draw, folder, "a dog", 5, 7) == 0
    assert make_class_pictures(draw, folder, "a dog", 3, 7) == 0
    assert len(draw.asked) == 3 and len(seen(folder)) == 5


@pytest.mark.parametrize("own", [0, 2])
def test_what_was_interrupted_goes_on_and_ends_with_the_same_pictures(tmp_path, own):
    for folder in ("once", "twice"):
        (tmp_path / folder).mkdir()
        for i in range(own):
            Image.new("RGB", (4, 4), (200 + i,) * 3).save(tmp_path / folder / f"mine{i}.png")
    make_class_pictures(Drawer(), tmp_path / "once", "a dog", 6, 0)
    with pytest.raises(RuntimeError, match="the power went"):
        make_class_pictures(Drawer(fails_at=2), tmp_path / "twice", "a dog", 6, 0)
    assert len(seen(tmp_path / "twice")) == own + 2
    assert make_class_pictures(Drawer(), tmp_path / "twice", "a dog", 6, 0) == 4 - own
    assert seen(tmp_path / "twice") == seen(tmp_path / "once") and len(seen(tmp_path / "once")) == 6


def test_a_picture_that_is_half_written_is_none(tmp_path, monkeypatch):
    def torn(self, file, kind):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        make_class_pictures(Drawer(), tmp_path, "a dog", 2, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_gap_is_filled_and_hidden_files_and_texts_are_no_pictures(tmp_path):
    make_class_pictures(Drawer(), tmp_path, "a dog", 4, 0)
    (tmp_path / "class_00001.png").unlink()
    for name in (".hidden.png", "class_00000.txt"):
        (tmp_path / name).write_text("a")
    assert make_class_pictures(Drawer(), tmp_path, "a dog", 4, 0) == 1
    assert (tmp_path / "class_00001.png").exists() and not (tmp_path / "class_00004.png").exists()


def config(folder: Path | str, **values: Any) -> TrainConfig:
    named = {"class_data_dir": str(folder), "class_prompt": "a dog", "num_class_images": 3, "seed": 9}
    return merge(TrainConfig(), {**named, **values})


def nothing(config: TrainConfig) -> None:
    """A check that finds nothing wrong."""


@pytest.fixture
def loaded(monkeypatch) -> list[GenerateConfig]:
    """What pipelines were made of, in whose place a `Drawer` draws two at once."""
    made = []

    class Pipeline(Drawer):
        drawing = dataclasses.make_dataclass("Drawing", [("shares", int)])(2)

        @classmethod
        def of(cls, asked: GenerateConfig) -> "Pipeline":
            asked.check()
            made.append(asked)
            return cls()

    monkeypatch.setattr(class_pictures, "Pipeline", Pipeline)
    return made


def test_the_model_of_the_run_draws_what_lacks_as_its_samples_are_drawn(tmp_path, loaded):
    values = {"pretrained_model_name_or_path": "models/mine", "num_inference_steps": 7, "guidance_scale": 3.0,
              "ici_fsdp_parallelism": 2, "attention": "dot_product", "hf_access_token": "hf_secret"}  # fmt: skip
    assert draw_class_pictures(config(tmp_path / "dogs", **values), nothing) == 3
    assert seen(tmp_path / "dogs") == {f"class_{i:05d}.png": 9 + i for i in range(3)}
    (asked,) = loaded
    assert asked.model.pretrained_model_name_or_path == "models/mine" and asked.model.hf_access_token == "hf_secret"
    assert (asked.picture.prompt, asked.picture.num_inference_steps, asked.picture.guidance_scale) == ("a dog", 7, 3.0)
    assert (asked.parallel.ici_fsdp_parallelism, asked.attention.attention) == (2, "dot_product")
    assert draw_class_pictures(config(tmp_path / "dogs", **values), nothing) == 0
    assert len(loaded) == 1, "where nothing lacks no model is loaded"


def test_nothing_is_drawn_where_there_is_no_class(loaded):
    assert draw_class_pictures(TrainConfig(), nothing) == 0 and not loaded


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"train_new_unet": True},
            "holds 0 pictures, and --num-class-images asks for 3; with --train-new-unet the mod",
        ),
        ({"new_text_encoders": True}, "with --new-text-encoders the model can draw none yet: put pictures there"),
    ],
)
def test_a_model_that_can_draw_nothing_is_refused_before_it_is_loaded(tmp_path, loaded, values, says):
    with pytest.raises(ValueError, match=f"^--class-data-dir .*{says}"):
        draw_class_pictures(config(tmp_path, **values), nothing)
    assert not loaded


def test_a_folder_with_metadata_is_not_drawn_into(tmp_path, loaded):
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match=r"its samples are the lines of .*metadata\.jsonl, to which none are drawn"):
        draw_class_pictures(config(tmp_path), nothing)
    assert not loaded


def test_whatever_else_is_wrong_is_said_before_a_picture_is_drawn(tmp_path, loaded):
    seen_first = []

    def wrong(config: TrainConfig) -> None:
        seen_first.append(config.dreambooth)
        raise ValueError("--train-data-dir nowhere: is no folder")

    with pytest.raises(ValueError, match="nowhere"):
        draw_class_pictures(config(tmp_path / "dogs"), wrong)
    assert not loaded and not (tmp_path / "dogs").exists()
    assert seen_first[0].class_data_dir == "", "a run without what lacks"


@pytest.mark.parametrize(("place", "subject"), [("a/dogs", "a"), ("a", "a/mine"), ("a", "a")])
def test_nothing_is_drawn_into_the_folder_of_the_subject(tmp_path, loaded, place, subject):
    with pytest.raises(ValueError, match=r"^--class-data-dir .*must lie outside --train-data-dir"):
        draw_class_pictures(config(tmp_path / place, train_data_dir=str(tmp_path / subject)), nothing)
    assert not loaded and not (tmp_path / place).exists()


def test_a_model_that_does_not_fit_the_devices_is_an_error_of_the_flag(tmp_path, loaded, monkeypatch):
    def full(asked: GenerateConfig) -> None:
        raise OutOfMemory("out of memory: the model does not fit")

    monkeypatch.setattr(class_pictures.Pipeline, "of", full)
    with pytest.raises(ValueError, match=r"^--class-data-dir .*out of memory: the model does not fit.*generate\.py"):
        draw_class_pictures(config(tmp_path / "dogs"), nothing)
