"""What a run would need, known before anyone has the devices: the step compiled ahead of time, and read."""

import dataclasses
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.loading import ModelParts, ModelShapes
from sdxl_eqx.parallel import topologies
from sdxl_eqx.parallel.begin import configure_jax
from sdxl_eqx.parallel.collectives import collectives, sent
from sdxl_eqx.parallel.compiler_flags import set_compiler_flags
from sdxl_eqx.parallel.mesh import describe, make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.flops import denoising_flops, step_recompute_ratio, training_flops
from sdxl_eqx.training.memory import Encoding, step_bytes
from sdxl_eqx.training.optimizer import make_optimizer, rates
from sdxl_eqx.training.program import Program

log = logging.getLogger("sdxl_eqx")

SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
"""The model whose shapes are known here, so that nothing of it is fetched."""

GB = 1e9


@dataclass(frozen=True)
class Report:
    """What a compiled step needs. Bytes are of one device."""

    topology: str
    devices: int
    mesh: dict[str, int]
    """Sizes of the axes that are more than one device."""
    per_device_batch_size: float
    remat_policy: str
    attention: str
    effort: float
    argument_bytes: int
    """State, batch and frozen encoders, all the time."""
    temp_bytes: int
    """Of the step while it runs."""
    peak_bytes: int
    """At its most, what the program itself takes included."""
    chip_bytes: int
    """Of the device."""
    fits: bool
    """Whether the peak is within what a program may fill of the device."""
    collectives: dict[str, dict[str, int]]
    """By kind, how many run in a step, and the bytes of their whole arrays on a device."""
    tflop_per_step: float
    """Of all devices: three times the UNet's forward pass, and VAE and text encoders where they run."""
    recompute_ratio: float
    """What both passes compute over three times the forward pass of the UNet, where the whole of it trains; else over
    both passes without anything computed again."""
    ideal_step_seconds: float
    """Of tflop_per_step at 100% of the devices' bfloat16 peak."""
    image_seconds: float
    """Of one device for each image, at the published peaks: to compute, what is computed again included, or to send
    over the network of a slice or host, whichever is longer; and to read and write weights, moments and average once.
    What the search goes by."""
    lower_seconds: float
    compile_seconds: float


class DoesNotFit(ValueError):
    """The compiler itself refuses a program, for want of memory."""


def begin_without_devices(config: TrainConfig) -> None:
    """What must come before JAX starts: nothing here is used but the CPU, and compilers get the flags of a run.

    Raises:
        ValueError: where the topology's name is unknown.
    """
    chip = topologies.chip(config.parallel.compile_topology)
    os.environ["JAX_PLATFORMS"] = "cpu"  # for processes that are asked about flags; this one has read it
    jax.config.update("jax_platforms", "cpu")
    set_compiler_flags(chip.hardware, ahead=True)
    configure_jax(config.run, config.model.precision)
    jax.config.update("jax_enable_compilation_cache", False)  # what it takes to compile is part of the answer


def _shapes(config: TrainConfig) -> ModelShapes:
    """Those of the config's model; of SDXL's own they are known here."""
    model, scheduler = config.model, config.diffusion_scheduler_config
    if model.pretrained_model_name_or_path == SDXL_BASE and not model.unet_checkpoint:
        shapes = ModelShapes.sdxl_base(scheduler)
        if not model.train_new_unet or model.norm_num_groups <= 0:
            return shapes
        unet = dataclasses.replace(shapes.unet, norm_num_groups=model.norm_num_groups)
        return dataclasses.replace(shapes, unet=unet)
    return ModelParts.read(model, scheduler, token=config.data.hf_access_token, with_weights=False)


def shard_bytes(tree: Any) -> int:
    """Bytes of arrays (or shapes) on one device."""
    leaves = [x for x in jax.tree.leaves(tree) if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


@dataclass(frozen=True)
class Target:
    """What is compiled for what."""

    config: TrainConfig
    effort: float
    chip: topologies.Chip
    devices: Sequence[Any]
    shapes: ModelShapes

    @classmethod
    def of(cls, config: TrainConfig, effort: float) -> "Target":
        """The devices and the model of a config."""
        parallel = config.parallel
        devices = topologies.devices(parallel.compile_topology, max(parallel.compile_topology_num_slices, 1))
        chip = topologies.chip(parallel.compile_topology)
        return cls(config, effort, chip, devices, _shapes(config))

    def program(self, config: TrainConfig) -> Program:
        """The step of a config."""
        return Program.make(config, self.shapes, self.devices, self.chip.limit)

    def compiled(self, config: TrainConfig) -> Report:
        """The report of a config.

        Raises:
            DoesNotFit: where the compiler itself refuses, for want of memory.
            ValueError: where it fails in another way, or the config does not suit the devices.
        """
        program = self.program(config)
        log.info(
            "compiling %s: %g images a device, remat %s, for %s",
            describe(program.mesh), program.part_size / program.mesh.size, program.compute.remat,
            config.parallel.compile_topology,
        )  # fmt: skip
        optimizer = make_optimizer(config.optim, *rates(config, total_steps=1000, batch_size=program.batch_size))
        began = time.perf_counter()
        traced = program.jit(optimizer).trace(*program.arguments(optimizer))
        lowered = traced.lower(lowering_platforms=({"gpu": "cuda"}.get(self.chip.hardware, self.chip.hardware),))
        lowering = time.perf_counter() - began
        began = time.perf_counter()
        options = {"exec_time_optimization_effort": self.effort} if self.effort else None
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            said = re.search(r"Used [\d.]+\w of [\d.]+\w", str(error))
            what = f"--compile-topology {config.parallel.compile_topology}: "
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise ValueError(f"{what}the compiler failed ({str(error).splitlines()[0][:300]}).") from error
            raise DoesNotFit(
                f"{what}{config.optim.per_device_batch_size:g} images a device with --remat-policy "
                f"{program.compute.remat} do not fit, the compiler says ({said[0] if said else str(error)[:200]}). "
                "What helps, where it is not so yet: a lower --per-device-batch-size, --remat-policy full, weights "
                "shared by --ici-fsdp-parallelism, more devices."
            ) from error
        return self._read(program, optimizer, compiled, lowering, time.perf_counter() - began)

    def estimate(self, config: TrainConfig) -> int:
        """About how many images fit each device, by what the backward pass keeps; 1 or more."""
        layout = Layout(make_mesh(config.parallel, self.devices), config.parallel.logical_axis_rules)
        shares = layout.size(layout.batch)
        batch = shares / layout.mesh.size
        one = dataclasses.replace(config, optim=dataclasses.replace(config.optim, per_device_batch_size=batch))
        compute = Program.make(one, self.shapes, self.devices, None).compute
        encoders = Encoding.of(self.shapes, layout, config)
        side = config.data.resolution // self.shapes.vae.downscale
        none, some = (step_bytes(config, self.shapes.unet, layout, n, side, compute, encoders) for n in (0.0, 1.0))
        return max(int((self.chip.limit - none) / (some - none)), 1)

    def _read(self, program: Program, optimizer: Any, compiled: Any, lowering: float, compiling: float) -> Report:
        """The report of a compiled step."""
        memory = compiled.memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        peak = arguments + temporaries + outputs + memory.generated_code_size_in_bytes
        traffic = collectives(compiled.as_text())
        n, batch, config = program.mesh.size, program.batch_size, program.config
        side = config.data.resolution // self.shapes.vae.downscale
        resolution = config.data.resolution
        unet = batch * denoising_flops(self.shapes, config, side, side) / 1e12
        everything = batch * training_flops(self.shapes, config, (resolution, resolution)) / 1e12
        shares = program.layout.size(program.layout.batch)
        ratio = step_recompute_ratio(self.shapes, config, program.compute, batch=shares, side=side, dtype=program.dtype)
        peak_rate = n * self.chip.tflops
        computing = (unet * ratio + everything - unet) / peak_rate
        state = 2 * shard_bytes(program.state(optimizer)) / GB / self.chip.bandwidth
        # Beyond one host, GPUs have one network card each (DGX H100: 400 Gbit/s).
        crosses = self.chip.hardware == "gpu" and n > topologies.GPUS_OF_A_HOST
        network = sent(traffic) / GB / (topologies.NETWORK_CARD if crosses else self.chip.network)
        return Report(
            topology=config.parallel.compile_topology,
            devices=n,
            mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1},
            per_device_batch_size=program.part_size / n,
            remat_policy=program.compute.remat,
            attention=config.attention.attention,
            effort=self.effort,
            argument_bytes=arguments,
            temp_bytes=temporaries,
            peak_bytes=peak,
            chip_bytes=self.chip.memory,
            fits=peak <= self.chip.limit,
            collectives={kind: dataclasses.asdict(one) for kind, one in traffic.items()},
            tflop_per_step=everything,
            recompute_ratio=ratio,
            ideal_step_seconds=everything / peak_rate,
            image_seconds=(max(computing, network) + state) * n / batch,
            lower_seconds=lowering,
            compile_seconds=compiling,
        )
