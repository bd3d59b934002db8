"""The compiled step of a config on devices, real or described: all that decides it, and the shapes it takes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import Mesh, NamedSharding

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.data.batch import AnyBatch, Batch, LatentBatch, LatentTextBatch
from sdxl_eqx.data.pictures import Size
from sdxl_eqx.data.tokenizer import LENGTH
from sdxl_eqx.diffusion.schedule import Schedule
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.quantize import dot_of
from sdxl_eqx.parallel.computing import encoding_compute
from sdxl_eqx.parallel.mesh import batch_sharding, global_batch_size, make_mesh, slice_count
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.computing import unet_compute
from sdxl_eqx.training.memory import Encoding
from sdxl_eqx.training.networks import Networks, network_shapes, split
from sdxl_eqx.training.state import TrainState, new_state
from sdxl_eqx.training.step import StepConfig, train_step
from sdxl_eqx.training.targets import check_targets


@dataclass(frozen=True)
class Program:
    """The step of a config for a model on devices."""

    config: TrainConfig
    shapes: ModelShapes
    layout: Layout
    part_size: int
    """Samples that all devices compute at once."""
    compute: Compute
    """Of the UNet."""
    encoding: Compute
    """Of VAE and text encoders."""

    @classmethod
    def make(cls, config: TrainConfig, shapes: ModelShapes, devices: Sequence[Any], memory: int | None) -> "Program":
        """That of these devices, each with so many bytes of memory (None: as much as is asked for).

        Raises:
            ValueError: where model, mesh, batch and attention do not go together.
        """
        layout = Layout(make_mesh(config.parallel, devices), config.parallel.logical_axis_rules)
        layout.check()
        dot_of(config.quantization.how)  # where qwix is missing, that is said here
        part_size = global_batch_size(config.optim.per_device_batch_size, layout.mesh, layout.batch)
        resolution = config.data.resolution
        shapes.check_resolution(resolution)
        if config.trains == "lora":
            check_targets(config, network_shapes(shapes, config))
        compute = unet_compute(
            config, shapes.unet, layout, part_size,
            side=resolution // shapes.vae.downscale,
            memory=memory,
            encoders=Encoding.of(shapes, layout, config),
        )  # fmt: skip
        return cls(config, shapes, layout, part_size, compute, encoding_compute(config, layout))

    @property
    def batch_size(self) -> int:
        """Samples of one step on all devices, one part after the other."""
        return self.part_size * self.config.optim.gradient_accumulation_steps

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.layout.mesh

    @property
    def dtype(self) -> Any:
        """Of the computation."""
        return jnp.dtype(self.config.model.activations_dtype)

    @property
    def is_encoded(self) -> bool:
        """Whether batches are encoded already, so that the step needs no encoders."""
        return self.config.is_text_cached

    @property
    def batch_sharding(self) -> NamedSharding:
        """How a batch is spread as it is read."""
        return batch_sharding(self.mesh, self.config.parallel.data_sharding, self.batch_size)

    @property
    def step_config(self) -> StepConfig:
        """What the step depends on."""
        optim = self.config.optim
        return StepConfig(
            self.shapes.vae.scaling_factor, self.dtype, self.compute, self.encoding, optim.ema_decay, optim.ema_every,
            self.layout if self.mesh.size > 1 else None, optim.gradient_accumulation_steps, self.config.loss,
            self.config.timestep_bias, self.config.controlnet.controlnet_conditioning_dropout,
            self.config.quantization.how, self.config.quantization.shards(slice_count(self.mesh.devices.flat)),
            self.config.text.train_text_encoder,
        )  # fmt: skip

    def networks(self) -> Networks:
        """The shapes of all that the step computes with."""
        return network_shapes(self.shapes, self.config)

    def state(self, optimizer: optax.GradientTransformation) -> TrainState:
        """The shapes of a run's state and where they lie, without making one."""
        begin = partial(new_state, optimizer=optimizer, ema=self.config.optim.ema_decay > 0, key=jr.key(0))
        return self._laid_out(eqx.filter_eval_shape(begin, split(self.networks(), self.config)[0]))

    def frozen(self) -> Networks:
        """The shapes of what the step computes with and does not train, and where they lie."""
        return self._laid_out(split(self.networks(), self.config)[1])

    def batch(self, size: Size | None = None) -> AnyBatch:
        """The shapes of a batch of pictures of a (height, width), by default the square of the resolution."""
        data, unet, downscale = self.config.data, self.shapes.unet, self.shapes.vae.downscale
        H, W = size or (data.resolution, data.resolution)
        length = LENGTH * data.caption_chunks

        def zeros(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jnp.zeros((self.batch_size, *shape), dtype)

        def make() -> AnyBatch:
            time_ids, ids = zeros(unet.number_of_time_ids), zeros(length, dtype=jnp.int32)
            beside: dict[str, Any] = {}
            if self.config.trains == "controlnet":
                beside["control"] = zeros(H, W, 3, dtype=jnp.uint8)
            if self.config.dreambooth.class_data_dir:
                beside["weight"] = zeros()
            if not data.cache_latents_text_encoder_outputs:
                return Batch(zeros(H, W, 3, dtype=jnp.uint8), ids, ids, time_ids, **beside)
            moments = zeros(H // downscale, W // downscale, unet.in_channels)
            if not self.is_encoded:
                return LatentTextBatch(moments, moments, ids, ids, time_ids, **beside)
            context, pooled = (
                zeros(length, unet.cross_attention_dim, dtype=self.dtype),
                zeros(unet.pooled_dim, dtype=self.dtype),
            )
            return LatentBatch(moments, moments, context, pooled, time_ids, **beside)

        where = self.batch_sharding
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), jax.eval_shape(make))

    def jit(self, optimizer: optax.GradientTransformation) -> Any:
        """The jitted step on (state, what is frozen, batch, schedule), with the state laid out and donated."""
        state, frozen = (_shardings(tree) for tree in (self.state(optimizer), self.frozen()))
        whole = self.layout.whole
        return jax.jit(
            partial(train_step, config=self.step_config, optimizer=optimizer),
            in_shardings=(state, frozen, self.batch_sharding, whole),
            out_shardings=(state, whole),
            donate_argnums=0,
        )

    def arguments(self, optimizer: optax.GradientTransformation, size: Size | None = None) -> tuple[Any, ...]:
        """The shapes of all that the step takes, for pictures of a (height, width)."""
        schedule = jax.eval_shape(lambda: Schedule(self.shapes.schedule))
        return self.state(optimizer), self.frozen(), self.batch(size), schedule

    def with_remat(self, remat: Any) -> "Program":
        """With another remat policy."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, remat=remat))

    def _laid_out(self, shapes: Any) -> Any:
        where = self.layout.shardings(shapes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
