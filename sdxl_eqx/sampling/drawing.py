"""How pictures are drawn on these devices: what the compiled programs of the pipeline depend on."""

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel.specs import Layout, put

T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn."""

    dtype: Any
    """Of the UNet's computation."""
    compute: Compute = Compute()
    """Of UNet and ControlNets."""
    decoding: Compute = Compute()
    """Of VAE and text encoders."""
    layout: Layout | None = None
    """Where arrays lie, on more than one device; pictures must then divide over those that share a batch."""
    vae_dtype: Any = jnp.float32
    """In which the VAE decodes."""
    tile: int = 0
    """Side in pixels of the tiles in which it decodes; 0 decodes whole."""

    def put(self, tree: T) -> T:
        """Arrays that every process has, on the devices."""
        layout = self.layout
        return tree if layout is None else jax.tree.map(lambda x: put(x, layout.whole), tree)

    def place(self, tree: T) -> T:
        """Activations on the devices that compute them."""
        return tree if self.layout is None else self.layout.enter(tree)

    @property
    def shares(self) -> int:
        """What the pictures drawn at once must divide by."""
        return 1 if self.layout is None else self.layout.size(self.layout.batch)
