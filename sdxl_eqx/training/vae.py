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
from sdxl_eqx.data.loader import BadItems, make_stream
from sdxl_eqx.data.sources import Example, ImageFolder
from sdxl_eqx.data.transforms import read_picture, resize_and_crop
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
    """Folder of pictures with metadata.jsonl."""
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
    source = ImageFolder(resolve(config.train_data_dir))
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

    def read(example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        flip = bool(rng.random() < 0.5)
        picture = read_picture(example.path)
        pixels, _ = resize_and_crop(picture, config.resolution, center_crop=False, flip=flip, rng=rng)
        return {"pixels": pixels}

    bad = BadItems(len(source), 0.01)
    stream = make_stream(
        source, read, batch_size=config.batch_size, seed=config.seed, shuffle=True, num_threads=2, bad=bad
    )
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


def _measure(vae: VAE, source: ImageFolder, config: VAETrainConfig) -> tuple[float, float]:
    """(PSNR of pictures through the autoencoder, deviation of the latents) over the source."""

    @jax.jit
    def one(pixels: Array) -> tuple[Array, Array]:
        mean = vae.encode(pixels.astype(jnp.float32)[None] / 127.5 - 1).mean
        back = jnp.round(jnp.clip(vae.decode(mean) * 127.5 + 127.5, 0, 255))
        return jnp.mean(jnp.square(back - pixels[None])), mean

    rng = np.random.default_rng(0)
    errors, means = [], []
    for example in source.examples:
        square, _ = resize_and_crop(
            read_picture(example.path), config.resolution, center_crop=True, flip=False, rng=rng
        )
        error, mean = one(jnp.asarray(square))
        errors.append(float(error))
        means.append(np.asarray(mean))
    return 10 * float(np.log10(255**2 / np.mean(errors))), float(np.std(np.stack(means)))
