"""The loop: any plan over any model, compiled once."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sdxl_eqx.sampling.schedulers.level import After, Denoise, Latents, Level, Noise
from sdxl_eqx.sampling.schedulers.plan import Table


def combine(weights: Float[Array, " k"], outputs: tuple[Latents, ...]) -> Latents:
    """The weighted sum of the newest outputs; not a matrix product, whose precision a TPU would cut."""
    return sum((weights[k] * outputs[k] for k in range(1, len(weights))), start=weights[0] * outputs[0])


def level_at(point: Any, index: Int[Array, ""]) -> Level:
    """The level of a row's point, in evaluation `index`."""
    return Level(point.alpha, point.sigma, point.t, index)


def run(
    denoise: Denoise, x: Latents, table: Table, noise: Noise, after: After | None = None
) -> tuple[Latents, Bool[Array, " n"]]:
    """(x after the last step, whether x was finite after each): a plan's table in one `jax.lax.scan`.

    `noise` is asked only where the table is stochastic. `after(x, index, following)` is done to x after each step.
    """

    def step(carry: Any, item: Any) -> tuple[Any, Bool[Array, ""]]:
        (x, saved, outputs), (row, index) = carry, item
        x0 = denoise(x, level_at(row.level, index))
        m = row.output[0] * x + row.output[1] * jnp.clip(x0, -row.clip, row.clip)
        outputs = (m, *outputs[:-1])
        base = row.base[0] * x + row.base[1] * saved + combine(row.base_m, outputs)
        x = row.next_base * base + row.next_x0 * x0 + combine(row.next_m, outputs)
        if table.stochastic:
            x = x + row.next_noise * noise(index)
        if after is not None:
            x = after(x, index, level_at(row.following, index + 1))
        return (x, base, outputs), jnp.isfinite(x).all()

    kept = max(table.base_m.shape[1], table.next_m.shape[1])
    indices = jnp.arange(len(table.next_base), dtype=jnp.int32)
    start = (x, jnp.zeros_like(x), (jnp.zeros_like(x),) * kept)
    (x, _, _), finite = jax.lax.scan(step, start, (jax.tree.map(jnp.asarray, table), indices))
    return x, finite
