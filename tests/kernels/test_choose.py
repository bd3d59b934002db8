"""The choice says what it chose, and one asked for by name serves or is refused."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from attention_cases import assert_close, inputs, run

from sdxl_eqx.config import FlashBlockSizes
from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.choose import Folded, FromLength, choose
from sdxl_eqx.kernels.cudnn import cudnn
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.sharded import Sharded
from sdxl_eqx.nn.compute import Compute

SHARE = partial(Sharded, mesh=jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2))
SPLASH = Flash("splash")


@pytest.mark.parametrize(
    ("backend", "options", "attend", "says"),
    [
        ("cpu", {}, dot_product, "dot_product by XLA, for a cpu has no kernel"),
        ("gpu", {}, cudnn, "cudnn, published as some 5 times as fast as unfused"),
        ("gpu", {"dtype": "float32"}, dot_product, r"dot_product by XLA \(attention cudnn: takes bfloat16 and float16"),
        ("gpu", {"head_width": 512}, dot_product, "of a multiple of 8 up to 256 wide, not 512"),
        ("gpu", {"share": SHARE}, SHARE(cudnn), "cudnn"),
        (
            "tpu",
            {},
            FromLength(SPLASH, dot_product, 2048),
            "flash .JAX's splash kernel.*; dot_product below 2048 queries",
        ),
        (
            "tpu",
            {"share": SHARE},
            FromLength(SHARE(SPLASH), SHARE(dot_product), 2048),
            "dot_product below 2048 queries",
        ),
        ("tpu", {"dtype": "float16"}, dot_product, "dot_product by XLA .attention flash: on a TPU takes bfloat16"),
        (
            "tpu",
            {"min_seq_length": 4096},
            FromLength(SPLASH, dot_product, 4096),
            "; dot_product below 4096 queries or keys",
        ),
        ("rocm", {}, dot_product, "for a rocm has no kernel"),
    ],
)
def test_auto_takes_the_best_of_the_backend_and_says_why(backend, options, attend, says):
    found, sentence = choose("auto", backend, **options)
    assert found == attend
    assert sentence.startswith("attention auto: ") and sentence.endswith(".")
    assert re.search(says, sentence)


@pytest.mark.parametrize(
    ("name", "backend", "options", "attend", "says"),
    [
        ("dot_product", "tpu", {}, dot_product, "attention dot_product: by XLA."),
        ("dot_product", "tpu", {"share": SHARE}, SHARE(dot_product), "attention dot_product: by XLA."),
        ("dot_product", "tpu", {"min_seq_length": 9}, dot_product, "attention dot_product: by XLA."),
        ("flash", "tpu", {}, SPLASH, "attention flash: JAX's splash kernel."),
        ("flash", "gpu", {"dtype": "float32"}, Flash("triton"), "attention flash: JAX's Triton kernel."),
        (
            "flash",
            "cpu",
            {"dtype": "float32"},
            Flash("splash", interpret=True),
            "attention flash: JAX's splash kernel in the interpreter, for tests: very slow.",
        ),
        (
            "flash",
            "tpu",
            {"mask_padding": False, "min_seq_length": 4096, "block_sizes": FlashBlockSizes(block_q=512)},
            FromLength(Flash("splash", FlashBlockSizes(block_q=512), mask_padding=False), dot_product, 4096),
            "attention flash: JAX's splash kernel; dot_product below 4096 queries or keys; zeros that pad the keys are "
            "attended to.",
        ),
        ("cudnn", "gpu", {"share": SHARE}, SHARE(cudnn), "attention cudnn: through JAX."),
        ("cudnn", "gpu", {"share": SHARE, "split_heads": False}, SHARE(Folded(cudnn)), "attention cudnn: through JAX."),
        (
            "flash",
            "tpu",
            {"min_seq_length": 4096, "split_heads": False},
            FromLength(Folded(SPLASH), Folded(dot_product), 4096),
            "attention flash: JAX's splash kernel; dot_product below 4096 queries or keys.",
        ),
    ],
)
def test_one_asked_for_by_name_serves(name, backend, options, attend, says):
    assert choose(name, backend, **options) == (attend, says)


@pytest.mark.parametrize(
    ("name", "backend", "options", "says"),
    [
        ("splash", "tpu", {}, "attention splash: unknown; one of auto, dot_product, flash, cudnn, cudnn_flash_te"),
        ("cudnn", "cpu", {}, "attention cudnn: needs an NVIDIA GPU, and this is a cpu"),
        ("cudnn_flash_te", "tpu", {}, "attention cudnn_flash_te: needs an NVIDIA GPU, and this is a tpu"),
        ("cudnn", "gpu", {"dtype": "float32"}, "takes bfloat16 and float16, not float32"),
        ("cudnn", "gpu", {"head_width": 20}, "a multiple of 8 up to 256 wide, not 20"),
        ("cudnn_flash_te", "gpu", {}, r"needs Transformer Engine .*pip install --no-build-isolation -e '.\[te\]'"),
        ("flash", "tpu", {"dtype": "float16"}, "on a TPU takes bfloat16 and float32, not float16"),
        ("flash", "tpu", {"head_width": 1024}, "on a TPU heads are at most 512 wide"),
        ("flash", "gpu", {"head_width": 512}, "on a GPU heads are at most 128 wide"),
        ("flash", "rocm", {}, "has kernels for tpu and gpu, none for rocm"),
        ("flash", "tpu", {"block_sizes": FlashBlockSizes(block_q=100)}, "block_q=100: on a TPU a multiple of 128"),
    ],
)
def test_one_that_cannot_serve_is_refused(name, backend, options, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ValueError, match=says):
        choose(name, backend, **options)


def test_a_choice_is_static_so_the_same_choice_compiles_once():
    traced = []

    @jax.jit(static_argnums=1)
    def f(x, compute):
        traced.append(1)
        return compute.attend(x, x, x)

    for _ in range(2):
        attend, _ = choose("flash", "cpu", dtype="float32", share=SHARE, min_seq_length=64)
        f(jnp.ones((8, 16, 2, 8)), Compute(attend))
    assert len(traced) == 1


def test_the_length_from_which_flash_serves_counts_queries_and_keys():
    def fake(query, key, value, *, causal=False):
        return jnp.zeros_like(query)

    def below(query, key, value, *, causal=False):
        return jnp.ones_like(query)

    x, y = jnp.ones((1, 8, 1, 8)), jnp.ones((1, 4, 1, 8))
    attend = FromLength(fake, below, 8)
    assert [float(attend(q, k, k).max()) for q, k in ((x, x), (x, y), (y, x))] == [0, 1, 1]


@pytest.mark.parametrize("causal", [False, True])
def test_heads_folded_into_the_batch_are_the_same_heads(causal):
    shapes = []

    def seen(query, key, value, *, causal=False):
        shapes.append((query.shape, key.shape, value.shape))
        return dot_product(query, key, value, causal=causal)

    arrays = inputs(2, 6, 6 if causal else 5, 3, 8)
    assert_close(run(Folded(seen), arrays, causal=causal), run(dot_product, arrays, causal=causal), 1e-6)
    assert shapes[0] == ((6, 6, 1, 8), (6, arrays[1].shape[1], 1, 8), (6, arrays[1].shape[1], 1, 8))


def test_blocks_that_no_kernel_takes_are_an_error_for_auto_too():
    with pytest.raises(ValueError, match="block_q=100"):
        choose("auto", "tpu", block_sizes=FlashBlockSizes(block_q=100))


def test_auto_says_that_flags_of_flash_have_no_effect_on_what_it_took_and_obeys_them_where_it_took_flash():
    _, sentence = choose("auto", "gpu", mask_padding=False)
    assert "the flags of flash have no effect on it" in sentence
    assert "no effect" not in choose("auto", "gpu")[1]
    attend, _ = choose("auto", "tpu", min_seq_length=1024)
    assert isinstance(attend, FromLength) and attend.length == 1024
