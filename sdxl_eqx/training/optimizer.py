"""AdamW with its learning rate over time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int, UInt32

from sdxl_eqx.config import OptimConfig
from sdxl_eqx.weights.names import is_stacked


def learning_rate(config: OptimConfig, *, total_steps: int, batch_size: int) -> optax.Schedule:
    """Learning rate at each update: linear warm-up, then constant, or a fall to zero at the end of the schedule."""
    peak = config.learning_rate * (batch_size if config.scale_lr else 1)
    length = total_steps if config.learning_rate_schedule_steps == -1 else config.learning_rate_schedule_steps
    warmup = int(length * config.warmup_steps_fraction)
    rest = max(length - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }[config.lr_schedule]()
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip by value, clip by global norm, AdamW (Loshchilov and Hutter 2019), in that order."""
    by_value, by_norm = config.opt_enable_grad_clipping, config.opt_enable_grad_global_norm_clipping
    # Always three parts, so that clipping can be switched on and off when a run is resumed.
    optimizer = optax.chain(
        optax.clip(config.max_grad_value) if by_value else optax.identity(),
        optax.clip_by_global_norm(config.max_grad_norm) if by_norm else optax.identity(),
        optax.adamw(
            schedule,
            config.adam_b1,
            config.adam_b2,
            config.adam_eps,
            weight_decay=config.adam_weight_decay,
            mask=None if config.decay_all else is_decayed,
        ),
    )
    return optimizer if config.moments_dtype == "float32" else rounded(optimizer)


class RoundedState(NamedTuple):
    """The state of an optimizer whose moments are kept in bfloat16."""

    updates: Int[Array, ""]
    """Done so far; they draw the rounding."""
    inner: Any


def rounded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` with its moments kept in bfloat16, rounded stochastically; each update is computed in float32.

    To the nearest, a second moment would stand still: AdamW's step towards the new square is at most 0.1% of it, and
    neighbours in bfloat16 are 0.4 to 0.8% apart. Rounded up as often as the distance says, it moves right on average
    (Zamirai et al. 2020, "Revisiting BFloat16 Training").
    """

    def is_moment(x: Any) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating)

    def init(params: Any) -> RoundedState:
        inner = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if is_moment(x) else x, optimizer.init(params))
        return RoundedState(jnp.zeros((), jnp.int32), inner)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RoundedState]:
        inner = jax.tree.map(lambda x: x.astype(jnp.float32) if is_moment(x) else x, state.inner)
        updates, inner = optimizer.update(updates, inner, params)
        leaves, structure = jax.tree.flatten(inner)
        kept = [stochastic_round(x, state.updates, i) if is_moment(x) else x for i, x in enumerate(leaves)]
        return updates, RoundedState(state.updates + 1, jax.tree.unflatten(structure, kept))

    return optax.GradientTransformation(init, update)


def stochastic_round(x: Float32[Array, "..."], count: Int[Array, ""], stream: int) -> BFloat16[Array, "..."]:
    """float32 to one of its two neighbours in bfloat16, the nearer one the more often; `count` and `stream` draw.

    The draw is an integer hash of an entry's index (Wellons 2018, `lowbias32`): it costs no memory and fuses with the
    update.
    """
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    noise = _mix(index ^ _mix(count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(stream)))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def is_decayed(params: Any) -> Any:
    """For each array, whether weight decay applies: to matrices and convolutions, not to norms and biases."""

    def one(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return leaf.ndim - is_stacked(name) >= 2

    return jax.tree_util.tree_map_with_path(one, params)
