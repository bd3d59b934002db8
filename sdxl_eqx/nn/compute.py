"""How a model is computed: choices that change speed and memory and leave the result as it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import equinox as eqx

from sdxl_eqx.arrays import Attend
from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.nn.remat import POLICIES, Remat

M = TypeVar("M")


@dataclass(frozen=True)
class Compute:
    """How a model is computed.

    `attend` is the attention implementation. `remat` says what the backward pass computes again instead of keeping
    it (`remat.POLICIES`). `scan_unroll` blocks of a stage are unrolled together. On several devices, `gather` brings
    the weights of one layer together just before it runs (they are let go after it), and `place` says where its result
    lies.
    """

    attend: Attend = dot_product
    remat: Remat = "none"
    scan_unroll: int = 1
    gather: Callable[[Any], Any] | None = None
    place: Callable[[Any], Any] | None = None

    def run(self, layer: Callable[..., Any] | tuple[Callable[..., Any], ...], *args: Any, scanned: bool = False) -> Any:
        """`layer(*args)`, one block of a model; of a tuple, each takes the result of the one before.

        `scanned` says that this is the body of a scan.
        """

        def placed(layer: Any, *args: Any) -> Any:
            y = _chain(layer if self.gather is None else self.gather(layer), *args)
            return y if self.place is None else self.place(y)

        if self.remat == "none" and self.gather is None:
            return placed(layer, *args)

        # A scan keeps the two passes apart by itself; elsewhere XLA would find the same work twice and keep its result.
        apart = not scanned or self.scan_unroll > 1
        # Not jax.checkpoint, which would hash a module's arrays.
        return eqx.filter_checkpoint(placed, policy=POLICIES[self.remat], prevent_cse=apart)(layer, *args)


def _chain(layer: Callable[..., Any] | tuple[Callable[..., Any], ...], *args: Any) -> Any:
    """What a layer, or layers one after the other, make of the arguments."""
    first, *rest = layer if isinstance(layer, tuple) else (layer,)
    y = first(*args)
    for then in rest:
        y = then(y)
    return y
