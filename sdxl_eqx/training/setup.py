"""Everything that a run needs before its first step; what can be wrong with the input is found here."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from sdxl_eqx.config import ParallelConfig, TrainConfig, flat, to_yaml
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.latents import LatentRecords
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.models.sdxl import SDXL, Encoders
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.linear import Int8Weight
from sdxl_eqx.nn.quantize import stored_in_int8
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.begin import configure_jax
from sdxl_eqx.parallel.devices import check_dtype, choose_hardware, memory
from sdxl_eqx.parallel.mesh import describe
from sdxl_eqx.parallel.specs import ACTIVATIONS, WEIGHTS, Layout
from sdxl_eqx.training.beginning import Beginning
from sdxl_eqx.training.checkpoint import Checkpoints, Saved
from sdxl_eqx.training.class_pictures import draw_class_pictures
from sdxl_eqx.training.inputs import Inputs, cut_captions, read_data_and_model
from sdxl_eqx.training.networks import Networks, join
from sdxl_eqx.training.optimizer import make_optimizer, rates
from sdxl_eqx.training.program import Program
from sdxl_eqx.training.run_folder import RunFolder, new_name
from sdxl_eqx.training.state import TrainState, new_state
from sdxl_eqx.training.timings import Timings
from sdxl_eqx.training.trackers import check_tracker

log = logging.getLogger("sdxl_eqx")


@dataclass
class Run:
    """A run that is ready to go on from `state.step`."""

    config: TrainConfig
    """With the run's name in it."""
    folder: RunFolder
    checkpoints: Checkpoints
    program: Program
    total_steps: int
    inputs: Inputs
    encoders: Encoders
    """VAE and text encoders as the run began with them."""
    frozen: Networks
    """What the step computes with and does not train."""
    state: TrainState
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    data_position: dict[str, int]
    """Where the run was saved: its next_batch and batch_size; empty at the beginning."""

    @property
    def source(self) -> Source | LatentRecords:
        """The samples."""
        return self.inputs.source

    @property
    def parts(self) -> ModelParts:
        """The model, read but for its weights."""
        return self.inputs.parts

    @property
    def layout(self) -> Layout:
        """Where arrays lie."""
        return self.program.layout

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.program.mesh

    @property
    def batch_size(self) -> int:
        """Samples of one step on all devices."""
        return self.program.batch_size

    def model(self, trained: Networks) -> SDXL:
        """The model that draws, with what trains in some state."""
        networks = join(trained, self.frozen)
        encoders = self.encoders if networks.encoders is None else networks.encoders
        return SDXL(networks.unet, encoders, networks.controlnet)

    def saved(self, next_batch: int) -> Saved:
        """What stands beside the arrays of a checkpoint."""
        ema = self.config.optim.ema_decay > 0
        texts = {"text_encoder": self.parts.text, "text_encoder_2": self.parts.text_2}
        whole = self.config.trains == "unet" and self.config.text.train_text_encoder
        beside = {part: config.to_json() for part, config in texts.items()} if whole else {}
        position = {"next_batch": next_batch, "batch_size": self.batch_size}
        frozen = "" if self.config.trains == "unet" else self.parts.fingerprint
        return Saved(self.parts.unet.to_json(), ema, flat(self.config), position, self.config.trains, beside, frozen)


@dataclass(frozen=True)
class Finished:
    """A run of that name is done already."""

    folder: str
    step: int


def prepare(config: TrainConfig, timings: Timings | None = None) -> Run | Finished:
    """Read and check all input, lay the model out on the devices, and find where the run goes on.

    How a run starts: a run_name without a folder starts anew, from the model folder's UNet or a random one; with
    checkpoints it goes on from the newest one; with all steps done and the export there, it is finished.

    Raises:
        ValueError: for anything wrong with the input, before anything is compiled but what fills random weights; where
            the model alone does not fit the devices.
    """
    configure_jax(config.run, config.model.precision)
    timings = timings or Timings()
    hosts.together(partial(check_tracker, config.metrics))
    draw_class_pictures(config, _Plan.make)
    with timings.of("read_inputs"):
        plan = hosts.together(partial(_Plan.make, config))
    _check_same_everywhere(plan)
    name = hosts.agree(config.run.run_name or new_name())
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_name=name))
    folder = hosts.together(partial(RunFolder.open, config.run.root, name, is_first=hosts.is_first()))
    try:
        with timings.of("load_model"):
            return _open(config, plan, folder)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            "out of memory: weights and optimizer do not fit the devices; share them with --ici-fsdp-parallelism. "
            f"({str(error).splitlines()[0][:200]})"
        ) from error


@dataclass(frozen=True)
class _Plan:
    """What a run is to do, before anything of it is opened or loaded."""

    program: Program
    total_steps: int
    inputs: Inputs

    @classmethod
    def make(cls, config: TrainConfig) -> "_Plan":
        """Read and check the input. No process waits for another one here."""
        devices = choose_hardware(config.run.hardware)
        check_dtype(devices, config.model.activations_dtype)
        for name, axes in config.parallel.logical_axis_rules:
            if name not in WEIGHTS + ACTIVATIONS and (name, axes) not in ParallelConfig.logical_axis_rules:
                log.info("logical_axis_rules %s: %s has no effect here: no dimension is named so", name, list(axes))
        inputs = read_data_and_model(config)
        program = Program.make(config, inputs.parts, devices, memory(devices))
        total_steps = config.optim.max_train_steps
        if total_steps == -1:
            total_steps = math.ceil(config.optim.num_train_epochs * inputs.trained_on / program.batch_size)
        return cls(program, total_steps, inputs)


def _open(config: TrainConfig, plan: _Plan, folder: RunFolder) -> Run | Finished:
    """The run in its folder: begun, resumed, or found to be finished."""
    program, layout, inputs, parts = plan.program, plan.program.layout, plan.inputs, plan.inputs.parts
    checkpoints = Checkpoints(
        folder.checkpoints,
        keep=config.checkpoint.checkpoints_to_keep,
        broadcast_over=_replica_axis(config, layout),
    )
    step = checkpoints.latest()
    saved = None if step is None else hosts.together(partial(checkpoints.saved, step))
    if step is not None and saved is not None:
        hosts.together(partial(_check_same_model, saved, config, parts, folder))
        hosts.together(partial(_check_same_flags, saved, config))
        if step >= plan.total_steps and folder.finished_step == step:
            checkpoints.close()
            folder.close()
            return Finished(folder.place, step)

    log.info(
        "%s: %d samples (%s), batches of %d on %s, %d steps", folder.place, inputs.trained_on,
        cut_captions(inputs.source, parts, config.data), program.batch_size, describe(layout.mesh), plan.total_steps,
    )  # fmt: skip
    unet_key, encoders_key, state_key = jr.split(jr.key(config.run.seed), 3)
    encoders = hosts.together(partial(parts.encoders, config.model, layout, key=encoders_key))
    rate, text_rate = rates(config, total_steps=plan.total_steps, batch_size=program.batch_size)
    optimizer = make_optimizer(config.optim, rate, text_rate)
    unet = None
    if step is None or config.trains != "unet":  # else the checkpoint has it
        unet = hosts.together(partial(parts.new_unet, config.model, layout, key=unet_key))
        if config.lora.int8_base and config.trains == "lora":
            unet = _in_int8(unet, layout)
    begun = Beginning(config, program, unet, None if program.is_encoded else encoders)
    if step is None:
        lora = hosts.together(partial(begun.read_init, parts.model))
        trained = hosts.together(partial(begun.trained, key=jr.fold_in(unet_key, 1)))
        trained = trained if lora is None else begun.going_on(trained, lora)
        begin = partial(new_state, optimizer=optimizer, ema=config.optim.ema_decay > 0, key=state_key)
        where = layout.shardings(jax.eval_shape(begin, trained))
        state = jax.jit(begin, out_shardings=where, donate_argnums=0)(trained)
        if config.trains == "unet":
            _warn_if_frozen(state.trained, config)
    else:
        state = hosts.together(partial(checkpoints.restore, step, program.state(optimizer)))
        log.info("resuming %s at step %d of %d", folder.place, step, plan.total_steps)
    frozen = begun.frozen()
    hosts.together(partial(_write_config, config, folder))
    # Memory differs by a few bytes from host to host, the program may not.
    program = program.with_remat(hosts.agree(program.compute.remat))
    return Run(
        config, folder, checkpoints, program, plan.total_steps, inputs, encoders, frozen, state, optimizer, rate,
        {} if saved is None else saved.data,
    )  # fmt: skip


def _in_int8(unet: UNet, layout: Layout) -> UNet:
    """The UNet with a base in 8 bits; the weights that it takes the place of are gone."""
    shardings = layout.shardings(eqx.filter_eval_shape(stored_in_int8, unet))
    where = iter([x for x in jax.tree.leaves(shardings, is_leaf=_is_int8) if _is_int8(x)])

    def rounded(weight: Array) -> Int8Weight:
        made = jax.jit(Int8Weight.of, out_shardings=next(where))(weight)
        weight.delete()  # a stack at a time: the whole would not fit beside its copy
        return made

    return stored_in_int8(unet, rounded)


def _is_int8(x: Any) -> bool:
    return isinstance(x, Int8Weight)


def _write_config(config: TrainConfig, folder: RunFolder) -> None:
    """Write the resolved config into the run's folder."""
    also = ["config.yml"] if config.metrics.save_config_to_gcs and folder.mirror is not None else []
    folder.write_config(to_yaml(config), also=also)


OF_A_HOST = (
    "run_name", "train_data_dir", "dataset_save_location", "jax_cache_dir", "pretrained_model_name_or_path",
    "unet_checkpoint", "metrics_file", "output_dir", "base_output_directory",
)  # fmt: skip
"""Flags that may be another in each process: names of places, and what the first process says for all."""


def _check_same_everywhere(plan: _Plan) -> None:
    """Refuse processes that would run different programs, or one of them longer than the others."""
    for what, value in (
        ("steps", plan.total_steps),
        ("samples a step", plan.program.batch_size),
        ("pictures", len(plan.inputs.source)),
        ("a UNet of", plan.inputs.parts.unet.to_json()),
    ):
        hosts.same(value, what)
    hosts.same({key: value for key, value in flat(plan.program.config).items() if key not in OF_A_HOST}, "the flags")


def _replica_axis(config: TrainConfig, layout: Layout) -> str | None:
    """The axis of the mesh along which a checkpoint is broadcast, if it is asked for.

    Raises:
        ValueError: where no axis holds more than one replica.
    """
    if not config.checkpoint.enable_single_replica_ckpt_restoring:
        return None
    if layout.mesh.shape["data"] == 1:
        raise ValueError(
            "--enable-single-replica-ckpt-restoring: there is one replica alone, since the data axis is 1; leave it "
            "out, or set --ici-data-parallelism or --dcn-data-parallelism."
        )
    return "data"


def _check_same_model(saved: Saved, config: TrainConfig, parts: ModelParts, folder: RunFolder) -> None:
    now = parts.unet.to_json()
    different = [key for key in now if saved.unet.get(key) != now[key]]
    if different:
        was = {key: saved.unet.get(key) for key in different}
        raise ValueError(
            f"--run-name {folder.path.name}: its checkpoints are of another model ({was}, now "
            f"{ {key: now[key] for key in different} }); give the model that it was begun with, or another run name."
        )
    if config.trains != "unet" and saved.frozen and saved.frozen != parts.fingerprint:
        raise ValueError(
            f"--run-name {folder.path.name}: it was begun beside another UNet than that of {parts.name}; give the "
            "model that it was begun with, or another run name."
        )


BEGUN_WITH = (
    "seed",
    "weights_dtype",
    "moments_dtype",
    "new_text_encoders",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "use_rslora",
    "use_dora",
    "int8_base",
    "train_text_encoder",
    "train_controlnet",
    "instance_prompt",
    "class_prompt",
    "num_class_images",
    "diffusion_scheduler_config.prediction_type",
    "diffusion_scheduler_config.rescale_zero_terminal_snr",
)
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
