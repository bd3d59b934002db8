"""Everything that a run needs before its first step; what can be wrong with the input is found here."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import Mesh

from sdxl_eqx.config import TrainConfig, flat, to_yaml
from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.sources import ImageFolder
from sdxl_eqx.data.tokenizer import tokenize
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.models.sdxl import Encoders, cast
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel.devices import choose_hardware
from sdxl_eqx.parallel.mesh import global_batch_size, make_mesh
from sdxl_eqx.parallel.specs import shardings
from sdxl_eqx.training.checkpoint import Checkpoints, Saved
from sdxl_eqx.training.optimizer import learning_rate, make_optimizer
from sdxl_eqx.training.run_folder import RunFolder, new_name
from sdxl_eqx.training.state import TrainState, new_state
from sdxl_eqx.training.step import StepConfig

log = logging.getLogger("sdxl_eqx")


@dataclass
class Run:
    """A run that is ready to go on from `state.step`."""

    config: TrainConfig
    """With the run's name in it."""
    folder: RunFolder
    checkpoints: Checkpoints
    mesh: Mesh
    batch_size: int
    total_steps: int
    source: ImageFolder
    parts: ModelParts
    encoders: Encoders
    state: TrainState
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    data_position: dict[str, Any] | None
    """Of the data iterator; None at the beginning."""

    @property
    def dtype(self) -> Any:
        """Of the computation."""
        return jnp.dtype(self.config.model.activations_dtype)

    @property
    def compute(self) -> Compute:
        """How the UNet is computed."""
        model = self.config.model
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        remat = ("none" if on_cpu else "full") if model.remat_policy == "auto" else model.remat_policy
        return Compute(remat=remat, scan_unroll=model.scan_unroll)

    @property
    def step_config(self) -> StepConfig:
        """What the step depends on."""
        optim = self.config.optim
        return StepConfig(self.parts.vae.scaling_factor, self.dtype, self.compute, optim.ema_decay, optim.ema_every)

    def saved(self, data_position: dict[str, Any]) -> Saved:
        """What stands beside the arrays of a checkpoint."""
        ema = self.config.optim.ema_decay > 0
        return Saved(self.parts.unet.to_json(), ema, flat(self.config), data_position)


@dataclass(frozen=True)
class Finished:
    """A run of that name is done already."""

    folder: Path
    step: int


def prepare(config: TrainConfig) -> Run | Finished:
    """`read_and_check`, with an explanation where the model alone does not fit the devices.

    Raises:
        ValueError: for anything wrong with the input.
    """
    try:
        return read_and_check(config)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            "out of memory: weights and optimizer do not fit the devices; share them with --ici-fsdp-parallelism. "
            f"({str(error).splitlines()[0][:200]})"
        ) from error


def read_and_check(config: TrainConfig) -> Run | Finished:
    """Read and check all input, lay the model out on the devices, and find where the run goes on.

    How a run starts: a run_name without a folder starts anew, from the model folder's UNet or a random one; with
    checkpoints it goes on from the newest one; with all steps done and the export there, it is finished.

    Raises:
        ValueError: for anything wrong with the input, before anything is compiled but what fills random weights.
    """
    configure_jax(config)
    devices = choose_hardware(config.run.hardware)
    mesh = make_mesh(config.parallel, devices)
    if devices[0].platform == "cpu" and config.model.activations_dtype == "float16":
        raise ValueError(
            "--activations-dtype float16: XLA has no such matrix products on CPU; use float32 or bfloat16."
        )
    batch_size = global_batch_size(config.optim.per_device_batch_size, mesh)
    data = config.data
    source = ImageFolder(
        resolve(data.train_data_dir),
        image_column=data.image_column,
        caption_column=data.caption_column,
        max_samples=data.max_train_samples,
    )
    total_steps = config.optim.max_train_steps
    if total_steps == -1:
        total_steps = math.ceil(config.optim.num_train_epochs * len(source) / batch_size)
    parts = ModelParts.read(config.model, config.diffusion_scheduler_config, token=data.hf_access_token)
    _check_resolution(data.resolution, parts)

    name = config.run.run_name or new_name()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_name=name))
    folder = RunFolder.open(config.run.root, name)
    checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoint.checkpoints_to_keep)
    step = checkpoints.latest()
    saved = None if step is None else checkpoints.saved(step)
    if step is not None and saved is not None:
        _check_same_model(saved, parts, folder)
        _check_same_flags(saved, config)
        if step >= total_steps and folder.finished_step == step:
            checkpoints.close()
            folder.close()
            return Finished(folder.path, step)

    cut = tokenize(parts.tokenizers[0], [example.caption for example in source.examples])[1]
    log.info(
        "%s: %d pictures (%d captions longer than 77 tokens are cut), batches of %d on %d %s, %d steps",
        folder.path, len(source), cut, batch_size, mesh.size, devices[0].platform, total_steps,
    )  # fmt: skip
    unet_key, encoders_key, state_key = jr.split(jr.key(config.run.seed), 3)
    encoders = parts.encoders(config.model, mesh, key=encoders_key)
    rate = learning_rate(config.optim, total_steps=total_steps, batch_size=batch_size)
    optimizer = make_optimizer(config.optim, rate)
    begin = partial(new_state, optimizer=optimizer, ema=config.optim.ema_decay > 0, key=state_key)
    if step is None:
        unet = parts.new_unet(config.model, mesh, key=unet_key)
        layout = shardings(jax.eval_shape(begin, unet), mesh)
        state = jax.jit(begin, out_shardings=layout, donate_argnums=0)(unet)
        _warn_if_frozen(state.unet, config)
    else:
        state = checkpoints.restore(step, _state_shapes(parts, config, begin, mesh))
        log.info("resuming %s at step %d of %d", folder.path, step, total_steps)
    folder.config.write_text(to_yaml(config), encoding="utf-8")
    return Run(
        config, folder, checkpoints, mesh, batch_size, total_steps, source, parts, encoders, state, optimizer, rate,
        None if saved is None else saved.data,
    )  # fmt: skip


def configure_jax(config: TrainConfig) -> None:
    """JAX's global settings: matrix precision and the persistent compile cache."""
    precision = {"DEFAULT": None, "HIGH": "high", "HIGHEST": "highest"}[config.model.precision]
    jax.config.update("jax_default_matmul_precision", precision)
    cache = config.run.jax_cache_dir or str(Path.home() / ".cache" / "sdxl_eqx" / "jax")
    jax.config.update("jax_compilation_cache_dir", None if cache == "none" else cache)


def _check_resolution(resolution: int, parts: ModelParts) -> None:
    multiple = parts.vae.downscale * 2 ** (len(parts.unet.block_out_channels) - 1)
    if resolution % multiple:
        raise ValueError(
            f"--resolution {resolution}: this model divides sides by {multiple}; use a multiple of {multiple}."
        )


def _check_same_model(saved: Saved, parts: ModelParts, folder: RunFolder) -> None:
    now = parts.unet.to_json()
    different = [key for key in now if saved.unet.get(key) != now[key]]
    if different:
        was = {key: saved.unet.get(key) for key in different}
        raise ValueError(
            f"--run-name {folder.path.name}: its checkpoints are of another model ({was}, now "
            f"{ {key: now[key] for key in different} }); give the model that it was begun with, or another run name."
        )


BEGUN_WITH = ("seed", "weights_dtype", "new_text_encoders", "diffusion_scheduler_config.prediction_type")
"""Flags that a run keeps to its end: with others, its weights would be trained on towards something else."""


def _check_same_flags(saved: Saved, config: TrainConfig) -> None:
    """Refuse to resume with flags that may not change, and say which of the others did."""
    was, now = _dotted(saved.config), _dotted(flat(config))
    for key in now:
        if was.get(key, now[key]) == now[key]:
            continue
        if key in BEGUN_WITH or (key == "ema_decay" and (was[key] > 0) != (now[key] > 0)):
            raise ValueError(
                f"--{key.replace('_', '-')} {now[key]!r}: the run was begun with {was[key]!r}; "
                "give that, or another --run-name."
            )
        log.info("resuming with %s %r (was %r)", key, now[key], was[key])


def _dotted(values: dict[str, Any]) -> dict[str, Any]:
    """Flat values with those of mappings under dotted names."""
    pairs = {}
    for key, value in values.items():
        inner = value if isinstance(value, dict) else {"": value}
        pairs.update({f"{key}.{name}" if name else key: v for name, v in inner.items()})
    return pairs


def _state_shapes(parts: ModelParts, config: TrainConfig, begin: Any, mesh: Mesh) -> TrainState:
    """The shapes and layout of the state, without making one."""

    def make() -> TrainState:
        return begin(cast(UNet(parts.unet, key=jr.key(0)), jnp.dtype(config.model.weights_dtype)))

    shapes = eqx.filter_eval_shape(make)
    layout = shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)


def _warn_if_frozen(unet: Any, config: TrainConfig) -> None:
    """Say so where low-precision weights are too coarse for steps as long as the learning rate, as Adam's are."""
    if config.model.weights_dtype == "float32":
        return
    bits = jnp.finfo(config.model.weights_dtype).nmant + 2
    rate = config.optim.learning_rate

    @jax.jit
    def stuck(tree: Any) -> Any:
        leaves = jax.tree.leaves(tree)
        return sum(jnp.sum(jnp.abs(x) * 2.0**-bits > rate) for x in leaves) / sum(x.size for x in leaves)

    share = float(stuck(unet))
    if share > 0.1:
        log.warning(
            "--weights-dtype %s with --learning-rate %g: %.0f%% of the weights are too large for a step of that size "
            "to change them, so they will not train; use float32 weights (activations stay %s) or a higher rate.",
            config.model.weights_dtype, rate, 100 * share, config.model.activations_dtype,
        )  # fmt: skip
