import dataclasses
import logging

import jax
import jax.numpy as jnp
import pytest

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.training.setup import _warn_if_frozen


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
