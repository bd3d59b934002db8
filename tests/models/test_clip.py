"""The text encoders: transformers' numbers from the golden files, and where they pool."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import parity_models as tiny
import parity_published as published
import pytest
from parity_models import TEXT, TEXT_2, assert_close, read_golden

from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return read_golden("text")


def test_the_bundled_tokenizers_give_the_ids_of_the_golden_files(golden: dict[str, np.ndarray]):
    for ours, name in zip(tiny.prompt_ids(), ("first", "second"), strict=True):
        np.testing.assert_array_equal(ours, golden[f"{name}.ids"])


@pytest.mark.parametrize("eos", [2, 49407])
@pytest.mark.parametrize("config, name", [(TEXT, "first"), (TEXT_2, "second")], ids=["first", "second"])
def test_hidden_states_and_pooled_embedding_are_transformers(
    config: CLIPTextConfig, name: str, eos: int, golden: dict[str, np.ndarray]
):
    encoder = tiny.filled(CLIPText, dataclasses.replace(config, eos_token_id=eos))
    penultimate, pooled = tiny.run_text(encoder, jnp.asarray(golden[f"{name}.ids"]))
    assert_close(penultimate, golden[f"{name}.penultimate"], 1e-4)
    assert_close(pooled, golden[f"{name}.pooled"], 1e-4)


def test_what_follows_the_first_end_token_does_not_reach_the_pooled_embedding(golden: dict[str, np.ndarray]):
    ids = golden["first.ids"]
    assert (ids[:2, -2:] == 49407).all(), "the first tokenizer pads with the end token itself"
    encoder = tiny.filled(CLIPText, TEXT)
    after = np.arange(ids.shape[1]) > np.argmax(ids == 49407, axis=1)[:, None]
    _, pooled = tiny.run_text(encoder, jnp.asarray(ids))
    _, other = tiny.run_text(encoder, jnp.asarray(np.where(after, 320, ids)))
    np.testing.assert_allclose(pooled, other, rtol=0, atol=1e-6)


def test_only_an_explicit_eos_token_id_survives_tokens_beyond_the_vocabulary():
    ids = jnp.asarray([[49406, 320, 49500, 49407, 49407]])
    config = dataclasses.replace(TEXT, vocab_size=49501, num_hidden_layers=2)
    legacy, explicit = (
        tiny.filled(CLIPText, dataclasses.replace(config, eos_token_id=eos))._end(ids).tolist() for eos in (2, 49407)
    )
    assert (legacy, explicit) == ([2], [3])


def test_the_published_configs_are_read_as_the_encoders_that_are_built_in():
    for json, config, projection in (
        (published.TEXT, CLIPTextConfig.sdxl_base(), False),
        (published.TEXT_2, CLIPTextConfig.sdxl_base_2(), True),
    ):
        read = CLIPTextConfig.from_json(json, projection=projection)
        assert read == dataclasses.replace(config, eos_token_id=2)
        assert CLIPTextConfig.from_json(read.to_json(), projection=projection) == read


def test_an_activation_that_sdxl_does_not_use_is_refused_by_name():
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        CLIPTextConfig.from_json({**published.TEXT, "hidden_act": "relu"}, projection=False)
