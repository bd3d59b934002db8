"""How a model is computed: choices that change speed and memory and leave the result as it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax

from sdxl_eqx.arrays import Attend
from sdxl_eqx.kernels.attention import dot_product


@dataclass(frozen=True)
class Compute:
    """How a model is computed.

    `attend` is the attention implementation. `remat` says what the backward pass computes again instead of keeping
    it: nothing, all but matrix products, or all of each block. `scan_unroll` blocks of a stage are unrolled together.
    """

    attend: Attend = dot_product
    remat: Literal["none", "dots", "full"] = "none"
    scan_unroll: int = 1

    def block(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, one block of a model, under this policy of rematerialization."""
        if self.remat == "none":
            return function
        policy = jax.checkpoint_policies.dots_saveable if self.remat == "dots" else None
        return eqx.filter_checkpoint(function, policy=policy)  # jax.checkpoint would hash a module's arrays
