"""AdamW with its learning rate over time."""

from typing import Any

import jax
import optax

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
    return optax.chain(
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


def is_decayed(params: Any) -> Any:
    """For each array, whether weight decay applies: to matrices and convolutions, not to norms and biases."""

    def one(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return leaf.ndim - is_stacked(name) >= 2

    return jax.tree_util.tree_map_with_path(one, params)
