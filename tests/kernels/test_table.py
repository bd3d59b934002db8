"""Every attention at every shape of SDXL on every backend: what computes it, or why it is refused (`pytest -rP`)."""

import functools
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_cases import SDXL, both, inputs, run, shapes
from compilers import HAS_CUDA, HAS_LIBTPU, compile_for
from jax.sharding import SingleDeviceSharding

from sdxl_eqx.arrays import DtypeName
from sdxl_eqx.kernels.choose import FromLength, choose
from sdxl_eqx.kernels.flash import Flash

SHAPES: list[tuple[tuple[int, ...], DtypeName]] = [
    *((shape, "bfloat16") for shape in SDXL),
    ((1, 16384, 16384, 1, 512), "float32"),
]
"""b, l, s, n, d and dtype: self-attention and that to the text of both levels of the UNet, and the VAE's."""

CPU, TPU = (f"needs an NVIDIA GPU, and this is a {backend}; use auto." for backend in ("cpu", "tpu"))
FLOAT32 = "takes bfloat16 and float16, not float32; use --activations-dtype bfloat16, or --attention dot_product."
NO_TE = "attention cudnn_flash_te: needs Transformer Engine"
WIDE = "attention flash: on a GPU heads are at most 128 wide, not 512; use dot_product."

EXPECTED = {
    "cpu": {
        "dot_product": 5 * ["dot_product"],
        "flash": 5 * ["splash"],
        "cudnn": 5 * [f"attention cudnn: {CPU}"],
        "cudnn_flash_te": 5 * [f"attention cudnn_flash_te: {CPU}"],
        "auto": 5 * ["dot_product"],
    },
    "tpu": {
        "dot_product": 5 * ["dot_product"],
        "flash": 5 * ["splash"],
        "cudnn": 5 * [f"attention cudnn: {TPU}"],
        "cudnn_flash_te": 5 * [f"attention cudnn_flash_te: {TPU}"],
        "auto": ["splash", "dot_product", "dot_product", "dot_product", "splash"],
    },
    "gpu": {
        "dot_product": 5 * ["dot_product"],
        "flash": [*4 * ["triton"], WIDE],
        "cudnn": [*4 * ["cudnn"], f"attention cudnn: {FLOAT32}"],
        "cudnn_flash_te": [*4 * [NO_TE], f"attention cudnn_flash_te: {FLOAT32}"],
        "auto": [*4 * ["cudnn"], "dot_product"],
    },
}
"""What computes each shape, or the refusal, without Transformer Engine."""


def kernel(attend: Any, l: int, s: int) -> Any:
    """What computes these lengths."""
    if isinstance(attend, FromLength):
        return attend.attend if min(l, s) >= attend.length else attend.below
    return attend


@functools.cache
def tried(attend: Any, shape: tuple[int, ...], dtype: DtypeName, device: Any) -> str:
    """What becomes of both passes: run on a CPU, at a 64th of long lengths; else compiled where there is a compiler."""
    if device is None:
        return "not tried"
    if device.platform != "cpu":
        arrays = shapes(*shape, dtype=jnp.dtype(dtype), sharding=SingleDeviceSharding(device))
        compile_for("tpu" if device.platform == "tpu" else "cuda", both(attend), arrays)
        return "compiles"
    _, l, s, _, d = shape
    found = run(attend, inputs(1, l // 64, s if s == 77 else s // 64, 1, d, jnp.dtype(dtype)))
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    return "runs"


@pytest.fixture
def device(request: pytest.FixtureRequest, backend: str) -> Any:
    """A device of the backend, if it is here or there is a compiler for it."""
    if backend == "cpu":
        return jax.devices()[0]
    if backend == "tpu":
        return request.getfixturevalue("tpus")("v5e:2x2")[0] if HAS_LIBTPU else None
    return request.getfixturevalue("h100s")(1)[0] if HAS_CUDA else None


@pytest.mark.parametrize("backend", list(EXPECTED))
def test_each_shape_is_computed_as_expected_or_refused(backend, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    print("\nattention on", backend, "(of each length a part)" if backend == "cpu" else "")
    found: dict[str, list[str]] = {name: [] for name in EXPECTED[backend]}
    for name, (sizes, dtype) in itertools.product(found, SHAPES):
        try:
            chosen, _ = choose(name, backend, dtype=dtype, head_width=sizes[-1])
        except ValueError as error:
            found[name].append(str(error).split(" (")[0])
            outcome = f"refused: {error}"
        else:
            attend = kernel(chosen, sizes[1], sizes[2])
            found[name].append(attend.kernel if isinstance(attend, Flash) else attend.__name__)
            outcome = f"{tried(attend, sizes, dtype, device)}: {found[name][-1]}"
        print(f"{name:14} {', '.join(map(str, sizes)):25} {dtype:8} {outcome}")
    assert found == EXPECTED[backend]
