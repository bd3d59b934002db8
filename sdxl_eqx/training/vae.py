"""Training of a small VAE, such as the one that comes with the package."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, UInt8

from sdxl_eqx.arrays import DtypeName, Scalar
from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.bad import BadItems
from sdxl_eqx.data.loader import make_stream
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.pictures import read_picture
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.data.transforms import draw_crop, resize_and_crop
from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.weights.read import read_json
from sdxl_eqx.weights.write import write_model

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class VAETrainConfig:
    """Train a VAE on a folder of pictures and write it as the `vae` part of a diffusers folder."""

    output: str
    """Folder to write config.json and diffusion_pytorch_model.safetensors into."""
    train_data_dir: str = "asset:emoji"
    """Folder of pictures and captions."""
    config: str = ""
    """A vae/config.json for the shape of the model; '' is the tiny one."""
    resolution: int = 64
    """Side of the square that pictures are resized and cropped to."""
    max_train_steps: int = 1500
    """Optimizer updates."""
    batch_size: int = 16
    """Pictures a step."""
    learning_rate: float = 2e-3
    """Peak of Adam's learning rate, after a short warm-up; it falls to zero by a cosine."""
    kl_weight: float = 1e-3
    """Weight of the divergence from a unit Gaussian, a latent's mean, beside the pixels' errors."""
    seed: int = 0
    """Every random draw follows from it."""
    dtype: DtypeName = "float16"
    """Of the written weights."""


def train_vae(config: VAETrainConfig) -> float:
    """Train, set scaling_factor so that scaled latents have unit deviation, write; returns the PSNR in dB.

    Raises:
        ValueError: for input that cannot be used.
    """
    source = ImageFolder(str(resolve(config.train_data_dir)))
    shape = VAEConfig.from_json(read_json(Path(config.config))) if config.config else VAEConfig.tiny()
    model_key, draw_key = jr.split(jr.key(config.seed))
    steps = config.max_train_steps
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    vae = VAE(shape, key=model_key)
    opt_state = optimizer.init(eqx.filter(vae, eqx.is_inexact_array))

    @jax.jit
    def step(vae: VAE, opt_state: Any, pixels: Array, key: PRNGKeyArray) -> tuple[VAE, Any, Scalar]:
        loss, grads = jax.value_and_grad(vae_loss)(vae, pixels, config.kl_weight, key=key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(vae, updates), opt_state, loss

    def read(sample: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        flip = bool(rng.random() < 0.5)
        pixels = _square(source, sample, config.resolution, center_crop=False, rng=rng)
        return {"pixels": np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels}

    order = Order(np.zeros(len(source), np.int16), batch_size=config.batch_size, seed=config.seed, shuffle=True)
    bad = BadItems(len(source), 0.01)
    stream = make_stream(order, read, seed=config.seed, num_threads=2, bad=bad)
    for n in range(steps):
        vae, opt_state, loss = step(vae, opt_state, next(stream)["pixels"], jr.fold_in(draw_key, n))
        if (n + 1) % 100 == 0 or n + 1 == steps:
            log.info("step %d/%d  loss %.4f", n + 1, steps, float(loss))
    stream.close()

    # What is measured is what will be loaded.
    vae = cast(cast(vae, jnp.dtype(config.dtype)), jnp.float32)
    psnr, deviation = _measure(vae, source, config)
    shape = dataclasses.replace(shape, scaling_factor=round(1 / deviation, 5), sample_size=config.resolution)
    file = Path(config.output) / "diffusion_pytorch_model.safetensors"
    write_model(vae, shape.to_json(), file, dtype=np.dtype(config.dtype))
    log.info(
        "%s: %.2f MB, PSNR %.2f dB, scaling_factor %g", file, file.stat().st_size / 1e6, psnr, shape.scaling_factor
    )
    return psnr


def vae_loss(vae: VAE, pixels: UInt8[Array, "b H W c"], kl_weight: float, *, key: PRNGKeyArray) -> Scalar:
    """Absolute plus squared error of the pixels in [-1, 1], plus the weighted divergence (Kingma and Welling 2013)."""
    x = pixels.astype(jnp.float32) / 127.5 - 1
    moments = vae.encode(x)
    error = vae.decode(moments.sample(key=key)) - x
    kl = 0.5 * jnp.mean(jnp.square(moments.mean) + jnp.exp(moments.logvar) - 1 - moments.logvar)
    return jnp.mean(jnp.abs(error)) + jnp.mean(jnp.square(error)) + kl_weight * kl


def _square(
    source: Source, sample: int, resolution: int, *, center_crop: bool, rng: np.random.Generator
) -> UInt8[np.ndarray, "R R 3"]:
    target = (resolution, resolution)
    picture = read_picture(source.picture(sample), source.name(sample), target=target)
    return resize_and_crop(picture, target, draw_crop(picture.size, target, center_crop=center_crop, rng=rng))[0]


def _measure(vae: VAE, source: Source, config: VAETrainConfig) -> tuple[float, float]:
    """(PSNR of pictures through the autoencoder, deviation of the latents) over the source."""

    @jax.jit
    def one(pixels: Array) -> tuple[Array, Array]:
        mean = vae.encode(pixels.astype(jnp.float32)[None] / 127.5 - 1).mean
        back = jnp.round(jnp.clip(vae.decode(mean) * 127.5 + 127.5, 0, 255))
        return jnp.mean(jnp.square(back - pixels[None])), mean

    rng = np.random.default_rng(0)
    errors, means = [], []
    for sample in range(len(source)):
        error, mean = one(jnp.asarray(_square(source, sample, config.resolution, center_crop=True, rng=rng)))
        errors.append(float(error))
        means.append(np.asarray(mean))
    return 10 * float(np.log10(255**2 / np.mean(errors))), float(np.std(np.stack(means)))
