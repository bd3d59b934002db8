"""Where each array lies in a file."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import parity_models as tiny
import pytest

from sdxl_eqx.weights.names import is_stacked, places

MODELS = list(tiny.FULL)


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_of_the_published_model_are_those_of_the_golden_table(name: str):
    golden = json.loads((tiny.GOLDEN / "keys.json").read_text(encoding="utf-8"))
    assert tiny.table(tiny.shapes_of(*tiny.FULL[name])) == golden[name]


def test_the_base_unet_has_2567463684_parameters():
    make, config = tiny.FULL["unet"]
    skeleton = eqx.filter_eval_shape(make, config, key=jr.key(0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(skeleton)) == 2_567_463_684


@pytest.mark.parametrize("name", MODELS)
def test_each_array_has_one_place_and_each_key_one_array(name: str):
    make, config = tiny.FULL[name]
    skeleton = eqx.filter_eval_shape(make, config, key=jr.key(0))
    found = places(skeleton)
    leaves = jax.tree.leaves(skeleton)
    assert len(found) == len(leaves)
    keys = [key for place in found for key in place.keys]
    assert len(keys) == len(set(keys))
    for place, leaf in zip(found, leaves, strict=True):
        assert len(place.keys) == (leaf.shape[0] if place.stacked else 1)
        assert place.stacked == is_stacked(place.path)
        assert len(place.keys) * int(np.prod(place.shape)) == int(np.prod(leaf.shape))


def test_a_prefix_comes_before_every_key():
    make, config = tiny.FULL["vae"]
    skeleton = eqx.filter_eval_shape(make, config, key=jr.key(0))
    plain, prefixed = places(skeleton), places(skeleton, prefix="first_stage_model.")
    assert [p.keys for p in prefixed] == [tuple(f"first_stage_model.{key}" for key in p.keys) for p in plain]


@pytest.mark.parametrize("array_shape", [(3, 3, 5, 7), (1, 1, 4, 4)])
def test_convolutions_are_turned_round_and_back(array_shape: tuple[int, ...]):
    array = tiny.generator("conv").standard_normal(array_shape)
    (place,) = places({"conv": {"weight": array}})
    (stored,) = place.to_file(array).values()
    assert stored.shape == place.shape == (array_shape[3], array_shape[2], *array_shape[:2])
    assert stored[1, 2, 0, 0] == array[0, 0, 2, 1]
    np.testing.assert_array_equal(place.from_file({"conv.weight": stored}), array)


def test_slices_of_a_stack_are_numbered_in_order():
    array: Any = np.arange(24.0).reshape(3, 2, 4)
    (place,) = places({"transformer_blocks": {"ff": array}})
    stored = place.to_file(array)
    assert list(stored) == [f"transformer_blocks.{i}.ff" for i in range(3)]
    np.testing.assert_array_equal(stored["transformer_blocks.1.ff"], array[1])
    np.testing.assert_array_equal(place.from_file(stored), array)
