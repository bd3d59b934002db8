"""The training step: a pure function of state, frozen parts and batch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, UInt8

from sdxl_eqx.arrays import Scalar
from sdxl_eqx.config import LossConfig, TimestepBiasConfig
from sdxl_eqx.data.batch import AnyBatch, Batch, LatentBatch
from sdxl_eqx.diffusion.loss import Draws, decile_sums, training_loss
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.diffusion.timesteps import timestep_weights
from sdxl_eqx.models.sdxl import Conditioning, Encoders, cast
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE, Moments
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.state import TrainState

T = TypeVar("T")

Metrics = dict[str, Array]


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
    parts: int = 1
    """A batch is computed in so many parts, one after the other."""
    loss: LossConfig = field(default_factory=LossConfig)
    bias: TimestepBiasConfig = field(default_factory=TimestepBiasConfig)


def latent_shape(batch: AnyBatch, frozen: Encoders | None) -> tuple[int, int, int, int]:
    """The shape of a batch's latents."""
    if isinstance(batch, Batch):
        if frozen is None:
            raise ValueError("a batch of pictures needs encoders; give them as frozen, or train on cached latents.")
        b, H, W, _ = batch.pixels.shape
        vae = frozen.vae.config
        return b, H // vae.downscale, W // vae.downscale, vae.latent_channels
    b, h, w, c = batch.mean.shape
    return b, h, w, c


def encode(
    frozen: Encoders | None, batch: AnyBatch, noise: Float[Array, "b h w c"], *, config: StepConfig
) -> tuple[Float[Array, "b h w c"], Conditioning]:
    """(scaled latents in float32, conditioning) of a batch; what is encoded already needs no encoders.

    `noise` draws the latents from the VAE's posterior.
    """
    batch, noise = placed((batch, noise), config)
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
    latents = moments.at(noise) * config.scaling_factor
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
    """One optimizer update. The arguments fix the result, so a resumed run repeats the steps of one never stopped.

    A step whose loss or gradient is not finite changes nothing but the step's number, and says so.
    """
    encode_key, draw_key = jr.split(jr.fold_in(state.key, state.step))
    shape = latent_shape(batch, frozen)
    # All draws are those of the whole batch, whatever the parts that it is computed in.
    noise = jr.normal(encode_key, shape, jnp.float32)
    weights = timestep_weights(config.bias, schedule.config.num_train_timesteps)
    draws = Draws.draw(schedule, config.loss, weights, shape, key=draw_key)
    loss, grads, sums, counts = _gradients(state.unet, frozen, (batch, noise, draws), schedule, config)
    norm = optax.tree.norm(grads)
    # In float32, whatever the weights are: bfloat16 rounds AdamW's 0.999 to 1, so that moments would never decay.
    whole = cast(state.unet, jnp.float32)
    updates, opt_state = optimizer.update(cast(grads, jnp.float32), state.opt_state, whole)
    unet = jax.tree.map(lambda new, old: new.astype(old.dtype), eqx.apply_updates(whole, updates), state.unet)
    step = state.step + 1
    ema = None if state.ema is None else _average(state.ema, unet, step, config)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    unet, opt_state, ema = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (unet, opt_state, ema), (state.unet, state.opt_state, state.ema)
    )
    metrics = {
        "learning/loss": loss,
        "learning/grad_norm": norm,
        "learning/update_norm": optax.tree.norm(updates),
        "learning/param_norm": optax.tree.norm(cast(unet, jnp.float32)),
        "decile_sums": sums,
        "decile_counts": counts,
    }
    return TrainState(step, state.key, unet, opt_state, ema), metrics


def _gradients(
    unet: UNet,
    frozen: Encoders | None,
    inputs: tuple[AnyBatch, Float[Array, "b h w c"], Draws],
    schedule: Schedule,
    config: StepConfig,
) -> tuple[Scalar, UNet, Float[Array, "10"], Float[Array, "10"]]:
    """(loss, gradients, sums and counts of losses by tenths of the timesteps), means over all parts of a batch."""

    def of(part: tuple[AnyBatch, Float[Array, "b h w c"], Draws]) -> Any:
        batch, noise, draws = part
        x0, cond = encode(frozen, batch, noise, config=config)
        draws = placed(draws, config)

        def loss_fn(unet: UNet) -> tuple[Scalar, Float[Array, " b"]]:
            # One cast of the whole UNet, so that what FSDP gathers is the activation dtype.
            cheap = cast(unet, config.dtype)
            return training_loss(
                cheap, schedule, config.loss, x0, draws, cond, dtype=config.dtype, compute=config.compute
            )

        (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(unet)
        return loss, grads, *decile_sums(draws.t, losses, schedule.config.num_train_timesteps)

    if config.parts == 1:
        return of(inputs)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        loss, grads, sums, counts = of(part)
        mean = (loss / config.parts, jax.tree.map(lambda g: g.astype(jnp.float32) / config.parts, grads))
        return jax.tree.map(jnp.add, total, (*mean, sums, counts)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), unet)
    begin = (jnp.zeros(()), zeros, jnp.zeros(10), jnp.zeros(10))
    total, _ = jax.lax.scan(add, begin, jax.tree.map(lambda x: _split(jnp.asarray(x), config.parts), inputs))
    return total


def _split(x: Array, parts: int) -> Array:
    """A batch as parts along a new first axis: each part has rows of every device's share, so that none is moved."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def placed(tree: T, config: StepConfig) -> T:
    """A batch, or draws for it, on the devices that compute it."""
    return tree if config.layout is None else config.layout.enter(tree)


def _average(ema: UNet, unet: UNet, step: Array, config: StepConfig) -> UNet:
    """The moving average after this step; a short run's average forgets its random start as diffusers' does."""
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    decay = jnp.where(step % config.ema_every == 0, decay, 1.0)
    return jax.tree.map(lambda a, x: (decay * a + (1 - decay) * x).astype(a.dtype), ema, unet)
