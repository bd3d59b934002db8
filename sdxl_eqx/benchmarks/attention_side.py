"""One side of the attention that is measured, in a process of its own: `python -m ...attention_side SIDE JSON`.

It says how many milliseconds each implementation takes for each shape, forward and for both passes.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from sdxl_eqx.benchmarks.sides import say

LEAST = 0.2
"""Seconds that are measured at least."""

NAMES = ("dot_product", "flash", "cudnn", "cudnn_flash_te")

WIDTH = 64
"""Of a head in SDXL's UNet."""


def shapes_of(batch: int, side: int) -> list[tuple[int, int, int, int]]:
    """(b, l, s, n) of both levels of SDXL's transformers at a side in pixels, to themselves and to 77 of a text."""
    levels = (((side // 16) ** 2, 10), ((side // 32) ** 2, 20))
    return [(batch, l, s, n) for l, n in levels for s in (l, 77)]


def ours(asked: dict[str, Any]) -> None:
    """Every implementation that serves on the first device."""
    import jax
    import jax.numpy as jnp
    import jax.random as jr

    from sdxl_eqx.config import MachineConfig
    from sdxl_eqx.kernels.choose import choose
    from sdxl_eqx.kernels.flash import Flash
    from sdxl_eqx.parallel.begin import begin_jax

    begin_jax(MachineConfig())
    device = jax.devices()[0]
    here = device.platform == "cpu"
    dtype = asked["dtype"] if asked["dtype"] != "auto" else "float32" if here else "bfloat16"
    side = asked["side"] or (256 if here else 1024)
    found: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for name in NAMES:
        try:
            attend, _ = choose(name, device.platform, dtype=dtype, head_width=WIDTH)
        except ValueError as error:
            refused[name] = str(error)
            continue
        if isinstance(attend, Flash) and attend.interpret:
            refused[name] = "attention flash: has no kernel for a CPU, where it runs in an interpreter for tests"
            continue
        forward = jax.jit(attend)

        def both(query: Any, key: Any, value: Any, cotangent: Any, attend: Any = attend) -> Any:
            out, pullback = jax.vjp(attend, query, key, value)
            return out, pullback(cotangent)

        both = jax.jit(both)
        for b, l, s, n in shapes_of(asked["batch"], side):
            sizes = ((b, l, n, WIDTH), (b, s, n, WIDTH), (b, s, n, WIDTH), (b, l, n, WIDTH))
            arrays = [jr.normal(jr.key(i), size, jnp.dtype(dtype)) for i, size in enumerate(sizes)]
            found.append({
                "name": name,
                "shape": (b, l, s, n),
                "forward": milliseconds(jax.block_until_ready, forward, *arrays[:3]),
                "both": milliseconds(jax.block_until_ready, both, *arrays),
            })  # fmt: skip
    say(found=found, refused=refused, device=device.device_kind, platform=device.platform, dtype=dtype, side=side)


def theirs(asked: dict[str, Any]) -> None:
    """torch.nn.functional.scaled_dot_product_attention, whichever of its kernels it takes."""
    import torch
    import torch.nn.functional as F

    device = "cuda" if asked["platform"] == "gpu" else "cpu"
    found = []

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def both(cotangent: Any, *leaves: Any) -> Any:
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, cotangent)

    for b, l, s, n in shapes_of(asked["batch"], asked["side"]):
        dtype = getattr(torch, asked["dtype"])
        query, key, value, cotangent = (
            torch.randn(b, n, length, WIDTH, device=device, dtype=dtype) for length in (l, s, s, l)
        )
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]

        found.append({
            "shape": (b, l, s, n),
            "forward": milliseconds(wait, F.scaled_dot_product_attention, query, key, value),
            "both": milliseconds(wait, both, cotangent, *leaves),
        })  # fmt: skip
    say(found=found)


def milliseconds(wait: Callable[[Any], object], work: Callable[..., Any], *args: Any) -> float:
    """Of one of many calls in a row, of which the last is waited for."""
    for _ in range(2):
        wait(work(*args))
    began = time.perf_counter()
    wait(work(*args))
    calls = math.ceil(LEAST / max(time.perf_counter() - began, 1e-6))
    began = time.perf_counter()
    result = None
    for _ in range(calls):
        result = work(*args)
    wait(result)
    return 1e3 * (time.perf_counter() - began) / calls


SIDES = {"ours": ours, "theirs": theirs}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
