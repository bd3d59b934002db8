import contextlib
import dataclasses
import logging
from typing import Any
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_step import UNET

from sdxl_eqx.config import LoraTrainingConfig, TrainConfig
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.training.run_folder import RunFolder
from sdxl_eqx.training.setup import _check_same_model, _warn_if_frozen
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.run import Saved
from sdxl_eqx.weights.tensors import Tensor


@pytest.mark.parametrize(
    ("dtype", "rate", "warns"),
    [("bfloat16", 1e-6, True), ("bfloat16", 0.1, False), ("float32", 1e-9, False)],
)
def test_weights_that_the_learning_rate_cannot_move_are_warned_of(dtype, rate, warns, unet, caplog):
    default = TrainConfig()
    config = dataclasses.replace(
        default,
        model=dataclasses.replace(default.model, weights_dtype=dtype),
        optim=dataclasses.replace(default.optim, learning_rate=rate),
    )
    with caplog.at_level(logging.WARNING):
        _warn_if_frozen(jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), unet), config)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warns
    for message in messages:
        assert f"--weights-dtype {dtype}" in message and f"--learning-rate {rate:g}" in message
        assert "use float32 weights" in message


@pytest.mark.parametrize(
    ("trains", "was", "now", "refused"),
    [("lora", "a", "b", True), ("lora", "a", "a", False), ("lora", "", "b", False), ("unet", "a", "b", False)],
)
def test_a_lora_goes_on_only_beside_the_unet_that_it_was_begun_beside(trains, was, now, refused, tmp_path):
    parts: Any = MagicMock(unet=UNET, fingerprint=now)
    parts.__class__ = ModelParts
    parts.name = "other/model"
    config = TrainConfig(lora=LoraTrainingConfig(lora_rank=2 if trains == "lora" else 0))
    saved = Saved(UNET.to_json(), False, {}, {}, trains, frozen=was)
    folder = RunFolder(tmp_path / "mine", None)
    said = r"--run-name mine: it was begun beside another UNet than that of other/model; give the model that it was"
    with pytest.raises(ValueError, match=said) if refused else contextlib.nullcontext():
        _check_same_model(saved, config, parts, folder)


def test_the_fingerprint_of_a_unet_is_of_its_weights():
    def parts(**arrays: np.ndarray) -> ModelParts:
        one = object.__new__(ModelParts)
        tensors = {key: Tensor.of(x) for key, x in arrays.items()}
        object.__setattr__(one, "model", Model({"unet": tensors} if arrays else {}, {}))
        return one

    ones = {f"layer{i}": np.ones((2, 3), np.float32) for i in range(5)}
    first = parts(**ones).fingerprint
    assert first and first == parts(**ones).fingerprint
    assert first != parts(**{**ones, "layer3": np.full((2, 3), 1.001, np.float32)}).fingerprint
    assert parts().fingerprint == ""
