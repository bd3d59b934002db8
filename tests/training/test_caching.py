"""Encoding a data set without training: what is refused, and what is said at the end."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_step import TEXT, TEXT_2, UNET, VAE_CONFIG

from sdxl_eqx.config import DataConfig, DiffusionSchedulerConfig, ModelConfig, RunConfig, TrainConfig
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.training import caching
from sdxl_eqx.training.caching import CacheSummary, cache_dataset
from sdxl_eqx.training.inputs import Inputs
from sdxl_eqx.weights.model import Model

N = 4


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Compiles without optimization, and puts JAX's settings back, which caching changes."""
    names = ("jax_default_matmul_precision", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    before["jax_disable_most_optimizations"] = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of which one has no header and one no end."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
    for i, end in ((1, 8), (2, 300)):
        (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:end])
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(N)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> TrainConfig:
    """A config that works."""
    return TrainConfig(
        run=RunConfig(hardware="cpu", jax_cache_dir="none"),
        model=ModelConfig(activations_dtype="float32"),
        data=DataConfig(train_data_dir=str(folder), resolution=16, dataset_save_location=str(tmp_path / "cache")),
    )


@pytest.fixture
def opened(monkeypatch, encoders: Encoders) -> list[Any]:
    """Puts the small model in place of the config's; what was opened."""
    read = ModelParts.read(ModelConfig("asset:tiny-sdxl", train_new_unet=True), DiffusionSchedulerConfig(), token="")
    parts = dataclasses.replace(read, unet=UNET, vae=VAE_CONFIG, text=TEXT, text_2=TEXT_2, model=Model({}, {}))
    found: list[Any] = []

    def open_them(config: TrainConfig) -> Inputs:
        source = ImageFolder(config.data.train_data_dir)
        if config.data.dataset_type == "tfrecord":
            source = object.__new__(LatentRecords)
        found.append(source)
        return Inputs(source, parts, np.zeros(0, int))

    monkeypatch.setattr(caching, "read_data_and_model", open_them)
    monkeypatch.setattr(ModelParts, "encoders", lambda self, config, layout, *, key: encoders)
    return found


def changed(config: TrainConfig, **data: Any) -> TrainConfig:
    """The config with other data."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def test_what_can_be_used_is_encoded_and_what_cannot_is_counted_and_again_it_says_the_same(
    config, opened, tmp_path, caplog
):
    with caplog.at_level("INFO", "sdxl_eqx"):
        summary = cache_dataset(config)
        assert summary == CacheSummary(tmp_path / "cache", N - 2, 2)
        assert f"{N} samples on 8 cpu (data 8)" in caplog.text
        assert f"encoding {N - 1} pictures and {N} captions once" in caplog.text
        files = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
        caplog.clear()
        assert cache_dataset(config) == summary
    assert sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file()) == files


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"dataset_save_location": ""}, "^--dataset-save-location: name the folder .* give the same to train.py"),
        (
            {"cache_latents_text_encoder_outputs": False},
            "^--no-cache-latents-text-encoder-outputs: there is nothing to cache then; leave it out",
        ),
    ],
)
def test_a_config_that_caches_nothing_or_nowhere_is_refused_before_anything_is_opened(config, opened, data, says):
    with pytest.raises(ValueError, match=says):
        cache_dataset(changed(config, **data))
    assert opened == []


def test_what_is_encoded_already_is_refused(config, opened, tmp_path):
    with pytest.raises(ValueError, match=r"--dataset-type tfrecord: is encoded already; train on it as it is\."):
        cache_dataset(changed(config, dataset_type="tfrecord"))
    assert opened and not (tmp_path / "cache").exists()


def test_a_resolution_that_the_model_cannot_take_is_refused_before_anything_is_encoded(config, opened, tmp_path):
    with pytest.raises(ValueError, match="--resolution 17: this model divides sides by 2; use a multiple of 2"):
        cache_dataset(changed(config, resolution=17))
    assert opened and not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_an_error_of_the_disk(config, opened, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cache"):
        cache_dataset(config)


def test_a_damaged_cache_names_the_file_and_the_remedy(config, opened, tmp_path):
    (tmp_path / "cache" / "pictures").mkdir(parents=True)
    (tmp_path / "cache" / "pictures" / "0.array_record").write_bytes(b"no records")
    with pytest.raises(ValueError, match=r"0\.array_record is no complete cache .*delete it"):
        cache_dataset(config)
