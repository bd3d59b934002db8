"""Prints, in bytes: the peak and the arguments that a report says, and how far the first step raises memory."""

from pathlib import Path

import jax
import jax.numpy as jnp
from tiny_step import TEXT, UNET, VAE_CONFIG

from sdxl_eqx.config import DataConfig, OptimConfig, ParallelConfig, TrainConfig
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.parallel.topologies import Chip
from sdxl_eqx.training.ahead import Target
from sdxl_eqx.training.optimizer import learning_rate, make_optimizer


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (at most, since it was reset)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Compile, run one step, and say."""
    config = TrainConfig(
        optim=OptimConfig(per_device_batch_size=8.0),
        data=DataConfig(resolution=64, cache_latents_text_encoder_outputs=True),
        parallel=ParallelConfig(compile_topology="v5e:2x2"),
    )
    shapes = ModelShapes(UNET, VAE_CONFIG, TEXT, TEXT, ScheduleConfig())
    target = Target(config, 0.0, Chip("cpu", 10**12, 0.9, 1.0, 1.0, 1.0), jax.devices()[:1], shapes)
    said = target.compiled(config)
    program = target.program(config)
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, total_steps=1000, batch_size=8))
    step = program.jit(optimizer)
    state, frozen, batch, _ = program.arguments(optimizer)
    schedule = Schedule(shapes.schedule)
    compiled = step.lower(state, frozen, batch, schedule).compile()

    def filled(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(x.shape, x.dtype)

    values = jax.tree.map(filled, (state, batch))
    jax.block_until_ready(values)
    Path("/proc/self/clear_refs").write_text("5")  # the most is what there is now
    before = resident("VmRSS")
    jax.block_until_ready(compiled(values[0], frozen, values[1], schedule))
    print(said.peak_bytes, said.argument_bytes, resident("VmHWM") - before)


if __name__ == "__main__":
    main()
