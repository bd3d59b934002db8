"""Attention on a mesh is attention on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_close, inputs, run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sdxl_eqx.config import ParallelConfig
from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.kernels.flash import Flash
from sdxl_eqx.kernels.sharded import Sharded
from sdxl_eqx.parallel.mesh import make_mesh


def mesh(**axes: int):
    """A mesh of the first devices."""
    size = int(np.prod(list(axes.values())))
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:size])


@functools.cache
def whole(*shape: int):
    """The result and the gradients on one device."""
    return run(dot_product, inputs(*shape))


MESHES = [
    {"data": 8},
    {"fsdp": 4},
    {"context": 4},
    {"tensor": 4},
    {"data": 2, "fsdp": 4},
    {"data": 4, "context": 2},
    {"data": 2, "tensor": 4},
    {"fsdp": 4, "context": 2},
    {"fsdp": 2, "tensor": 2},
    {"context": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "context": 2, "tensor": 1},
]


@pytest.mark.parametrize("s", [16, 77], ids=["self", "text 77"])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_sharded_equals_unsharded_and_the_result_lies_as_the_queries_do(axes, s):
    shape = (8, 16, s, 4, 8)
    batch = tuple(name for name in ("data", "fsdp") if name in axes)
    by = {name: name if name in axes else None for name in ("context", "tensor")}
    devices = mesh(**axes)
    layout = NamedSharding(devices, P(batch, by["context"], by["tensor"]))
    y, dq, dk, dv = run(Sharded(dot_product, devices), inputs(*shape))
    assert y.sharding.is_equivalent_to(layout, 4) and dq.sharding.is_equivalent_to(layout, 4)
    assert_close((y, dq, dk, dv), whole(*shape), 1e-5)


@pytest.mark.parametrize("s", [16, 77], ids=["self", "text 77"])
@pytest.mark.parametrize("axes", [{"context": 4}, {"data": 2, "context": 2, "tensor": 2}], ids=str)
def test_where_it_is_not_uniform_self_attention_is_shared_by_heads_and_that_to_the_text_by_queries(axes, s):
    shape = (8, 16, s, 4, 8)
    devices = mesh(**axes)
    by = P("data" if "data" in axes else None, None, ("tensor", "context") if "tensor" in axes else "context")
    if s == 77:
        by = P(by[0], "context", "tensor" if "tensor" in axes else None)
    found = run(Sharded(dot_product, devices, uniform=False), inputs(*shape))
    assert found[0].sharding.is_equivalent_to(NamedSharding(devices, by), 4)
    assert_close(found, whole(*shape), 1e-5)


def test_several_axes_may_share_a_dimension():
    devices = mesh(fsdp=2, context=2, tensor=2)
    attend = Sharded(dot_product, devices, batch=("fsdp",), heads=(), length=("context", "tensor"))
    found = run(attend, inputs(8, 16, 16, 4, 8))
    assert found[0].sharding.is_equivalent_to(NamedSharding(devices, P("fsdp", ("context", "tensor"))), 4)
    assert_close(found, whole(8, 16, 16, 4, 8), 1e-5)


@pytest.mark.parametrize("kernel", ["splash", "triton"])
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"context": 2, "tensor": 2}], ids=str)
def test_a_flash_kernel_runs_sharded_text_and_all(axes, kernel):
    shape = (8, 64, 77, 2, 64)
    found = run(Sharded(Flash(kernel, interpret=True), mesh(**axes)), inputs(*shape))
    assert_close(found, whole(*shape), 1e-5)


@pytest.mark.parametrize("l", [15, 16])
def test_queries_that_context_does_not_divide_are_padded(l):
    arrays = inputs(2, l, l, 2, 8)
    found = run(Sharded(dot_product, mesh(data=2, context=4)), arrays)
    assert_close(found, run(dot_product, arrays), 1e-5)


def test_causal_attention_is_whole_on_each_device_of_context():
    arrays = inputs(2, 16, 16, 2, 8)
    found = run(Sharded(dot_product, mesh(data=2, context=4)), arrays, causal=True)
    assert_close(found, run(dot_product, arrays, causal=True), 1e-5)


def test_the_gradient_of_gathered_keys_is_a_reduce_scatter():
    attend, arrays = Sharded(dot_product, mesh(context=4)), inputs(1, 16, 16, 2, 8)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v)), argnums=(1, 2)))(*arrays[:3]))
    assert jaxpr.count("all_gather[") == 2 and jaxpr.count("reduce_scatter[") == 2 and "psum[" not in jaxpr


def test_it_takes_the_mesh_of_the_package():
    layout = make_mesh(ParallelConfig(ici_data_parallelism=2, ici_fsdp_parallelism=4), jax.devices())
    y, *_ = run(Sharded(dot_product, layout), inputs(8, 16, 16, 2, 8))
    assert y.sharding.is_equivalent_to(NamedSharding(layout, P(("data", "fsdp"))), 4)


@pytest.mark.parametrize(
    ("axes", "options", "b", "n", "says"),
    [
        ({"data": 2, "fsdp": 4}, {}, 4, 2, r"a batch of 4 does not divide over 8 devices \(data x fsdp\)"),
        (
            {"data": 2, "tensor": 4},
            {},
            2,
            10,
            r"10 heads do not divide over 4 devices \(tensor\); set --ici-tensor-parallelism and --dcn-tensor-par",
        ),
        (
            {"context": 2, "tensor": 2},
            {"uniform": False},
            2,
            2,
            r"2 heads do not divide over 4 devices \(tensor x context\).*leave out --no-attention-sharding-uniform\.",
        ),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused(axes, options, b, n, says):
    with pytest.raises(ValueError, match=says):
        Sharded(dot_product, mesh(**axes), **options)(*inputs(b, 16, 16, n, 8)[:3])
