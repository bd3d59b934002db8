"""What a run leaves for other programs, when it ends and when it has been trained on."""

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from safetensors.numpy import load_file
from tiny_step import UNET

from sdxl_eqx.config import LoraTrainingConfig, RunConfig, TrainConfig
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.training import exporting
from sdxl_eqx.training.networks import Networks, split, with_changes
from sdxl_eqx.training.setup import Run


@pytest.fixture
def trained() -> Networks:
    """A LoRA of the UNet."""
    shapes = eqx.filter_eval_shape(lambda: Networks(UNet(UNET, key=jr.key(0)), None))
    changed = eqx.filter_eval_shape(partial(with_changes, config=config(), key=jr.key(0)), shapes)
    return jax.tree.map(lambda x: jnp.ones(x.shape), split(changed, config())[0])


def config() -> TrainConfig:
    return TrainConfig(lora=LoraTrainingConfig(lora_rank=2), run=RunConfig(run_name="mine"))


def run_into(folder: Any) -> Any:
    run: Any = MagicMock(config=config(), folder=SimpleNamespace(export=folder), parts=SimpleNamespace(unet=UNET))
    run.__class__ = Run
    return run


def test_a_lora_that_was_trained_on_takes_the_place_of_the_one_before(tmp_path, trained):
    run = run_into(tmp_path / "export")
    for factor in (1.0, 2.0):
        exporting._write_lora(run, jax.tree.map(lambda x, by=factor: by * x, trained), jnp.dtype("float32"))
        names = {path.name for path in (tmp_path / "export").iterdir()}
        assert names == {"pytorch_lora_weights.safetensors", "mine.safetensors"}
        for name in names:
            arrays = load_file(tmp_path / "export" / name)
            assert all((x == factor).all() for key, x in arrays.items() if not key.endswith("alpha"))


def test_what_somebody_put_beside_a_lora_is_not_taken_away(tmp_path, trained):
    run = run_into(tmp_path / "export")
    exporting._write_lora(run, trained, jnp.dtype("float32"))
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which no conversion wrote"):
        exporting._write_lora(run, trained, jnp.dtype("float32"))
    assert (tmp_path / "export" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "export" / "mine.safetensors").exists()
