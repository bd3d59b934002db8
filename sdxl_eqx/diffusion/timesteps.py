"""Which timesteps training draws, and how often."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from sdxl_eqx.config import TimestepBiasConfig


def timestep_weights(bias: TimestepBiasConfig, total: int) -> np.ndarray | None:
    """The probability of each of `total` timesteps; None if all are alike (diffusers `generate_timestep_weights`).

    Raises:
        ValueError: where a range begins past the schedule's end.
    """
    weights = np.ones(total)
    portion = int(bias.portion * total)
    if bias.strategy == "earlier":
        weights[:portion] *= bias.multiplier
    elif bias.strategy == "later":
        weights[total - portion :] *= bias.multiplier
    elif bias.strategy == "range":
        if bias.begin >= total:
            raise ValueError(
                f"--timestep-bias.begin {bias.begin} must be below {total}, the schedule's timesteps; give less."
            )
        weights[bias.begin : bias.end + 1] *= bias.multiplier
    return None if np.ptp(weights) == 0 else weights / weights.sum()


def draw_timesteps(weights: np.ndarray | None, count: int, total: int, *, key: PRNGKeyArray) -> Int[Array, " b"]:
    """`count` of the timesteps below `total`, by these probabilities; None is uniform (Ho et al. 2020)."""
    if weights is None:
        return jr.randint(key, (count,), 0, total)
    return jr.choice(key, total, (count,), p=jnp.asarray(weights, jnp.float32))
