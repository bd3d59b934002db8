"""The denoising loop with guidance: diffusers' latents from the golden file, and what must not change them."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_models as tiny
import pytest

from sdxl_eqx.models.controlnet import ControlNet
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.sampling.conditioning import Prompt
from sdxl_eqx.sampling.pipeline import Hint, Kept, Manner, initial_noise, step_noise
from sdxl_eqx.sampling.schedulers.level import Level


def test_a_guided_trajectory_is_diffusers():
    inputs, other = (tiny.unet_inputs(tiny.UNET, (12, 10), seed=seed) for seed in (0, 1))
    latents = tiny.drawn(tiny.filled(UNet, tiny.UNET), inputs, other, **tiny.GUIDED)
    wanted = tiny.read_golden("trajectory")["latents"]
    tiny.assert_close(latents / np.std(wanted), wanted / np.std(wanted), 1e-4)


def test_a_seeds_noise_is_the_same_in_whatever_batch_it_stands():
    alone = initial_noise([7], (4, 6, 4))
    among = initial_noise([3, 7, 11], (4, 6, 4))
    np.testing.assert_array_equal(alone[0], among[1])
    assert not np.array_equal(jax.device_get(among)[0], jax.device_get(among)[1])


def test_a_seeds_fresh_noise_is_another_at_each_step_and_the_same_in_whatever_batch():
    keys = jnp.stack([jr.key(seed) for seed in (3, 7)])
    first, second = (step_noise(keys, jnp.int32(i), (2, 4, 6, 4)) for i in (0, 1))
    np.testing.assert_array_equal(first[1], step_noise(keys[1:], jnp.int32(0), (1, 4, 6, 4))[0])
    assert not np.array_equal(jax.device_get(first), jax.device_get(second))
    assert not np.array_equal(jax.device_get(first)[0], jax.device_get(initial_noise([3], (4, 6, 4)))[0])


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.0, 1.0), [7, 7, 7, 7]), ((0.25, 0.75), [1, 7, 7, 1]), ((0.0, 0.0), [1, 1, 1, 1]), ((0.5, 1.0), [1, 1, 7, 7])],
)
def test_guidance_is_on_within_its_interval(interval, expected):
    manner = Manner(4, 7.0, guidance_interval=interval)
    assert manner.scales(0, 4, 4).tolist() == expected
    assert manner.scales(1, 3, 4).tolist() == expected[1:3]


def test_a_controlnet_takes_part_from_its_start_to_its_end():
    net = eqx.filter_eval_shape(ControlNet, tiny.CONTROLNET, key=jr.key(0))
    hint = Hint(net, np.zeros((1, 8, 8, 3), np.float32), scale=0.5, start=0.25, end=0.75)
    assert hint.scales(4).tolist() == [0, 0.5, 0.5, 0]


def test_what_is_kept_lies_outside_of_the_mask_at_the_level_of_the_rest():
    x, x0, eps = (jnp.full((1, 2, 2, 4), value) for value in (5.0, 1.0, 2.0))
    mask = jnp.asarray([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 2, 1)
    level = Level(jnp.float32(1), jnp.float32(3), jnp.float32(0), jnp.int32(0))
    blended = Kept(x0, eps, mask).blend(x, level)
    np.testing.assert_array_equal(blended[0, :, :, 0], [[5, 7], [7, 5]])


def test_time_ids_of_a_prompt_fall_back_to_the_pictures_own_and_the_positive_ones():
    size = (64, 48)
    assert Prompt("a").time_ids(size) == [64, 48, 0, 0, 64, 48]
    assert Prompt("a").time_ids(size, negative=True) == [64, 48, 0, 0, 64, 48]
    told = Prompt("a", original_size=(9, 8), crops_coords_top_left=(1, 2), target_size=(7, 6))
    assert told.time_ids(size) == [9, 8, 1, 2, 7, 6]
    other = dataclasses.replace(told, negative_target_size=(5, 4))
    assert other.time_ids(size, negative=True) == [9, 8, 1, 2, 5, 4]
    assert Prompt("a").time_ids(size, aesthetic=True) == [64, 48, 0, 0, 6.0]
    assert Prompt("a").time_ids(size, aesthetic=True, negative=True) == [64, 48, 0, 0, 2.5]
