"""Tiny models whose weights follow from their keys, inputs that follow from a seed, and the compiled ways to run them.

Nothing here needs PyTorch: the golden files hold outputs alone, as either side can make weights and inputs anew.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from safetensors.numpy import load_file

from sdxl_eqx.config import LossConfig
from sdxl_eqx.data.tokenizer import bundled_tokenizers, tokenize
from sdxl_eqx.diffusion.loss import Draws, training_loss
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.controlnet import ControlNet, ControlNetConfig
from sdxl_eqx.models.sdxl import Conditioning
from sdxl_eqx.models.unet import Control, UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.sampling.drawing import Drawing
from sdxl_eqx.sampling.pipeline import Manner, draw
from sdxl_eqx.sampling.schedulers.plan import plan
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.weights.names import places

GOLDEN = Path(__file__).parent / "golden"

UNET = UNetConfig(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 48, 64),
    attention_levels=(False, True, True),
    layers_per_block=1,
    transformer_layers=(1, 1, 2),
    heads=(2, 3, 4),
    cross_attention_dim=80,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=88,
    norm_num_groups=8,
    norm_eps=1e-5,
)
"""The base model's shape: unequal widths, at least 4 channels a group, at least 2 heads."""

REFINER = UNetConfig(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 24, 32, 40),
    attention_levels=(False, True, True, False),
    layers_per_block=2,
    transformer_layers=(2, 2, 1, 1),
    heads=(2, 3, 2, 5),
    cross_attention_dim=24,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 5 * 8,
    norm_num_groups=4,
    norm_eps=1e-5,
)
"""The refiner's shape: four levels, no attention in the last, two layers a block, five time_ids."""

CONTROLNET = ControlNetConfig(UNET, conditioning_embedding_out_channels=(6, 10, 14, 20))
"""UNET's ControlNet, with unequal widths on the way from the picture to the latents' grid."""

VAE_CONFIG = VAEConfig(
    in_channels=3,
    latent_channels=4,
    block_out_channels=(16, 24, 32),
    layers_per_block=2,
    norm_num_groups=4,
    scaling_factor=0.13025,
    sample_size=64,
    force_upcast=True,
)

TEXT = CLIPTextConfig(49408, 32, 64, 3, 4, 77, "quick_gelu", None, eos_token_id=2)
TEXT_2 = CLIPTextConfig(49408, 48, 96, 3, 4, 77, "gelu", 40, eos_token_id=2)
"""Both over the real vocabulary; published configs say eos_token_id 2, which means the largest id."""

PROMPTS = ["a photo of a cat, wow!! really", "", "word " * 100, "! ünïcödé 🐱 ! !"]
"""Plain, empty, too long, and with literal exclamation marks (the second tokenizer's padding)."""

PLAIN = Compute()
"""The reference way to compute."""

STEPS = tuple(range(1, 51))

Tensors = dict[str, np.ndarray]


def generator(*words: Any) -> np.random.Generator:
    """Random numbers that follow from those words, the same on every machine."""
    return np.random.default_rng(list(hashlib.sha256(repr(words).encode()).digest()))


def tensor(key: str, shape: tuple[int, ...], *, salt: int = 0) -> np.ndarray:
    """The weight under a key of a file, of a size that keeps activations near one and every part of it telling."""
    draw = generator(key, salt).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return 1 + 0.3 * draw if "norm" in key and key.endswith("weight") else 0.2 * draw
    if "embedding.weight" in key:
        return draw
    # Above the usual gain, so that gates, softmax and time embeddings leave their linear range.
    return 1.2 * draw / np.sqrt(np.prod(shape[1:]), dtype=np.float32)


def filled(make: Callable[..., Any], config: Any, *, salt: int = 0) -> Any:
    """A model with the weights that `tensor` gives its keys."""
    skeleton = eqx.filter_eval_shape(make, config, key=jr.key(0))
    leaves = []
    for place in places(skeleton):
        file = {key: tensor(key, place.shape, salt=salt) for key in place.keys}
        leaves.append(jnp.asarray(place.from_file(file)))
    return jax.tree.unflatten(jax.tree.structure(skeleton), leaves)


def unet_inputs(config: UNetConfig, grid: tuple[int, int], *, time_ids: int = 6, seed: int = 0) -> Tensors:
    """NHWC latents, timesteps and conditioning of a batch of two; the time_ids differ from each other."""
    rng = generator("unet", grid, seed)
    pooled = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
    sizes = np.array([[1024, 768, 0, 64, 1000, 900], [512, 640, 100, 8, 700, 1024]], np.float32)
    return {
        "x": rng.standard_normal((2, *grid, config.in_channels)).astype(np.float32),
        "t": np.array([17, 801], np.int32),
        "context": rng.standard_normal((2, 9, config.cross_attention_dim)).astype(np.float32),
        "pooled": rng.standard_normal((2, pooled)).astype(np.float32),
        "time_ids": sizes[:, :time_ids],
        "eps": rng.standard_normal((2, *grid, config.in_channels)).astype(np.float32),
    }


def control_image(config: ControlNetConfig, grid: tuple[int, int], *, seed: int = 0) -> np.ndarray:
    """NHWC pictures in [0, 1] for a ControlNet at latents of that grid."""
    sides = (config.downscale * grid[0], config.downscale * grid[1])
    shape = (2, *sides, config.conditioning_channels)
    return generator("control image", grid, seed).uniform(0, 1, shape).astype(np.float32)


DRAWING = Drawing(jnp.float32, PLAIN, PLAIN)
"""On one device, in float32."""


def drawn(
    unet: UNet,
    inputs: Mapping[str, Any],
    uncond: Mapping[str, Any] | None,
    steps: int,
    guidance_scale: float,
    **changes: Any,
) -> jax.Array:
    """Latents that Euler's method draws from the noise `inputs["eps"]`, with those changes of the schedule."""
    planned = plan(Scheduler(schedule=ScheduleConfig(**changes)), steps)
    latents, finite = draw(
        unet,
        jnp.asarray(inputs["eps"]) * planned.initial_scale,
        conditioning(inputs),
        None if uncond is None else conditioning(uncond),
        planned.table,
        jnp.asarray(Manner(steps, guidance_scale).scales(0, steps, steps)),
        jr.split(jr.key(0), len(inputs["eps"])),
        prediction_type=planned.scheduler.schedule.prediction_type,
        drawing=DRAWING,
    )
    assert finite.all()
    return latents


def conditioning(inputs: Mapping[str, Any]) -> Conditioning:
    """The conditioning among inputs of `unet_inputs`."""
    return Conditioning(*(jnp.asarray(inputs[name]) for name in ("context", "pooled", "time_ids")))


GUIDED = {"steps": 4, "guidance_scale": 3.0, "timestep_spacing": "trailing"}
"""The trajectory of the golden file."""


def pixels() -> np.ndarray:
    """NHWC pixels of which neither side halves evenly for ever."""
    return generator("pixels").uniform(-1, 1, (2, 20, 28, 3)).astype(np.float32)


def latents() -> np.ndarray:
    """NHWC latents, unscaled."""
    return generator("latents").standard_normal((2, 5, 7, 4)).astype(np.float32)


def prompt_ids() -> tuple[np.ndarray, np.ndarray]:
    """PROMPTS by both bundled tokenizers."""
    first, second = (tokenize(tokenizer, PROMPTS)[0] for tokenizer in bundled_tokenizers())
    return first, second


def nchw(x: np.ndarray) -> np.ndarray:
    """From our layout to PyTorch's."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def nhwc(x: np.ndarray) -> np.ndarray:
    """From PyTorch's layout to ours."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def assert_close(ours: Any, theirs: Any, atol: float) -> None:
    """Same shape, and no entry differs by more than atol; what is compared is neither constant nor tiny."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.std(theirs) > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def relative_change(a: Any, b: Any) -> float:
    """By how much b differs from a, of the length of a."""
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(a)))


def strict(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for the whole run of tests, and with no silent promotion of dtypes."""
    compiled = eqx.filter_jit(function)

    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("strict"):
            return compiled(*args, **kwargs)

    return run


run_unet = strict(lambda unet, x, t, context, pooled, time_ids: unet(x, t, context, pooled, time_ids))
run_controlnet = strict(
    lambda net, x, t, context, pooled, time_ids, image, scale: net(x, t, context, pooled, time_ids, image, scale=scale)
)
run_controlled = strict(
    lambda unet, x, t, context, pooled, time_ids, control: unet(x, t, context, pooled, time_ids, control=control)
)
run_encode = strict(lambda vae, x: vae.encode(x))
run_decode = strict(lambda vae, z: vae.decode(z))
run_text = strict(lambda encoder, ids: encoder(ids))


@strict
def loss_and_gradient(unet: UNet, schedule: Schedule, inputs: Tensors, compute: Compute) -> tuple[jax.Array, UNet]:
    """`training_loss` at the inputs, and its gradient."""
    cond = conditioning(inputs)

    def loss(model: UNet) -> jax.Array:
        x0, eps, t = (jnp.asarray(inputs[name]) for name in ("x", "eps", "t"))
        draws = Draws(eps, eps, t)
        return training_loss(model, schedule, LossConfig(), x0, draws, cond, dtype=jnp.float32, compute=compute)[0]

    return jax.value_and_grad(loss)(unet)


def apply_unet(unet: UNet, inputs: Mapping[str, Any]) -> np.ndarray:
    """The UNet's output at inputs of `unet_inputs`, in float32."""
    return np.asarray(run_unet(unet, **unet_arguments(inputs)))


def unet_arguments(inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A UNet's arguments among inputs of `unet_inputs`."""
    arrays = {name: jnp.asarray(inputs[name]) for name in ("x", "t", "context", "pooled", "time_ids")}
    return {**arrays, "t": arrays["t"].astype(jnp.float32)}


def apply_controlnet(net: ControlNet, inputs: Mapping[str, Any], image: np.ndarray, scale: float = 1.0) -> Control:
    """A ControlNet's residuals at inputs of `unet_inputs` and a picture; another scale is not compiled anew."""
    return run_controlnet(net, **unet_arguments(inputs), image=jnp.asarray(image), scale=jnp.float32(scale))


def apply_controlled(unet: UNet, inputs: Mapping[str, Any], control: Control) -> np.ndarray:
    """The UNet's output at inputs of `unet_inputs` with what ControlNets add."""
    return np.asarray(run_controlled(unet, **unet_arguments(inputs), control=control))


def unet_gradient(unet: UNet, inputs: Tensors, prediction_type: Any, compute: Compute) -> tuple[float, UNet]:
    """(loss, gradient) at inputs of `unet_inputs`."""
    schedule = Schedule(ScheduleConfig(prediction_type=prediction_type))
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    loss, gradient = loss_and_gradient(unet, schedule, arrays, compute)
    return float(loss), gradient


class Sketch(NamedTuple):
    """What a golden file keeps of a gradient: its norm, and its product with a random direction of unit length."""

    norm: float
    along: float


def sketch(key: str, gradient: np.ndarray) -> Sketch:
    """The sketch of the gradient of a key, in the file's layout."""
    direction = generator("direction", key).standard_normal(gradient.shape)
    wide = gradient.astype(np.float64)
    return Sketch(float(np.linalg.norm(wide)), float((wide * direction).sum() / np.linalg.norm(direction)))


def read_golden(name: str) -> Tensors:
    """The tensors of a golden file."""
    return load_file(GOLDEN / f"{name}.safetensors")


def file_tensors(model: Any) -> Tensors:
    """A model's arrays (or a gradient's) under the keys and in the layout of a file."""
    found: Tensors = {}
    for place, leaf in zip(places(model), jax.tree.leaves(model), strict=True):
        found.update(place.to_file(np.asarray(leaf)))
    return found


def cosine(begin: Tensors, ours: Tensors, theirs: Tensors) -> float:
    """That of the angle between two updates of the same tensors, all of them together."""
    mine, other = (np.concatenate([(now[key] - begin[key]).ravel() for key in begin]) for now in (ours, theirs))
    return float(mine @ other / (np.linalg.norm(mine) * np.linalg.norm(other)))


def table(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A short witness of a model's keys and shapes: how many tensors, how many numbers, and a digest."""
    lines = "".join(f"{key} {' '.join(map(str, shapes[key]))}\n" for key in sorted(shapes))
    return {
        "tensors": len(shapes),
        "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }


def shapes_of(make: Callable[..., Any], config: Any) -> dict[str, tuple[int, ...]]:
    """Every key and shape of a model's file; nothing is allocated."""
    skeleton = eqx.filter_eval_shape(make, config, key=jr.key(0))
    return {key: place.shape for place in places(skeleton) for key in place.keys}


FULL: dict[str, tuple[Callable[..., Any], Any]] = {
    "unet": (UNet, UNetConfig.sdxl_base()),
    "refiner": (UNet, UNetConfig.sdxl_refiner()),
    "vae": (VAE, VAEConfig.sdxl_base()),
    "text_encoder": (CLIPText, CLIPTextConfig.sdxl_base()),
    "text_encoder_2": (CLIPText, CLIPTextConfig.sdxl_base_2()),
}
"""The published models."""
