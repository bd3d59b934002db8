"""All that changes while training."""

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.models.unet import UNet


class TrainState(eqx.Module):
    """Everything that one step turns into the next; every leaf is an array."""

    step: Int[Array, ""]
    """Optimizer updates done."""
    key: PRNGKeyArray
    """The same for the whole run; each step draws from `fold_in(key, step)`."""
    unet: UNet
    opt_state: optax.OptState
    ema: UNet | None
    """Exponential moving average of the UNet, if asked for."""

    @property
    def best(self) -> UNet:
        """The weights to show and to export."""
        return self.unet if self.ema is None else self.ema


def new_state(unet: UNet, optimizer: optax.GradientTransformation, *, ema: bool, key: PRNGKeyArray) -> TrainState:
    """The state before the first step; moments and average are float32 whatever the weights are."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        unet=unet,
        opt_state=optimizer.init(cast(unet, jnp.float32)),
        ema=cast(unet, jnp.float32) if ema else None,
    )
