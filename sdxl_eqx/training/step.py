"""The training step: a pure function of state, frozen parts and batch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from sdxl_eqx.arrays import Scalar
from sdxl_eqx.data.batch import AnyBatch, Batch, LatentBatch
from sdxl_eqx.diffusion.loss import denoising_loss, draw
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.models.sdxl import Conditioning, Encoders, cast
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE, Moments
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.state import TrainState

T = TypeVar("T")

Metrics = dict[str, Scalar]


@dataclass(frozen=True)
class StepConfig:
    """What of the config the step depends on."""

    scaling_factor: float
    """Of the VAE's latents."""
    dtype: Any
    """Of the computation."""
    compute: Compute
    """Of the UNet."""
    encoding: Compute
    """Of VAE and text encoders."""
    ema_decay: float
    ema_every: int
    layout: Layout | None = None
    """Where arrays lie, on more than one device."""


def encode(
    frozen: Encoders | None, batch: AnyBatch, *, config: StepConfig, key: PRNGKeyArray
) -> tuple[Float[Array, "b h w c"], Conditioning]:
    """(scaled latents in float32, conditioning) of a batch; what is encoded already needs no encoders."""
    batch = _placed(batch, config)
    if isinstance(batch, LatentBatch):
        context, pooled = jnp.asarray(batch.context), jnp.asarray(batch.pooled)
    elif frozen is not None:
        ids = jnp.asarray(batch.input_ids), jnp.asarray(batch.input_ids_2)
        context, pooled = frozen.encode_text(*ids, compute=config.encoding)
    else:
        raise ValueError("a batch of captions needs encoders; give them as frozen, or train on cached embeddings.")
    if isinstance(batch, Batch):
        assert frozen is not None  # as for its captions
        moments = encode_pixels(frozen.vae, jnp.asarray(batch.pixels), compute=config.encoding)
    else:
        moments = Moments(jnp.asarray(batch.mean), jnp.asarray(batch.logvar))
    latents = moments.sample(key=key) * config.scaling_factor
    cond = Conditioning(context.astype(config.dtype), pooled.astype(config.dtype), jnp.asarray(batch.time_ids))
    return latents, cond


def encode_pixels(vae: VAE, pixels: UInt8[Array, "b H W c"], *, compute: Compute) -> Moments:
    """The posterior of sRGB pixels in 0..255, with the VAE's weights gathered once for all of its layers."""
    vae = vae if compute.gather is None else compute.gather(vae)
    return vae.encode(pixels.astype(jnp.float32) / 127.5 - 1, compute=dataclasses.replace(compute, gather=None))


def train_step(
    state: TrainState,
    frozen: Encoders | None,
    batch: AnyBatch,
    schedule: Schedule,
    *,
    config: StepConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """One optimizer update. The arguments fix the result, so a resumed run repeats the steps of one never stopped."""
    encode_key, draw_key = jr.split(jr.fold_in(state.key, state.step))
    x0, cond = encode(frozen, batch, config=config, key=encode_key)
    b, h, w, c = x0.shape
    eps, t = _placed(draw(schedule, (b, h, w, c), key=draw_key), config)

    def loss_fn(unet: UNet) -> Scalar:
        # One cast of the whole UNet, so that what FSDP gathers is the activation dtype.
        unet = cast(unet, config.dtype)
        return denoising_loss(unet, schedule, x0, eps, t, cond, dtype=config.dtype, compute=config.compute)

    loss, grads = jax.value_and_grad(loss_fn)(state.unet)
    # In float32, whatever the weights are: bfloat16 rounds AdamW's 0.999 to 1, so that moments would never decay.
    whole = cast(state.unet, jnp.float32)
    updates, opt_state = optimizer.update(cast(grads, jnp.float32), state.opt_state, whole)
    unet = jax.tree.map(lambda new, old: new.astype(old.dtype), eqx.apply_updates(whole, updates), state.unet)
    step = state.step + 1
    ema = None if state.ema is None else _average(state.ema, unet, step, config)
    metrics = {"learning/loss": loss, "learning/grad_norm": optax.tree.norm(grads)}
    return TrainState(step, state.key, unet, opt_state, ema), metrics


def _placed(tree: T, config: StepConfig) -> T:
    """A batch, or draws for it, on the devices that compute it."""
    return tree if config.layout is None else config.layout.enter(tree)


def _average(ema: UNet, unet: UNet, step: Array, config: StepConfig) -> UNet:
    """The moving average after this step; a short run's average forgets its random start as diffusers' does."""
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    decay = jnp.where(step % config.ema_every == 0, decay, 1.0)
    return jax.tree.map(lambda a, x: (decay * a + (1 - decay) * x).astype(a.dtype), ema, unet)
