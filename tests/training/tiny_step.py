"""A very small SDXL and batches for it, in memory, and its step compiled once."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sdxl_eqx.config import OptimConfig, TrainConfig
from sdxl_eqx.data.batch import Batch, LatentBatch
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.training.networks import Networks, split
from sdxl_eqx.training.optimizer import learning_rate, make_optimizer
from sdxl_eqx.training.state import TrainState, new_state
from sdxl_eqx.training.step import StepConfig, train_step

UNET = dataclasses.replace(
    UNetConfig.tiny(),
    block_out_channels=(8,),
    attention_levels=(True,),
    transformer_layers=(2,),
    heads=(2,),
    cross_attention_dim=32,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=16 + 6 * 4,
    norm_num_groups=2,
)
VAE_CONFIG = dataclasses.replace(VAEConfig.tiny(), block_out_channels=(8, 8), norm_num_groups=2)
TEXT = dataclasses.replace(CLIPTextConfig.tiny(), hidden_size=16, intermediate_size=32)
TEXT_2 = dataclasses.replace(TEXT, hidden_act="gelu", projection_dim=16)
QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options: half the time to compile, the same rounding on every call."""


def random_model(make: Callable[[], Any], seed: int) -> Any:
    """A model filled by NumPy, which takes no compilation; norms keep a scale near 1."""
    rng = np.random.default_rng(seed)

    def fill(x: Any) -> Any:
        scale = 1 / np.sqrt(max(np.prod(x.shape[:-1]), 1)) if x.ndim > 1 else 0.1
        return jnp.asarray(scale * rng.standard_normal(x.shape) + (x.ndim == 1), x.dtype)

    return jax.tree.map(fill, eqx.filter_eval_shape(make))


FROZEN = split(Networks(eqx.filter_eval_shape(UNet, UNET, key=jr.key(0)), None), TrainConfig())[1]
"""What does not train beside the whole UNet where batches are encoded: nothing."""


@pytest.fixture(scope="session")
def unet() -> UNet:
    """A random UNet."""
    return random_model(lambda: UNet(UNET, key=jr.key(0)), 0)


@pytest.fixture(scope="session")
def encoders() -> Encoders:
    """Random encoders."""

    def make() -> Encoders:
        key = jr.key(0)
        return Encoders(CLIPText(TEXT, key=key), CLIPText(TEXT_2, key=key), VAE(VAE_CONFIG, key=key))

    return random_model(make, 1)


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    """SDXL's."""
    return Schedule(ScheduleConfig())


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Pictures of 16 x 16 and captions, one a device."""
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 49000, (8, 77)).astype(np.int32)
    ids[:, 40:] = 49407
    sizes = np.array(4 * [[30, 20, 3, 0, 16, 16], [16, 40, 0, 11, 16, 16]], np.float32)
    return Batch(rng.integers(0, 256, (8, 16, 16, 3), np.uint8), ids, ids, sizes)


@pytest.fixture(scope="session")
def latents(batch: Batch, encoders: Encoders) -> LatentBatch:
    """The same batch after the encoders."""

    @partial(jax.jit, compiler_options=QUICK)
    def encode(encoders: Encoders, batch: Batch) -> LatentBatch:
        moments = encoders.vae.encode(jnp.asarray(batch.pixels).astype(jnp.float32) / 127.5 - 1)
        context, pooled = encoders.encode_text(jnp.asarray(batch.input_ids), jnp.asarray(batch.input_ids_2))
        return LatentBatch(moments.mean, moments.logvar, context, pooled, jnp.asarray(batch.time_ids))

    return jax.device_get(encode(encoders, batch))


OPTIM = OptimConfig(learning_rate=2e-3, ema_decay=0.9, opt_enable_grad_global_norm_clipping=True)


def optimizer(config: OptimConfig = OPTIM) -> optax.GradientTransformation:
    """The optimizer of a long run."""
    return make_optimizer(config, learning_rate(config, total_steps=100, batch_size=2))


def begin(unet: UNet, config: OptimConfig = OPTIM) -> TrainState:
    """A state of its own arrays, which may be donated."""
    state = new_state(Networks(unet, None), optimizer(config), ema=config.ema_decay > 0, key=jr.key(7))
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.array(x), state)


def step_config(dtype: Any = jnp.float32, ema_every: int = 2) -> StepConfig:
    """What the step depends on."""
    compute = Compute()
    return StepConfig(VAE_CONFIG.scaling_factor, jnp.dtype(dtype), compute, compute, OPTIM.ema_decay, ema_every)


def function(config: StepConfig | None = None, optim: OptimConfig = OPTIM) -> Any:
    """The step, not compiled."""
    return partial(train_step, config=config or step_config(), optimizer=optimizer(optim))


@pytest.fixture(scope="session")
def step() -> Any:
    """The step, compiled, without donation."""
    return jax.jit(function(), compiler_options=QUICK)


def words(tree: Any) -> list[np.ndarray]:
    """The arrays of a tree on the host, keys as their words."""
    leaves = jax.tree.leaves(tree)
    keys = (jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves)
    return [np.array(jr.key_data(x) if is_key else x) for x, is_key in zip(leaves, keys, strict=True)]


def assert_equal(tree: Any, other: Any) -> None:
    """That two trees have the same arrays, bit for bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(words(tree), words(other), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)
