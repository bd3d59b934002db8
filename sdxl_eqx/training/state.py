"""All that changes while training."""

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.training.networks import Networks


class TrainState(eqx.Module):
    """Everything that one step turns into the next; every leaf is an array."""

    step: Int[Array, ""]
    """Optimizer updates done."""
    key: PRNGKeyArray
    """The same for the whole run; each step draws from `fold_in(key, step)`."""
    trained: Networks
    """What trains, and None in place of all else."""
    opt_state: optax.OptState
    ema: Networks | None
    """Exponential moving average of what trains, if asked for."""

    @property
    def best(self) -> Networks:
        """What trains, as it is to be shown and exported."""
        return self.trained if self.ema is None else self.ema


def new_state(
    trained: Networks, optimizer: optax.GradientTransformation, *, ema: bool, key: PRNGKeyArray
) -> TrainState:
    """The state before the first step; moments and average are float32 whatever the weights are."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        trained=trained,
        opt_state=optimizer.init(cast(trained, jnp.float32)),
        ema=cast(trained, jnp.float32) if ema else None,
    )
