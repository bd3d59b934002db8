"""Writing a diffusers folder: whole or not at all."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import parity_models as tiny
import pytest
from safetensors import safe_open

from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.sdxl import SDXL, Encoders
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.weights.folder import write_folder
from sdxl_eqx.weights.write import model_of

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


@pytest.fixture(scope="module")
def model() -> SDXL:
    text, text_2 = (dataclasses.replace(config, vocab_size=60) for config in (tiny.TEXT, tiny.TEXT_2))
    encoders = Encoders(tiny.filled(CLIPText, text), tiny.filled(CLIPText, text_2), tiny.filled(VAE, tiny.VAE_CONFIG))
    return SDXL(tiny.filled(UNet, tiny.UNET), encoders)


def no_tokenizers(folder: Path) -> None:
    (folder / "tokenizer").mkdir()


def write(model: SDXL, folder: Path, *, tokenizers: Any = no_tokenizers, **changes: Any) -> None:
    whole = model_of(model, ScheduleConfig().to_json(), dtype=np.float32, **changes)
    write_folder(whole, folder, save_tokenizers=tokenizers, overwrite=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_every_part_is_there_with_its_config_and_nothing_else_lies_about(model: SDXL, tmp_path: Path):
    write(model, tmp_path / "out" / "sdxl")
    folder = tmp_path / "out" / "sdxl"
    assert set(contents(folder)) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{part}/{stem}.safetensors" for part, stem in STEMS.items()),
        *(f"{part}/config.json" for part in STEMS),
    }
    assert [p.name for p in folder.parent.iterdir()] == ["sdxl"]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is True
    assert {name for name, value in index.items() if isinstance(value, list) and value[0]} == {
        *STEMS,
        "scheduler",
        "tokenizer",
        "tokenizer_2",
    }


def test_files_say_that_they_are_pytorchs_so_that_transformers_loads_them(model: SDXL, tmp_path: Path):
    write(model, tmp_path / "sdxl")
    for part, stem in STEMS.items():
        with safe_open(tmp_path / "sdxl" / part / f"{stem}.safetensors", framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_folder_that_is_there_is_replaced_whole(model: SDXL, tmp_path: Path):
    folder = tmp_path / "sdxl"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "stray.bin").write_bytes(b"old")
    write(model, folder)
    assert not (folder / "unet" / "stray.bin").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["sdxl"]


@pytest.mark.parametrize("at", ["unet", "text_encoder_2", "scheduler", "tokenizers"])
def test_a_write_that_fails_leaves_the_old_folder_whole(
    at: str, model: SDXL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "sdxl"
    write(model, folder)
    before = contents(folder)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    if at == "tokenizers":
        with pytest.raises(OSError, match="disk full"):
            write(model, folder, tokenizers=fail)
    else:
        import sdxl_eqx.weights.folder as module

        name = "write_json" if at == "scheduler" else "write_file"
        original = getattr(module, name)

        def fail_there(*args: Any, **kwargs: Any) -> None:
            path = next(a for a in args if isinstance(a, Path))
            original(*args, **kwargs)
            if path.parent.name == at:
                fail()

        monkeypatch.setattr(module, name, fail_there)
        with pytest.raises(OSError, match="disk full"):
            write(model, folder)
        monkeypatch.undo()
    assert contents(folder) == before
    write(model, folder)
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["sdxl"], "the next write clears up after the failed one"
