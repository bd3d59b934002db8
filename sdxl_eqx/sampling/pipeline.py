"""From prompts to pictures: text to image, image to image, inpainting, with ControlNets and a refiner."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.controlnet import ControlNet
from sdxl_eqx.models.sdxl import Conditioning, Encoders, cast
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.sampling import conditioning
from sdxl_eqx.sampling.conditioning import Prompt, Tokenize
from sdxl_eqx.sampling.drawing import Drawing
from sdxl_eqx.sampling.guidance import Steering, denoiser
from sdxl_eqx.sampling.schedulers.level import Latents, Level
from sdxl_eqx.sampling.schedulers.plan import Plan, Table, plan
from sdxl_eqx.sampling.schedulers.run import run
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.sampling.tiles import decode_tiled

log = logging.getLogger("sdxl_eqx")

POSTERIOR = 1 << 31
"""Folded into a picture's key for what the VAE says of the picture that is begun from."""


@dataclass(frozen=True)
class Refiner:
    """SDXL's refiner, and what share of the steps it draws (Podell et al. 2023, section 2.5)."""

    unet: UNet
    encoder: CLIPText
    """Its text encoder, which is the base model's second one."""
    fraction: float = 0.2
    zeros_for_absent: bool = False
    """As of `Models`."""


@dataclass(frozen=True)
class Models:
    """What draws."""

    unet: UNet
    encoders: Encoders
    tokenize: Tokenize
    scheduler: Scheduler
    zeros_for_absent: bool = True
    """Whether an absent negative prompt is zeros, not the encoded empty one (`force_zeros_for_empty_prompt`)."""
    refiner: Refiner | None = None


@dataclass(frozen=True)
class Hint:
    """A ControlNet, what it sees, and how strong it is from which share of the steps to which."""

    net: ControlNet
    image: Float[np.ndarray, "b H W 3"]
    """In [0, 1], at the size of the pictures that are drawn."""
    scale: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def scales(self, n: int) -> Float[np.ndarray, " n"]:
        """The strength at each of n evaluations (diffusers' `controlnet_keep`)."""
        i = np.arange(n)
        kept = (i / n >= self.start) & ((i + 1) / n <= self.end)
        return (self.scale * kept).astype(np.float32)


@dataclass(frozen=True)
class Begun:
    """The pictures that are drawn over, `strength` of the steps; and the mask that is 1 where they are painted anew."""

    pixels: Float[np.ndarray, "b H W 3"]
    """In [-1, 1], at the size of the pictures that are drawn."""
    strength: float
    mask: Float[np.ndarray, "b H W 1"] | None = None


@dataclass(frozen=True)
class Manner:
    """How pictures are drawn, beside the models."""

    steps: int = 20
    guidance_scale: float = 5.0
    """1 or less draws without guidance."""
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Shares of the steps between which guidance is on."""
    eta: float = 0.0
    timesteps: tuple[int, ...] = ()
    """Draw at these instead of `steps` of the schedule."""

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.guidance_scale > 1

    def scales(self, begin: int, end: int, n: int) -> Float[np.ndarray, " m"]:
        """The guidance at the evaluations from `begin` to before `end` of n."""
        at = np.arange(begin, end) / n
        low, high = self.guidance_interval
        return np.where((at >= low) & ((at < high) | (high == 1)), self.guidance_scale, 1.0).astype(np.float32)


class Kept(eqx.Module):
    """What inpainting keeps: the picture outside of the mask, noised as the rest is."""

    x0: Latents
    eps: Latents
    mask: Float[Array, "b h w 1"]
    """1 where the picture is painted anew."""

    def blend(self, x: Latents, level: Level) -> Latents:
        """x with what is kept at its level."""
        return self.mask * x + (1 - self.mask) * level.noised(self.x0, self.eps)


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
    """Unit noise of each seed, the same in whatever batch it stands."""
    return jnp.stack([jr.normal(jr.key(seed), shape, jnp.float32) for seed in seeds])


def step_noise(keys: Key[Array, " b"], index: Array, shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
    """Fresh unit noise for the step of an evaluation, of each picture's key."""
    return jax.vmap(lambda key: jr.normal(jr.fold_in(key, index + 1), shape[1:], jnp.float32))(keys)


@partial(jax.jit, static_argnames=("drawing", "prediction_type", "rescale"))
def draw(
    unet: UNet,
    x: Latents,
    cond: Conditioning,
    uncond: Conditioning | None,
    table: Table,
    scales: Float[Array, " n"],
    keys: Key[Array, " b"],
    *,
    steering: tuple[Steering, ...] = (),
    kept: Kept | None = None,
    beside: Float[Array, "b h w k"] | None = None,
    prediction_type: str,
    rescale: float = 0.0,
    drawing: Drawing,
) -> tuple[Latents, Bool[Array, " n"]]:
    """(latents, scaled by scaling_factor as they were; whether they were finite after each step): one compiled loop.

    `x` is at the level of the table's first evaluation.
    """
    x, cond, uncond, kept, beside = drawing.place((x, cond, uncond, kept, beside))
    steering = tuple(Steering(cast(s.net, drawing.dtype), drawing.place(s.image), s.scales) for s in steering)
    model = denoiser(
        cast(unet, drawing.dtype), cond, uncond, scales, prediction_type=prediction_type, rescale=rescale,
        steering=steering, beside=beside, dtype=drawing.dtype, compute=drawing.compute,
    )  # fmt: skip

    def after(x: Latents, index: Array, following: Level) -> Latents:
        return x if kept is None else kept.blend(x, following)

    return run(model, x, table, lambda index: step_noise(keys, index, x.shape), after)


@partial(jax.jit, static_argnames="drawing")
def encode(
    vae: VAE, pixels: Float[Array, "b H W 3"], eps: Float[Array, "b h w c"], *, drawing: Drawing
) -> Float[Array, "b h w c"]:
    """Scaled latents of pictures in [-1, 1], drawn from the VAE's posterior with unit noise `eps`, in float32."""
    vae, compute = _whole(vae, drawing)
    moments = vae.encode(drawing.place(pixels), compute=compute)
    return moments.at(eps) * vae.config.scaling_factor


@partial(jax.jit, static_argnames="drawing")
def decode(
    vae: VAE, latents: Float[Array, "b h w c"], *, drawing: Drawing
) -> tuple[UInt8[Array, "b H W 3"], Bool[Array, ""]]:
    """(pixels from 0 to 255 of scaled latents, decoded in vae_dtype; whether all of them are finite)."""
    vae, compute = _whole(vae, drawing)
    z = (latents.astype(jnp.float32) / vae.config.scaling_factor).astype(drawing.vae_dtype)
    vae = cast(vae, drawing.vae_dtype)
    if drawing.tile:
        pixels = decode_tiled(vae, z, compute=compute, tile=drawing.tile)
    else:
        pixels = vae.decode(z, compute=compute)
    finite = jnp.isfinite(pixels).all()
    pixels = jnp.clip(pixels.astype(jnp.float32) * 127.5 + 127.5, 0, 255)
    pixels = jnp.round(pixels).astype(jnp.uint8)
    if drawing.layout is not None:  # whole, so that each process can read them
        pixels, finite = jax.lax.with_sharding_constraint((pixels, finite), drawing.layout.whole)
    return pixels, finite


def _whole(vae: VAE, drawing: Drawing):
    """The VAE in float32 with all of its weights on each device, and how it then computes."""
    gather = drawing.decoding.gather
    vae = cast(vae if gather is None else gather(vae), jnp.float32)
    return vae, dataclasses.replace(drawing.decoding, gather=None)


def generate(
    models: Models,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    size: tuple[int, int],
    manner: Manner,
    drawing: Drawing,
    *,
    begun: Begun | None = None,
    hints: Sequence[Hint] = (),
) -> UInt8[np.ndarray, "b H W 3"]:
    """Pictures from 0 to 255 of (height, width) `size`, one a prompt and seed.

    Raises:
        ValueError: for steps, sizes and options that do not go together; where the sampler ran out of the finite
            numbers, with the step, so that there is no picture to show.
    """
    latents = draw_latents(models, prompts, seeds, size, manner, drawing, begun=begun, hints=hints)
    pictures, finite = decode(models.encoders.vae, latents, drawing=drawing)
    if not bool(finite):
        raise ValueError(f"the VAE gave pixels that are not finite in {jnp.dtype(drawing.vae_dtype)}; use float32.")
    return np.asarray(pictures)


def draw_latents(
    models: Models,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    size: tuple[int, int],
    manner: Manner,
    drawing: Drawing,
    *,
    begun: Begun | None = None,
    hints: Sequence[Hint] = (),
    noise: Float[np.ndarray, "b h w c"] | None = None,
) -> Latents:
    """What `generate` decodes. `noise` takes the place of the seeds' initial noise.

    Raises:
        ValueError: as `generate` has it.
    """
    vae = models.encoders.vae.config
    h, w = (side // vae.downscale for side in size)
    check_size(models.unet, vae.downscale, size)
    whole = plan(models.scheduler, manner.steps, timesteps=manner.timesteps, eta=manner.eta)
    drawn = whole if begun is None else whole.for_strength(begun.strength)
    eps = initial_noise(seeds, (h, w, vae.latent_channels)) if noise is None else jnp.asarray(noise)
    eps = drawing.put(eps)
    keys = jnp.stack([jr.key(seed) for seed in seeds])
    x, kept, beside = _beginning(models, begun, whole, drawn, eps, keys, drawing)

    cond = conditioning.condition(models.encoders, models.tokenize, prompts, size, drawing)
    uncond = None
    if manner.is_guided:
        uncond = conditioning.condition_negative(
            models.encoders, models.tokenize, prompts, size, drawing, zeros=models.zeros_for_absent
        )
    refiner, evaluations = models.refiner, len(drawn.timesteps)
    if refiner is not None:
        _check_shared(drawn, refiner, begun)
    base = drawn if refiner is None else drawn.until(1 - refiner.fraction)
    common = {"prediction_type": models.scheduler.schedule.prediction_type, "rescale": manner.guidance_rescale}
    steering = tuple(
        Steering(h.net, drawing.put(jnp.asarray(h.image)), jnp.asarray(h.scales(evaluations))) for h in hints
    )
    done = len(base.timesteps)
    for hint in hints:
        if hint.scale and not hint.scales(evaluations)[:done].any():
            log.warning(
                "a ControlNet takes no part: of the %d evaluations none lies between its start %g and its end %g",
                done, hint.start, hint.end,
            )  # fmt: skip
    latents, finite = draw(
        models.unet, x, cond, uncond, drawing.put(base.table), drawing.put(manner.scales(0, done, evaluations)), keys,
        steering=steering, kept=kept if beside is None else None, beside=beside, drawing=drawing, **common,
    )  # fmt: skip
    _check_finite(finite, base)
    if refiner is None:
        return latents
    rest = drawn.since(1 - refiner.fraction)
    told = partial(conditioning.condition_refiner, refiner.encoder, models.tokenize, prompts, size, drawing)
    cond = told()
    uncond = told(negative=True, zeros=refiner.zeros_for_absent) if manner.is_guided else None
    scales = manner.scales(evaluations - len(rest.timesteps), evaluations, evaluations)
    latents, finite = draw(
        refiner.unet, latents, cond, uncond, drawing.put(rest.table), drawing.put(scales),
        jax.vmap(lambda key: jr.fold_in(key, POSTERIOR + 1))(keys), kept=kept, drawing=drawing, **common,
    )  # fmt: skip
    _check_finite(finite, rest)
    return latents


def check_size(unet: UNet, downscale: int, size: tuple[int, int]) -> None:
    """Check that pictures of (height, width) can be drawn.

    Raises:
        ValueError: naming the multiple that both must be of.
    """
    for name, side in zip(("height", "width"), size, strict=True):
        if side < downscale or side % downscale:
            raise ValueError(f"--{name} {side}: must be a multiple of {downscale}.")


def _beginning(
    models: Models,
    begun: Begun | None,
    whole: Plan,
    drawn: Plan,
    eps: Latents,
    keys: Key[Array, " b"],
    drawing: Drawing,
) -> tuple[Latents, Kept | None, Float[Array, "b h w k"] | None]:
    """(latents at the first level, what is kept, what an inpainting UNet sees beside them).

    An inpainting UNet keeps what it sees by itself; a refiner after it does not.
    """
    channels, latent = models.unet.config.in_channels, models.encoders.vae.config.latent_channels
    is_inpainting = channels == 2 * latent + 1
    if channels not in (latent, 2 * latent + 1):
        raise ValueError(f"a UNet of {channels} input channels cannot draw; {latent} or {2 * latent + 1} are known.")
    if begun is None:
        if is_inpainting:
            raise ValueError("this model is for inpainting: give --image and --mask-image.")
        return eps * whole.initial_scale, None, None
    drawn_eps = jax.vmap(lambda key: jr.normal(jr.fold_in(key, POSTERIOR), eps.shape[1:], jnp.float32))(keys)
    x0 = encode(models.encoders.vae, drawing.put(begun.pixels), drawn_eps, drawing=drawing)
    x = drawn.first.noised(x0, eps)
    if begun.mask is None:
        if is_inpainting:
            raise ValueError("this model is for inpainting: give --mask-image too.")
        return x, None, None
    if begun.strength == 1:
        x = eps * whole.initial_scale  # nothing of the picture is to be seen under the mask
    scale = models.encoders.vae.config.downscale
    mask = drawing.put(jnp.asarray(begun.mask[:, ::scale, ::scale]))
    kept = Kept(x0, eps, mask)
    if not is_inpainting:
        return x, kept, None
    seen = begun.pixels * (begun.mask < 0.5)
    masked = encode(models.encoders.vae, drawing.put(seen.astype(np.float32)), drawn_eps, drawing=drawing)
    return x, kept, jnp.concatenate([mask, masked], axis=-1)


def _check_shared(drawn: Plan, refiner: Refiner, begun: Begun | None) -> None:
    """Check that base model and refiner both have steps to draw."""
    count = drawn.count_until(1 - refiner.fraction)
    if count == 0:
        strength = "" if begun is None else f" of --strength {begun.strength:g}"
        raise ValueError(
            f"--refiner-fraction {refiner.fraction:g}: all {len(drawn.timesteps)} evaluations{strength} are within it, "
            "which leaves none to the model itself; lower it, or raise --strength or --num-inference-steps."
        )
    if count == len(drawn.timesteps):
        raise ValueError(
            f"--refiner-fraction {refiner.fraction:g}: none of the {count} evaluations is within it; raise it, or "
            "--num-inference-steps, or leave --refiner-model-name-or-path out."
        )


def _check_finite(finite: Bool[Array, " n"], plan: Plan) -> None:
    found = np.flatnonzero(~np.asarray(finite))
    if len(found):
        n = int(found[0])
        raise ValueError(
            f"sampling gave latents that are not finite at step {plan.start + n + 1} (timestep "
            f"{plan.timesteps[n]:g}); the UNet's weights are broken, or float16 overflowed: use bfloat16 or float32."
        )
