"""The training step: a pure function of state, frozen parts and batch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from sdxl_eqx.arrays import Scalar
from sdxl_eqx.config import LossConfig, TimestepBiasConfig
from sdxl_eqx.data.batch import AnyBatch, Batch, LatentBatch
from sdxl_eqx.diffusion.loss import Draws, decile_sums, training_loss
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.diffusion.timesteps import timestep_weights
from sdxl_eqx.models.controlnet import ControlNet
from sdxl_eqx.models.sdxl import Conditioning, Encoders, cast
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE, Moments
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.lora import with_dropout
from sdxl_eqx.nn.quantize import Quantization, quantized
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.networks import Networks, join
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
    """Of the UNet and of what trains beside it."""
    encoding: Compute
    """Of VAE and frozen text encoders."""
    ema_decay: float
    ema_every: int
    layout: Layout | None = None
    """Where arrays lie, on more than one device."""
    parts: int = 1
    """A batch is computed in so many parts, one after the other."""
    loss: LossConfig = field(default_factory=LossConfig)
    bias: TimestepBiasConfig = field(default_factory=TimestepBiasConfig)
    control_dropout: float = 0.0
    """Share of samples whose map a ControlNet sees black."""
    quantization: Quantization = ""
    """Of matrix products in the transformer stages."""
    quantization_shards: int = 1
    """Parts of the batch that a weight's gradient is rounded in."""
    trains_text: bool = False
    """Whether the text encoders train; they are computed as the UNet then."""


def latent_shape(batch: AnyBatch, encoders: Encoders | None) -> tuple[int, int, int, int]:
    """The shape of a batch's latents."""
    if isinstance(batch, Batch):
        if encoders is None:
            raise ValueError("a batch of pictures needs encoders; give them as frozen, or train on cached latents.")
        b, H, W, _ = batch.pixels.shape
        vae = encoders.vae.config
        return b, H // vae.downscale, W // vae.downscale, vae.latent_channels
    b, h, w, c = batch.mean.shape
    return b, h, w, c


def encode(
    encoders: Encoders | None, batch: AnyBatch, noise: Float[Array, "b h w c"], *, config: StepConfig
) -> tuple[Float[Array, "b h w c"], Conditioning]:
    """(scaled latents in float32, conditioning) of a batch; what is encoded already needs no encoders.

    `noise` draws the latents from the VAE's posterior.
    """
    batch, noise = placed((batch, noise), config)
    if isinstance(batch, LatentBatch):
        context, pooled = jnp.asarray(batch.context), jnp.asarray(batch.pooled)
    elif encoders is not None:
        ids = jnp.asarray(batch.input_ids), jnp.asarray(batch.input_ids_2)
        if config.trains_text:
            context, pooled = cast(encoders, config.dtype).encode_text(*ids, compute=config.compute)
        else:
            context, pooled = encoders.encode_text(*ids, compute=config.encoding)
    else:
        raise ValueError("a batch of captions needs encoders; give them as frozen, or train on cached embeddings.")
    if isinstance(batch, Batch):
        assert encoders is not None  # as for its captions
        moments = encode_pixels(encoders.vae, jnp.asarray(batch.pixels), compute=config.encoding)
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
    frozen: Networks,
    batch: AnyBatch,
    schedule: Schedule,
    *,
    config: StepConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """One optimizer update of `state.trained`, beside what is `frozen`.

    The arguments fix the result, so a resumed run repeats the steps of one never stopped. A step whose loss or gradient
    is not finite changes nothing but the step's number, and says so.
    """
    encode_key, draw_key = jr.split(jr.fold_in(state.key, state.step))
    shape = latent_shape(batch, frozen.encoders)
    # All draws are those of the whole batch, whatever the parts that it is computed in.
    noise = jr.normal(encode_key, shape, jnp.float32)
    weights = timestep_weights(config.bias, schedule.config.num_train_timesteps)
    draws = Draws.draw(schedule, config.loss, weights, shape, key=draw_key)
    loss, grads, sums, counts = _gradients(state.trained, frozen, (batch, noise, draws), draw_key, schedule, config)
    norm = optax.tree.norm(grads)
    # In float32, whatever the weights are: bfloat16 rounds AdamW's 0.999 to 1, so that moments would never decay.
    whole = cast(state.trained, jnp.float32)
    updates, opt_state = optimizer.update(cast(grads, jnp.float32), state.opt_state, whole)
    trained = jax.tree.map(lambda new, old: new.astype(old.dtype), eqx.apply_updates(whole, updates), state.trained)
    step = state.step + 1
    ema = None if state.ema is None else _average(state.ema, trained, step, config)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    before = state.trained, state.opt_state, state.ema
    trained, opt_state, ema = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (trained, opt_state, ema), before
    )
    metrics = {
        "learning/loss": loss,
        "learning/grad_norm": norm,
        "learning/update_norm": optax.tree.norm(updates),
        "learning/param_norm": optax.tree.norm(cast(trained, jnp.float32)),
        "decile_sums": sums,
        "decile_counts": counts,
    }
    return TrainState(step, state.key, trained, opt_state, ema), metrics


def _gradients(
    trained: Networks,
    frozen: Networks,
    inputs: tuple[AnyBatch, Float[Array, "b h w c"], Draws],
    key: PRNGKeyArray,
    schedule: Schedule,
    config: StepConfig,
) -> tuple[Scalar, Networks, Float[Array, "10"], Float[Array, "10"]]:
    """(loss, gradients, sums and counts of losses by tenths of the timesteps), means over all parts of a batch.

    `key` decides what is dropped of what LoRAs and ControlNets see.
    """

    def of(part: tuple[AnyBatch, Float[Array, "b h w c"], Draws], key: PRNGKeyArray) -> Any:
        batch, noise, draws = part
        draws = placed(draws, config)

        def loss_fn(trained: Networks) -> tuple[Scalar, Float[Array, " b"]]:
            networks = with_dropout(join(trained, frozen), key=jr.fold_in(key, 0))
            x0, cond = encode(networks.encoders, batch, noise, config=config)
            predict = predictor(networks, batch, config, key=jr.fold_in(key, 1))
            return training_loss(
                predict, schedule, config.loss, x0, draws, cond, batch.weight,
                dtype=config.dtype, compute=config.compute,
            )  # fmt: skip

        (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        return loss, grads, *decile_sums(draws.t, losses, schedule.config.num_train_timesteps)

    key = jr.fold_in(key, 3)  # other draws than those of noise
    if config.parts == 1:
        return of(inputs, key)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        loss, grads, sums, counts = of(*part)
        mean = (loss / config.parts, jax.tree.map(lambda g: g.astype(jnp.float32) / config.parts, grads))
        return jax.tree.map(jnp.add, total, (*mean, sums, counts)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    begin = (jnp.zeros(()), zeros, jnp.zeros(10), jnp.zeros(10))
    parts = jax.tree.map(lambda x: _split(jnp.asarray(x), config.parts), inputs)
    total, _ = jax.lax.scan(add, begin, (parts, jr.split(key, config.parts)))
    return total


class Controlled(eqx.Module):
    """A UNet that a ControlNet tells what to draw, as one network."""

    unet: UNet
    controlnet: ControlNet
    image: Float[Array, "b H W c"]
    """What the ControlNet sees, in [0, 1]."""

    def __call__(
        self, x: Float[Array, "b h w c"], timestep: Any, context: Any, pooled: Any, time_ids: Any, *, compute: Compute
    ) -> Float[Array, "b h w c"]:
        inputs = x, timestep, context, pooled, time_ids
        return self.unet(*inputs, control=self.controlnet(*inputs, self.image, compute=compute), compute=compute)


def predictor(
    networks: Networks, batch: AnyBatch, config: StepConfig, *, key: PRNGKeyArray | None = None
) -> UNet | Controlled:
    """What predicts the noise of a batch, in the dtype of the computation; `key` decides which maps are black."""
    # One cast of the whole, so that what FSDP gathers is the activation dtype.
    unet = quantized(cast(networks.unet, config.dtype), config.quantization, config.quantization_shards)
    if networks.controlnet is None:
        return unet
    if batch.control is None:
        raise ValueError("a ControlNet needs batches with maps for it; give them a control.")
    image = placed(jnp.asarray(batch.control), config).astype(config.dtype) / 255
    if key is not None and config.control_dropout > 0:
        image = jnp.where(jr.bernoulli(key, config.control_dropout, (len(image), 1, 1, 1)), 0, image)
    net = cast(networks.controlnet, config.dtype)
    return Controlled(unet, quantized(net, config.quantization, config.quantization_shards), image)


def _split(x: Array, parts: int) -> Array:
    """A batch as parts along a new first axis: each part has rows of every device's share, so that none is moved."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def placed(tree: T, config: StepConfig) -> T:
    """A batch, or draws for it, on the devices that compute it."""
    return tree if config.layout is None else config.layout.enter(tree)


def _average(ema: Networks, trained: Networks, step: Array, config: StepConfig) -> Networks:
    """The moving average after this step; a short run's average forgets its random start as diffusers' does."""
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    decay = jnp.where(step % config.ema_every == 0, decay, 1.0)
    return jax.tree.map(lambda a, x: (decay * a + (1 - decay) * x).astype(a.dtype), ema, trained)
