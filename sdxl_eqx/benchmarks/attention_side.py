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

OFF = 0.02
"""Of the largest output: what bfloat16 rounds scores, weights and products to is some 0.4% of each."""

NAMES = ("dot_product", "flash", "cudnn", "cudnn_flash_te")

WIDTH = 64
"""Of a head in SDXL's UNet."""


def shapes_of(batch: int, side: int) -> list[tuple[int, int, int, int]]:
    """(b, l, s, n) of both levels of SDXL's transformers at a side in pixels, to themselves and to 77 of a text."""
    levels = (((side // 16) ** 2, 10), ((side // 32) ** 2, 20))
    return [(batch, l, s, n) for l, n in levels for s in (l, 77)]


def ours(asked: dict[str, Any]) -> None:
    """Every implementation that serves on the first device, and why the others do not."""
    import jax
    import jax.numpy as jnp
    import jax.random as jr

    from sdxl_eqx.config import MachineConfig
    from sdxl_eqx.kernels.attention import dot_product
    from sdxl_eqx.kernels.choose import choose
    from sdxl_eqx.kernels.flash import Flash
    from sdxl_eqx.parallel.begin import begin_jax

    begin_jax(MachineConfig(skip_jax_distributed_system=True))
    device = jax.devices()[0]
    here = device.platform == "cpu"
    dtype = asked["dtype"] if asked["dtype"] != "auto" else "float32" if here else "bfloat16"
    side = asked["side"] or (256 if here else 1024)
    found: list[dict[str, Any]] = []
    refused: list[str] = []

    def try_one(name: str, attend: Any, shape: tuple[int, int, int, int]) -> None:
        def both(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
            out, pullback = jax.vjp(attend, query, key, value)
            return out, pullback(cotangent)

        b, l, s, n = shape
        arrays = [jr.normal(jr.key(i), (b, x, n, WIDTH), jnp.dtype(dtype)) for i, x in enumerate((l, s, s, l))]
        forward, both = jax.jit(attend), jax.jit(both)
        wanted = dot_product(*(x[:1] for x in arrays[:3]))
        off = float(jnp.abs(forward(*arrays[:3])[:1] - wanted).max() / jnp.abs(wanted).max())
        if not off < OFF:
            raise ValueError(f"differs from dot_product by {off:.2g} of its largest, so its speed means nothing")
        found.append({
            "name": name,
            "shape": shape,
            "forward": milliseconds(jax.block_until_ready, forward, *arrays[:3]),
            "both": milliseconds(jax.block_until_ready, both, *arrays),
        })  # fmt: skip

    for name in NAMES:
        try:
            attend, _ = choose(name, device.platform, dtype=dtype, head_width=WIDTH)
        except ValueError as error:
            refused.append(str(error))
            continue
        if isinstance(attend, Flash) and attend.interpret:
            refused.append("attention flash: has no kernel for a CPU, where it runs in an interpreter for tests")
            continue
        for shape in shapes_of(asked["batch"], side):
            try:
                try_one(name, attend, shape)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                # What one kernel cannot do at one shape (its own refusals, compilers, memory) is said, and the others
                # are measured all the same.
                refused.append(f"attention {name} at {shape}: {(str(error).splitlines() or [repr(error)])[0][:300]}")
    say(found=found, refused=refused, device=device.device_kind, platform=device.platform, dtype=dtype, side=side)


def theirs(asked: dict[str, Any]) -> None:
    """torch.nn.functional.scaled_dot_product_attention, by that of its kernels which is fastest for both passes."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_gpu = asked["platform"] == "gpu"
    torch.set_float32_matmul_precision("high")  # TF32, as JAX by default
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    kernels += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION] if on_gpu else []

    def wait(_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def both(cotangent: Any, *leaves: Any) -> Any:
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, cotangent)

    def draw(b: int, length: int, n: int) -> Any:  # as the UNet has them: heads beside their width
        made = torch.randn(
            b, length, n, WIDTH, device="cuda" if on_gpu else "cpu", dtype=getattr(torch, asked["dtype"])
        )
        return made.transpose(1, 2)

    found = []
    for b, l, s, n in shapes_of(asked["batch"], asked["side"]):
        *inputs, cotangent = (draw(b, length, n) for length in (l, s, s, l))
        leaves = [x.clone().requires_grad_() for x in inputs]
        tried = []
        for kernel in kernels:
            try:
                with sdpa_kernel(kernel):
                    forward = milliseconds(wait, F.scaled_dot_product_attention, *inputs)
                    tried.append(
                        {
                            "kernel": kernel.name,
                            "forward": forward,
                            "both": milliseconds(wait, both, cotangent, *leaves),
                        }
                    )
            except RuntimeError:  # it has no kernel for this, or no memory
                continue
        found.append({"shape": (b, l, s, n), **min(tried, key=lambda one: one["both"])})
    say(found=found, cudnn=torch.backends.cudnn.version() if on_gpu else None)


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
