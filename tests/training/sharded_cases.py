"""The step on meshes of devices, under every choice of how to compute it, beside the step on one device."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
import pytest
from tiny_step import QUICK, UNET, random_model

from sdxl_eqx.config import AttentionConfig, ModelConfig, ParallelConfig, TrainConfig
from sdxl_eqx.data.batch import LatentBatch
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.remat import Remat
from sdxl_eqx.parallel import specs
from sdxl_eqx.parallel.mesh import batch_sharding, make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.computing import unet_compute
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.state import new_state
from sdxl_eqx.training.step import StepConfig, train_step

Kernel = Literal["dot_product", "flash", "triton", "folded"]
"""What computes attention here: flash is the splash kernel, folded is dot_product without --split-head-dim."""

TWO_LEVELS = dataclasses.replace(
    UNET, block_out_channels=(8, 16), attention_levels=(True, False), transformer_layers=(2, 2), heads=(2, 4)
)
BATCH = 8
SIDE = 8
AXES = ("data", "fsdp", "context", "tensor")


@dataclass(frozen=True)
class Case:
    """A mesh (the sizes of its axes but for those of 1), and how the UNet is computed on it."""

    sizes: dict[str, int]
    attention: Kernel
    remat: Remat
    unroll: int
    uniform: bool = True

    @property
    def devices(self) -> int:
        """How many share the work."""
        return math.prod(self.sizes.values())

    @property
    def factors(self) -> dict[str, Any]:
        """What is varied; pairs of these are what must not disturb each other."""
        return {
            "devices": self.devices,
            **{axis: axis in self.sizes for axis in AXES},
            "attention": self.attention,
            "remat": self.remat,
            "unroll": self.unroll,
            "uniform": self.uniform,
        }

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.sizes.items()) or "one device"
        by_heads = "" if self.uniform else ", not uniform"
        return f"{mesh}, {self.attention}, remat {self.remat}, unroll {self.unroll}{by_heads}"


FEWER_LOOPS = {**QUICK, "xla_cpu_use_fusion_emitters": False}
"""Compiler options: a fifth less time to compile."""

REFERENCE = Case({}, "dot_product", "none", 1)

CASES = [
    Case({}, "dot_product", "attention", 1),
    Case({}, "dot_product", "full", 2),
    Case({}, "flash", "offload", 1),
    Case({}, "folded", "none", 1),
    Case({}, "triton", "dots", 1),
    Case({"context": 2}, "flash", "full", 1, uniform=False),
    Case({"context": 2}, "triton", "offload", 2, uniform=False),
    Case({"data": 2}, "folded", "dots", 1),
    Case({"fsdp": 2}, "flash", "attention", 1),
    Case({"tensor": 2}, "dot_product", "none", 2),
    Case({"data": 2, "context": 2}, "folded", "attention", 2, uniform=False),
    Case({"data": 2, "fsdp": 2}, "triton", "full", 1),
    Case({"data": 2, "tensor": 2}, "dot_product", "offload", 1),
    Case({"data": 2, "tensor": 2}, "flash", "none", 1),
    Case({"fsdp": 2, "context": 2}, "dot_product", "dots", 1, uniform=False),
    Case({"context": 4, "tensor": 2}, "triton", "attention", 1),
    Case({"context": 8}, "triton", "none", 1),
    Case({"data": 4, "tensor": 2}, "folded", "full", 1),
    Case({"fsdp": 2, "context": 4}, "dot_product", "full", 1),
    Case({"fsdp": 4, "context": 2}, "dot_product", "none", 1, uniform=False),
    Case({"fsdp": 4, "tensor": 2}, "flash", "dots", 2),
    Case({"fsdp": 8}, "folded", "offload", 1),
]
"""Every pair of two values of different factors that can occur together does so in one of these."""

MESHES = [
    {},
    *({axis: 2} for axis in AXES),
    *({axis: 4} for axis in AXES[:3]),
    *({axis: 8} for axis in AXES[:3]),
    *({one: 2, other: 2} for one, other in itertools.combinations(AXES, 2)),
    {"data": 2, "fsdp": 4},
    {"data": 4, "context": 2},
    {"fsdp": 4, "context": 2},
    {"fsdp": 2, "context": 4},
    *({axis: 4, "tensor": 2} for axis in AXES[:3]),
]
"""Tensor is 2 at the most, as the lower level has 2 heads."""


def product() -> Iterable[Case]:
    """All cases that there are. Not uniform, context shares those 2 heads too, and is 2 without tensor."""
    for sizes, attention, remat, unroll in itertools.product(
        MESHES,
        ("dot_product", "flash", "triton", "folded"),
        ("none", "dots", "attention", "full", "offload"),
        (1, 2),
    ):
        yield Case(sizes, attention, remat, unroll)
        if sizes.get("context") == 2 and "tensor" not in sizes:
            yield Case(sizes, attention, remat, unroll, uniform=False)


def pairs(cases: Iterable[Case]) -> set[Any]:
    """The pairs of values that occur, and the sets of axes that share the work."""
    found = set()
    for case in cases:
        found |= {("axes", *case.sizes), *itertools.combinations(case.factors.items(), 2)}
    return found


def by_triton(attend: Any) -> Any:
    """The same attention by the other flash kernel, which a CPU is not given by itself."""
    if isinstance(attend, Flash):
        return dataclasses.replace(attend, kernel="triton")
    return dataclasses.replace(attend, attend=by_triton(attend.attend))


@functools.cache
def inputs() -> tuple[UNet, LatentBatch]:
    """A random UNet and a batch."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((BATCH, *shape)).astype(np.float32)

    sizes = np.array(BATCH // 2 * [[30, 20, 3, 0, 16, 16], [16, 40, 0, 11, 16, 16]], np.float32)
    context, pooled = draw(77, TWO_LEVELS.cross_attention_dim), draw(16)
    batch = LatentBatch(draw(SIDE, SIDE, 4), draw(SIDE, SIDE, 4), context, pooled, sizes)
    return random_model(lambda: UNet(TWO_LEVELS, key=jr.key(0)), 0), batch


def measure(case: Case) -> tuple[float, list[np.ndarray]]:
    """The loss of the first step and its gradients."""
    flash = case.attention in ("flash", "triton")
    sizes: Any = {f"ici_{axis}_parallelism": case.sizes.get(axis, 1) for axis in AXES}
    config = TrainConfig(
        model=ModelConfig(activations_dtype="float32"),
        attention=AttentionConfig(
            attention="flash" if flash else "dot_product",
            split_head_dim=case.attention != "folded",
            attention_sharding_uniform=case.uniform,
            remat_policy=case.remat,
            scan_unroll=case.unroll,
        ),
        parallel=ParallelConfig(**sizes),
    )
    layout = Layout(make_mesh(config.parallel, jax.devices()[: case.devices]))
    compute = unet_compute(config, TWO_LEVELS, layout, BATCH, side=SIDE)
    if case.attention == "triton":
        compute = dataclasses.replace(compute, attend=by_triton(compute.attend))
    unet, batch = inputs()
    keep = optax.trace(0.0)  # its state is the last gradient
    networks = Networks(unet, None)
    state, frozen = new_state(networks, keep, ema=False, key=jr.key(7)), eqx.filter(networks, False)
    where = layout.shardings(jax.eval_shape(lambda: state))
    on_mesh = layout if case.devices > 1 else None
    step = jax.jit(
        functools.partial(
            train_step, config=StepConfig(0.13, np.float32, compute, compute, 0.0, 1, on_mesh), optimizer=keep
        ),
        in_shardings=(where, layout.whole, batch_sharding(layout.mesh, AXES, BATCH), layout.whole),
        out_shardings=(where, layout.whole),
        compiler_options=FEWER_LOOPS,
    )
    after, metrics = step(jax.device_put(state, where), frozen, batch, Schedule(ScheduleConfig()))
    return float(metrics["learning/loss"]), [np.asarray(x) for x in jax.tree.leaves(after.opt_state)]


@functools.cache
def reference() -> tuple[float, list[np.ndarray]]:
    """What every case must find."""
    return measure(REFERENCE)


def assert_is_that_of_one_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a case has the loss and all gradients of the reference; a line that says how near they are."""
    monkeypatch.setattr(specs, "SMALL", 64)
    wanted_loss, wanted = reference()
    begun = time.monotonic()
    loss, gradients = measure(case)
    off = [np.abs(x - y).max() for x, y in zip(gradients, wanted, strict=True)]
    largest = [np.abs(y).max() for y in wanted]
    found = max(x / max(1, y) for x, y in zip(off, largest, strict=True))
    # Small gradients too: 1e-5 of the largest entry is within a few roundings of theirs.
    relative = max(x / y for x, y in zip(off, largest, strict=True))
    seconds = time.monotonic() - begun
    print(
        f"{case}: loss off {loss - wanted_loss:+.1e}, gradients {found:.1e} ({relative:.1e} of each), {seconds:.0f} s"
    )
    assert abs(loss - wanted_loss) <= 1e-5
    assert found <= 1e-5 and relative <= 3e-5
