"""Training on what was encoded once is training on pictures and captions: the same losses from the same seeds."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
import optax
import pytest
from PIL import Image
from tiny_step import TEXT, TEXT_2, UNET, VAE_CONFIG

from sdxl_eqx.config import DataConfig, DiffusionSchedulerConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from sdxl_eqx.data.batch import Batch, LatentBatch, LatentTextBatch
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.parallel.specs import put
from sdxl_eqx.training.feed import Batches, feed
from sdxl_eqx.training.inputs import Inputs
from sdxl_eqx.training.networks import Networks, split
from sdxl_eqx.training.program import Program
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.state import new_state
from sdxl_eqx.weights.model import Model

N, BATCH, STEPS = 10, 4, 4
"""Pictures, samples of a step, and steps: somewhat more than an epoch."""

SGD = optax.sgd(0.1)
"""Compiles in half of AdamW's time."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Compile without optimization."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of several sizes, each with two captions of tags."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(N):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
        coarse.resize((20 + 3 * i, 44 - 2 * i), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": [f"a, b, {i}", f"{i}, c, d, e"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def losses(pictures, unet, encoders, tmp_path_factory):
    """Trains a few steps; the kind of its batches, and the loss of each."""
    read = ModelParts.read(ModelConfig("asset:tiny-sdxl", train_new_unet=True), DiffusionSchedulerConfig(), token="")
    parts = dataclasses.replace(read, unet=UNET, vae=VAE_CONFIG, text=TEXT, text_2=TEXT_2, model=Model({}, {}))
    cache, compiled, schedule = tmp_path_factory.mktemp("cache"), {}, Schedule(parts.schedule)

    def train(*, cached: bool, **data: Any) -> tuple[type, list[float]]:
        config = TrainConfig(
            run=RunConfig(seed=11),
            model=ModelConfig(activations_dtype="float32"),
            optim=OptimConfig(per_device_batch_size=float(BATCH)),
            data=DataConfig(
                train_data_dir=str(pictures), resolution=16, random_flip=True, caption_dropout=0.3,
                dataset_save_location=str(cache), cache_latents_text_encoder_outputs=cached,
                transform_images_num_proc=2, **data,
            ),
        )  # fmt: skip
        run: Any = object.__new__(Run)
        run.config, run.data_position = config, {}
        run.inputs = Inputs(ImageFolder(str(pictures)), parts, np.zeros(0, int))
        run.program = Program.make(config, parts, jax.devices()[:1], None)
        run.encoders = jax.tree.map(put, encoders, run.layout.shardings(encoders))
        start = partial(new_state, optimizer=SGD, ema=False, key=jr.key(7))
        trained, run.frozen = split(Networks(unet, None if run.program.is_encoded else run.encoders), config)
        run.state = jax.jit(start, out_shardings=run.layout.whole)(trained)
        found = feed(run)
        batches = Batches(found.stream, found.position)
        state, seen, kind = run.state, [], Batch
        with jax.sharding.set_mesh(run.mesh):
            for _ in range(STEPS):
                batch = batches.next()
                kind = type(batch)
                if kind not in compiled:
                    compiled[kind] = run.program.jit(SGD).lower(*run.program.arguments(SGD)).compile()
                on_device = jax.tree.map(lambda x: jax.device_put(x, run.program.batch_sharding), batch)
                state, metrics = compiled[kind](state, run.frozen, on_device, schedule)
                seen.append(float(metrics["learning/loss"]))
        found.stream.close()
        return kind, seen

    return train


@pytest.fixture(scope="module")
def uncached(losses):
    """Of pictures cut in the middle."""
    kind, seen = losses(cached=False, center_crop=True)
    assert kind is Batch and np.isfinite(seen).all() and len(set(seen)) == STEPS
    return seen


def test_the_cache_changes_no_loss(losses, uncached):
    kind, seen = losses(cached=True, center_crop=True)
    assert kind is LatentBatch
    np.testing.assert_allclose(seen, uncached, rtol=1e-5)


@pytest.mark.slow
def test_a_cache_of_latents_alone_changes_no_loss(losses, uncached):
    shuffled = {"center_crop": True, "caption_shuffle": True}
    kind, seen = losses(cached=True, **shuffled)
    assert kind is LatentTextBatch
    _, wanted = losses(cached=False, **shuffled)
    np.testing.assert_allclose(seen, wanted, rtol=1e-5)
    assert not np.allclose(wanted, uncached, rtol=1e-5)  # the words' order is seen


def test_another_crop_is_seen_in_the_losses(losses, uncached):
    """What the tolerance can tell apart."""
    _, seen = losses(cached=True)
    assert not np.allclose(seen, uncached, rtol=1e-5)
