"""One suite for every implementation: forward and gradients against float32 attention by XLA."""

import jax
import jax.numpy as jnp
import pytest
from attention_cases import assert_close, inputs, run

from sdxl_eqx.config import FlashBlockSizes
from sdxl_eqx.kernels import splash, triton
from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.flash import Flash

SMALL_TPU = FlashBlockSizes(block_q=128, block_kv=128)
SMALL_GPU = FlashBlockSizes(block_q=64, block_kv=32, block_q_dkv=16, block_kv_dkv=32, block_q_dq=32, block_kv_dq=16)
HERE = {
    "dot_product": dot_product,
    "splash": Flash("splash", interpret=True),
    "splash, small blocks": Flash("splash", FlashBlockSizes(block_q=128, block_kv=128), interpret=True),
    "splash, fused backward": Flash(
        "splash",
        FlashBlockSizes(block_q=128, block_kv=256, block_kv_compute=128, use_fused_bwd_kernel=True),
        interpret=True,
    ),
    "triton": Flash("triton", interpret=True),
    "triton, small blocks": Flash(
        "triton",
        FlashBlockSizes(block_q=64, block_kv=32, block_q_dkv=16, block_kv_dkv=32, block_q_dq=32, block_kv_dq=16),
        interpret=True,
    ),
}
"""What runs on a CPU; cuDNN and Transformer Engine do not, and test_cudnn.py checks what can be checked of them."""

SHAPES = {
    "self 64": (2, 64, 64, 2, 64),
    "self 100": (1, 100, 100, 3, 64),
    "self 300": (1, 300, 300, 2, 64),
    "text 77": (2, 100, 77, 2, 64),
    "text 77 of many": (1, 300, 77, 2, 64),
    "few queries": (1, 20, 200, 2, 64),
    "narrow heads": (2, 40, 77, 2, 24),
}
"""b, l, s, n, d."""


@pytest.fixture(scope="module")
def reference():
    """The result and gradients by XLA in float32, computed once a case."""
    known = {}

    def of(shape: str, causal: bool = False, dtype=jnp.float32):
        case = (shape, causal, dtype)
        if case not in known:
            arrays = (x.astype(jnp.float32) for x in inputs(*SHAPES[shape], dtype))
            known[case] = run(dot_product, tuple(arrays), causal=causal)
        return known[case]

    return of


CASES = [
    *((name, shape) for name in ("splash", "triton") for shape in SHAPES),
    *((name, shape) for name in HERE if "," in name for shape in ("self 300", "text 77 of many")),
]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_result_and_gradients_are_those_of_xla_in_float32(name, shape, reference):
    found = run(HERE[name], inputs(*SHAPES[shape]))
    assert_close(found, reference(shape), 1e-5)


@pytest.mark.parametrize(("name", "shape"), [*((name, "text 77") for name in HERE), ("splash", "self 100")])
def test_in_bfloat16_they_differ_by_its_rounding(name, shape, reference):
    # One part in 256 where weights, their gradients and results are rounded to 8 bits: a few such roundings in a row.
    found = run(HERE[name], inputs(*SHAPES[shape], jnp.bfloat16))
    assert all(x.dtype == jnp.bfloat16 for x in found)
    assert_close(found, reference(shape, dtype=jnp.bfloat16), 2e-2)


@pytest.mark.parametrize(
    ("name", "shape"), [("splash", "self 100"), ("splash, small blocks", "self 300"), ("triton", "self 300")]
)
def test_a_causal_mask_is_that_of_xla(name, shape, reference):
    found = run(HERE[name], inputs(*SHAPES[shape]), causal=True)
    assert_close(found, reference(shape, causal=True), 1e-5)


@pytest.mark.parametrize("kernel", [splash, triton], ids=["splash", "triton"])
def test_nothing_of_the_padding_leaks(kernel, reference, monkeypatch):
    def poison(x, length):
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)), constant_values=1e4)

    monkeypatch.setattr(kernel, "pad_length", poison)
    attend = Flash("splash" if kernel is splash else "triton", interpret=True)
    assert_close(run(attend, inputs(*SHAPES["text 77"])), reference("text 77"), 1e-5)


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_without_the_mask_the_zeros_that_pad_the_keys_are_attended_to(kernel):
    query, key, value, gradient = inputs(*SHAPES["text 77"])
    found = run(Flash(kernel, mask_padding=False, interpret=True), (query, key, value, gradient))
    padded = (jnp.concatenate([x, jnp.zeros((2, 128 - 77, 2, 64))], axis=1) for x in (key, value))
    y, dq, dk, dv = run(dot_product, (query, *padded, gradient))
    assert_close(found, (y, dq, dk[:, :77], dv[:, :77]), 1e-5)


def test_keys_that_fill_their_blocks_need_no_segments():
    query, key, value, _ = inputs(1, 100, 128, 2, 64)
    text = str(jax.make_jaxpr(Flash("splash", interpret=True))(query, key, value))
    assert "segmented" not in text
    assert "segmented" in str(jax.make_jaxpr(Flash("splash", interpret=True))(query, key[:, :77], value[:, :77]))


@pytest.mark.parametrize(
    ("kernel", "sizes", "says"),
    [
        ("splash", {"block_q": 100}, "block_q=100: on a TPU a multiple of 128"),
        ("splash", {"block_kv": 512, "block_kv_compute": 384}, "block_kv=512: must be a multiple of block_kv_compute"),
        ("splash", {"block_kv_dkv": 512, "block_kv_dkv_compute": 1024}, "block_kv_dkv=512: must be a multiple"),
        ("splash", {"use_fused_bwd_kernel": True, "block_q_dq": 128}, "leave out block_q_dq and block_kv_dq"),
        ("triton", {"block_kv": 96}, "block_kv=96: on a GPU a power of two from 16"),
        ("triton", {"block_q": 8}, "block_q=8: on a GPU a power of two from 16"),
        ("triton", {"block_kv_compute": 64}, "block_kv_compute: is of a TPU's kernel, .* leave it out"),
        ("triton", {"use_fused_bwd_kernel": False}, "=False: a GPU has the fused one alone; leave it out"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_before_anything_is_traced(kernel, sizes, says):
    with pytest.raises(ValueError, match=says):
        Flash(kernel, FlashBlockSizes(**sizes))


def test_wide_heads_are_refused_by_the_triton_kernel():
    with pytest.raises(ValueError, match="at most 128 wide, not 256"):
        Flash("triton", interpret=True)(*inputs(1, 16, 16, 1, 256)[:3])


def test_blocks_of_the_tpu_cover_the_lengths_of_sdxl_with_little_padding():
    for length, block, padded in ((4096, 1024, 4096), (1024, 1024, 1024), (3952, 1024, 4096), (988, 1024, 1024)):
        sizes = splash.splash_blocks(FlashBlockSizes(), length, 77, 1024)
        assert (sizes.block_q, -(-length // sizes.block_q) * sizes.block_q) == (block, padded)
        assert sizes.block_kv == 128 and sizes.use_fused_bwd_kernel
    assert splash.splash_blocks(FlashBlockSizes(), 2304, 2304, 1024).block_q == 768
    assert not splash.splash_blocks(FlashBlockSizes(), 4096, 4096, 1024).use_fused_bwd_kernel


def test_a_block_asked_for_is_no_larger_than_the_padded_sequence():
    asked = FlashBlockSizes(block_q=1024, block_kv=1024, block_kv_compute=512)
    sizes = splash.splash_blocks(asked, 640, 77, 1024)
    assert (sizes.block_q, sizes.block_kv, sizes.block_kv_compute) == (640, 128, 128)
    assert splash.splash_blocks(asked, 640, 640, 1024).block_kv == 1024
