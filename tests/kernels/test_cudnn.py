"""cuDNN and Transformer Engine, as far as a CPU can check them: what JAX lowers, and how the other one is called."""

import contextlib
import inspect
import sys
import types
from enum import Enum

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SDXL, assert_close, both, inputs, run, shapes

from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.cudnn import cudnn, cudnn_flash_te
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.sharded import Sharded

FUSED_ATTN = (  # of Transformer Engine 2.20.2, transformer_engine/jax/attention.py; after | those with defaults
    "qkv bias sequence_descriptor seed attn_bias_type attn_mask_type qkv_layout softmax_type scaling_factor "
    "dropout_probability is_training | max_segments_per_seq window_size context_parallel_strategy "
    "context_parallel_causal_load_balanced context_parallel_axis context_checkpoint_name softmax_offset stripe_size "
    "score_mod score_mod_bprop score_mod_tensors score_mod_bprop_tensors return_max_logit"
)


def lower_for_cuda(attend, arrays) -> str:
    return jax.jit(both(attend)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("shape", SDXL, ids=str)
def test_cudnn_lowers_to_its_flash_kernels_forward_and_backward(shape, monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    text = lower_for_cuda(cudnn, shapes(*shape))
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("l", "s"), [(16, 16), (15, 15), (16, 77), (15, 16)])
def test_odd_lengths_are_padded_for_cudnn_and_the_padding_is_no_key(l, s, causal, monkeypatch):
    by_xla = jax.nn.dot_product_attention

    def stand_in(query, key, value, *, implementation, **options):
        assert implementation == "cudnn" and query.shape[1] % 2 == key.shape[1] % 2 == 0
        return by_xla(query, key, value, implementation="xla", **options)

    given = inputs(2, l, s, 2, 64, jnp.bfloat16)
    expected = dot_product(*given[:3], causal=causal)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    np.testing.assert_array_equal(cudnn(*given[:3], causal=causal), expected)


@pytest.mark.parametrize("shape", SDXL, ids=str)
def test_the_triton_kernel_lowers_for_a_gpu_forward_and_backward(shape):
    text = lower_for_cuda(Flash("triton"), shapes(*shape))
    assert "mha_forward" in text and "mha_backward" in text


def test_where_jax_has_no_cudnn_it_says_how_to_get_it():
    with pytest.raises(ValueError, match=r"attention cudnn: .*pip install -e '.\[cuda13\]'"):
        jax.eval_shape(cudnn, *shapes(2, 16, 16, 2, 64)[:3])


@pytest.mark.parametrize("attend", [cudnn, cudnn_flash_te])
def test_float32_is_refused(attend):
    with pytest.raises(ValueError, match="takes bfloat16 and float16, not float32; use --activations-dtype bfloat16"):
        jax.eval_shape(attend, *shapes(2, 16, 16, 2, 64, jnp.float32)[:3])


class StandIn:
    """Transformer Engine as published: the same signature and names, and the same demand for a mesh resource."""

    def __init__(self):
        self.guarded = False
        self.calls = []
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        needed, optional = (names.split() for names in FUSED_ATTN.split("|"))
        self.signature = inspect.Signature(
            [inspect.Parameter(name, kind) for name in needed]
            + [inspect.Parameter(name, kind, default=None) for name in optional]
        )

    @contextlib.contextmanager
    def global_shard_guard(self, resource):
        self.guarded = True
        yield
        self.guarded = False

    def fused_attn(self, *args, **kwargs):
        given = self.signature.bind(*args, **kwargs).arguments
        self.calls.append(given)
        lengths = given["sequence_descriptor"]
        assert [x.dtype for x in lengths] == [jnp.int32] * 2

        @jax.custom_vjp
        def kernel(query, key, value):
            return dot_product(query, key, value, causal=given["attn_mask_type"].name == "CAUSAL_MASK")

        def forward(*qkv):
            assert self.guarded
            return jax.vjp(lambda *x: dot_product(*x), *qkv)

        def backward(pullback, gradient):
            assert self.guarded, "Global mesh resource is not set."
            return pullback(gradient)

        kernel.defvjp(forward, backward)
        return kernel(*given["qkv"])


def module(name, **names):
    """A module of those names."""
    one = types.ModuleType(name)
    vars(one).update(names)
    return one


@pytest.fixture
def te(monkeypatch):
    """The stand-in, where the real one would be imported from."""
    one = StandIn()
    attention = module(
        "attention",
        fused_attn=one.fused_attn,
        AttnBiasType=Enum("AttnBiasType", "NO_BIAS PRE_SCALE_BIAS POST_SCALE_BIAS"),
        AttnMaskType=Enum("AttnMaskType", "NO_MASK PADDING_MASK CAUSAL_MASK PADDING_CAUSAL_MASK"),
        AttnSoftmaxType=Enum("AttnSoftmaxType", "VANILLA_SOFTMAX OFF_BY_ONE_SOFTMAX LEARNABLE_SOFTMAX"),
        QKVLayout=Enum("QKVLayout", "BS3HD BSHD_BS2HD BSHD_BSHD_BSHD T3HD THD_T2HD THD_THD_THD"),
        SequenceDescriptor=types.SimpleNamespace(from_seqlens=lambda seqlens: seqlens),
    )
    sharding = module("sharding", global_shard_guard=one.global_shard_guard, MeshResource=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.jax", module("", attention=attention, sharding=sharding))
    return one


@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "data 4"])
def test_transformer_engine_is_called_by_its_signature_and_guarded_in_both_passes(te, sharded):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    attend = Sharded(cudnn_flash_te, mesh) if sharded else cudnn_flash_te
    given = inputs(4, 16, 77, 2, 64, jnp.bfloat16)
    assert_close(run(attend, given), run(dot_product, given), 1e-2)
    call = te.calls[0]
    assert (call["attn_mask_type"].name, call["attn_bias_type"].name) == ("NO_MASK", "NO_BIAS")
    assert (call["qkv_layout"].name, call["softmax_type"].name) == ("BSHD_BSHD_BSHD", "VANILLA_SOFTMAX")
    assert (call["scaling_factor"], call["dropout_probability"], call["is_training"]) == (0.125, 0.0, True)
    assert call["bias"] is None and call["seed"] is None


def test_a_causal_mask_is_passed_to_transformer_engine(te):
    cudnn_flash_te(*inputs(1, 16, 16, 2, 64, jnp.bfloat16)[:3], causal=True)
    assert te.calls[0]["attn_mask_type"].name == "CAUSAL_MASK"


def test_a_transformer_engine_before_2_11_is_too_old(te):
    vars(sys.modules["transformer_engine.jax"].attention).pop("AttnSoftmaxType")
    with pytest.raises(ValueError, match=r"too old: pip install --no-build-isolation -e '.\[te\]'"):
        cudnn_flash_te(*inputs(1, 16, 16, 2, 64, jnp.bfloat16)[:3])
