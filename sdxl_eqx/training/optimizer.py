"""The optimizers, each with its learning rate over time."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sdxl_eqx.config import OptimConfig, TrainConfig, step_rules
from sdxl_eqx.training.eightbit import scale_by_adam_8bit
from sdxl_eqx.training.networks import TEXT, path_of
from sdxl_eqx.training.rounding import rounded
from sdxl_eqx.weights.names import is_stacked


def learning_rate(config: OptimConfig, *, total_steps: int, batch_size: int) -> optax.Schedule:
    """Learning rate at each update: linear warm-up, then the schedule, of which all but two end at zero.

    cosine_with_restarts and piecewise are diffusers' (`get_cosine_with_hard_restarts_schedule_with_warmup`,
    `get_piecewise_constant_schedule`, whose updates count from the run's first); rex is Chen et al. 2022, equation 2.
    `batch_size` is the samples of an update, accumulated ones too.

    Raises:
        ValueError: for step rules that cannot be read.
    """
    peak = config.learning_rate * (batch_size if config.scale_lr else 1)
    length = total_steps if config.learning_rate_schedule_steps == -1 else config.learning_rate_schedule_steps
    warmup = int(length * config.warmup_steps_fraction)
    rest = max(length - warmup, 1)
    first = peak
    if config.lr_schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.lr_schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif config.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    elif config.lr_schedule == "cosine_with_restarts":
        after = _restarts(peak, rest, config.lr_num_cycles)
    elif config.lr_schedule == "rex":
        after = _rex(peak, rest)
    else:
        first, after = _piecewise(peak, config.lr_step_rules, warmup)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, first, warmup), after], [warmup])


def rates(config: TrainConfig, *, total_steps: int, batch_size: int) -> tuple[optax.Schedule, optax.Schedule | None]:
    """(the learning rate, that of the text encoders if they train), each at its update."""
    text = dataclasses.replace(config.optim, learning_rate=config.text.text_encoder_learning_rate)
    of = partial(learning_rate, total_steps=total_steps, batch_size=batch_size)
    return of(config.optim), of(text) if config.text.train_text_encoder else None


def _restarts(peak: float, rest: int, cycles: int) -> optax.Schedule:
    def rate(n: Any) -> Array:
        n = jnp.asarray(n)
        # In whole numbers, or a restart rounded down to just before it would be the end of the cycle before.
        progress = (n * cycles % rest) / rest
        return jnp.where(n >= rest, 0.0, peak * 0.5 * (1 + jnp.cos(jnp.pi * progress)))

    return rate


def _rex(peak: float, rest: int) -> optax.Schedule:
    def rate(n: Any) -> Array:
        left = 1 - jnp.minimum(jnp.asarray(n) / rest, 1.0)
        return peak * left / (0.5 + 0.5 * left)

    return rate


def _piecewise(peak: float, text: str, warmup: int) -> tuple[float, optax.Schedule]:
    """(the rate after the warm-up, the rate at each update after it)."""
    rules = step_rules(text)
    if rules is None:
        raise ValueError(f"--lr-step-rules {text!r} must be FACTOR:UPDATE,...,FACTOR, as 1:1000,0.1:2000,0.01.")
    first = peak * next(factor for factor, until in rules if until == -1 or warmup < until)

    def rate(n: Any) -> Array:
        value = jnp.float32(peak * rules[-1][0])
        for factor, until in reversed(rules[:-1]):
            value = jnp.where(jnp.asarray(n) + warmup < until, peak * factor, value)
        return value

    return first, rate


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, text_schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Clip by value, clip by global norm, then the optimizer, in that order; text encoders have their own rate.

    AdamW is Loshchilov and Hutter 2019, Lion Chen et al. 2023, Adafactor Shazeer and Stern 2018, Prodigy Mishchenko
    and Defazio 2023. Weight decay is decoupled: of each update it takes the learning rate times itself.

    Raises:
        ValueError: where moments of 8 bits should be kept in bfloat16.
    """
    by_value, by_norm = config.opt_enable_grad_clipping, config.opt_enable_grad_global_norm_clipping
    # Always three parts, so that clipping can be switched on and off when a run is resumed.
    optimizer = optax.chain(
        optax.clip(config.max_grad_value) if by_value else optax.identity(),
        optax.clip_by_global_norm(config.max_grad_norm) if by_norm else optax.identity(),
        _inner(config, schedule) if text_schedule is None else _two_rates(config, schedule, text_schedule),
    )
    if config.moments_dtype == "float32":
        return optimizer
    if config.optimizer == "adamw8bit":
        raise ValueError(
            f"--moments-dtype {config.moments_dtype} has no meaning with --optimizer adamw8bit, whose moments have 8 "
            "bits; leave it out, or take --optimizer adamw."
        )
    return rounded(optimizer)


def _two_rates(
    config: OptimConfig, schedule: optax.Schedule, text_schedule: optax.Schedule
) -> optax.GradientTransformation:
    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: str(path_of(path).startswith(TEXT)), params)

    return optax.partition({"False": _inner(config, schedule), "True": _inner(config, text_schedule)}, labels)


def _inner(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    b1, b2, eps, decay = config.adam_b1, config.adam_b2, config.adam_eps, config.adam_weight_decay
    mask = None if config.decay_all else is_decayed
    if config.optimizer == "adamw":
        return optax.adamw(schedule, b1, b2, eps, weight_decay=decay, mask=mask)
    if config.optimizer == "lion":
        return optax.lion(schedule, b1, b2, weight_decay=decay, mask=mask)
    if config.optimizer == "prodigy":
        return _prodigy(config, schedule, mask)
    if config.optimizer == "adamw8bit":
        direction = [scale_by_adam_8bit(b1, b2, eps)]
    else:
        # Steps of the learning rate's size, as transformers' `Adafactor(scale_parameter=False, relative_step=False)`.
        direction = [optax.scale_by_factored_rms(), _clip_blocks(1.0)]
    return optax.chain(*direction, optax.add_decayed_weights(decay, mask), optax.scale_by_learning_rate(schedule))


def _clip_blocks(limit: float) -> optax.GradientTransformation:
    """Each array's update scaled so that its root mean square is at most `limit`; of a stack, each block's."""

    def one(path: Any, x: Float[Array, "..."]) -> Array:
        stacked = is_stacked(jax.tree_util.keystr(path, simple=True, separator="."))
        square = jnp.mean(jnp.square(x), axis=tuple(range(int(stacked), x.ndim)), keepdims=True)
        return x / jnp.maximum(1.0, jnp.sqrt(square) / limit)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(one, updates))


def _prodigy(
    config: OptimConfig, schedule: optax.Schedule, mask: Callable[[Any], Any] | None
) -> optax.GradientTransformation:
    """optax's Prodigy with weight decay that can be masked; it makes no update while it has no estimate."""
    b1, b2 = config.adam_b1, config.adam_b2
    # A warm-up begins at a rate of 0, which without the safeguard is 0 / 0 (Prodigy's README).
    safeguard = config.warmup_steps_fraction > 0
    inner = optax.contrib.prodigy(schedule, (b1, b2), eps=config.adam_eps, safeguard_warmup=safeguard)

    def init(params: Any) -> Any:
        # Copies: the first weights must not be the arrays of the weights themselves, which are donated.
        return inner.init(jax.tree.map(lambda x: jnp.array(x, copy=True), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved: tuple[Any, Any] = inner.update(updates, state, params)
        updates, after = moved
        # Gradients that have all been 0 say nothing of the distance: 0 / 0.
        is_estimate = jnp.isfinite(after.estim_lr)
        updates = jax.tree.map(lambda x: jnp.where(is_estimate, x, 0.0), updates)
        after = jax.tree.map(lambda new, old: jnp.where(is_estimate, new, old), after, state)
        count = state.count + 1
        step = state.estim_lr * schedule(state.count) * jnp.sqrt(1 - b2**count) / (1 - b1**count)
        decayed = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
        fallen = config.adam_weight_decay * step
        updates = jax.tree.map(lambda u, p, falls: u - fallen * p if falls else u, updates, params, decayed)
        return updates, after

    return optax.GradientTransformation(init, update)


def is_decayed(params: Any) -> Any:
    """For each array, whether weight decay applies: to matrices and convolutions, not to norms and biases."""

    def one(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return leaf.ndim - is_stacked(name) >= 2

    return jax.tree_util.tree_map_with_path(one, params)
