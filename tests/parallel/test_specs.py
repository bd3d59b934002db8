import itertools
import math
from collections import Counter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fake_devices import layout
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdxl_eqx.config import OptimConfig, ParallelConfig
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.conv import Conv2d
from sdxl_eqx.nn.linear import Linear
from sdxl_eqx.parallel import specs
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import SMALL, Layout
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.optimizer import make_optimizer
from sdxl_eqx.training.state import new_state
from sdxl_eqx.weights.names import is_stacked

STACK = "mid_block.attentions.0.transformer_blocks."
PATHS = (
    "conv_in.weight",
    STACK + "attn1.to_q.weight",
    STACK + "ff.net.2.weight",
    "encoder.layers.mlp.fc1.bias",
    "x.key",
)
SHAPES = [
    shape
    for ndim in range(5)
    for shape in itertools.product((3, 8, 30, 77, 1280), repeat=ndim)
    if math.prod(shape) < 1e9
]
LAYOUTS = [
    layout(data=data, fsdp=fsdp, context=context, tensor=tensor)
    for data, fsdp, context, tensor in itertools.product((1, 2), (1, 2, 3, 8), (1, 2), (1, 2, 5))
]
CONV_IN = layout((*ParallelConfig.logical_axis_rules, ("conv_in", ("tensor", "fsdp"))), fsdp=4, tensor=2)


def leaves(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}


SDXL = leaves(eqx.filter_eval_shape(UNet, UNetConfig.sdxl_base(), key=jr.key(0)))
BIG_G = leaves(eqx.filter_eval_shape(CLIPText, CLIPTextConfig.sdxl_base_2(), key=jr.key(0)))


def shares(spec: P, ndim: int) -> list[tuple[str, ...]]:
    """The axes of each dimension."""
    every = [*spec, *(None,) * (ndim - len(spec))]
    return [(axes,) if isinstance(axes, str) else axes or () for axes in every]


@given(path=st.sampled_from(PATHS), shape=st.sampled_from(SHAPES), one=st.sampled_from([*LAYOUTS, CONV_IN]))
def test_a_spec_names_each_axis_at_most_once_where_it_divides_and_never_the_depth(path, shape, one):
    found = shares(one.spec(path, shape), len(shape))
    assert len(found) == len(shape)
    used = [axis for axes in found for axis in axes]
    assert len(used) == len(set(used))
    assert all(one.mesh.shape[axis] > 1 for axis in used)
    assert all(n % one.size(axes) == 0 for n, axes in zip(shape, found, strict=True))
    depth = 1 if is_stacked(path) else 0
    assert not any(found[:depth])
    if math.prod(shape[depth:]) < SMALL:
        assert not used


@given(shape=st.sampled_from([s for s in SHAPES if len(s) == 4]), one=st.sampled_from(LAYOUTS))
def test_an_axis_that_does_not_divide_its_dimension_goes_to_the_longest_one_that_it_divides(shape, one):
    found = shares(one.spec("conv_in.weight", shape), 4)
    fsdp = one.mesh.shape["fsdp"]
    divided = [n for n in shape if n % fsdp == 0]
    if fsdp == 1 or not divided or math.prod(shape) < SMALL:
        assert not any(found)
    else:
        (at,) = [i for i, axes in enumerate(found) if axes]
        assert found[at] == ("fsdp",)
        assert at == 3 if shape[3] % fsdp == 0 else shape[at] == max(divided)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        *((f"{STACK}attn1.to_{x}.weight", (10, 1280, 1280), P(None, "tensor", "fsdp")) for x in "qkv"),
        *((f"{STACK}attn2.to_{x}.weight", (10, 1280, 2048), P(None, "tensor", "fsdp")) for x in "qkv"),
        *((f"{STACK}attn{n}.to_out.0.weight", (10, 1280, 1280), P(None, "fsdp", "tensor")) for n in (1, 2)),
        (f"{STACK}ff.net.0.proj.weight", (10, 10240, 1280), P(None, "tensor", "fsdp")),
        (f"{STACK}ff.net.2.weight", (10, 1280, 5120), P(None, "fsdp", "tensor")),
        *((f"encoder.layers.self_attn.{x}_proj.weight", (32, 1280, 1280), P(None, "tensor", "fsdp")) for x in "qkv"),
        ("encoder.layers.self_attn.out_proj.weight", (32, 1280, 1280), P(None, "fsdp", "tensor")),
        ("encoder.layers.mlp.fc1.weight", (32, 5120, 1280), P(None, "tensor", "fsdp")),
        ("encoder.layers.mlp.fc2.weight", (32, 1280, 5120), P(None, "fsdp", "tensor")),
        ("text_model.embeddings.token_embedding.weight", (49408, 1280), P(None, "fsdp")),
        ("mid_block.attentions.0.proj_in.weight", (1280, 1280), P(None, "fsdp")),
        ("time_embedding.linear_1.weight", (1280, 320), P(None, "fsdp")),
        ("down_blocks.0.resnets.0.conv1.weight", (3, 3, 320, 640), P(None, None, None, "fsdp")),
        ("encoder.mid_block.attentions.0.to_q.weight", (512, 512), P(None, "fsdp")),  # the VAE has one head
        (f"{STACK}ff.net.0.proj.bias", (10, 10240), P()),
        ("conv_in.weight", (3, 3, 4, 320), P()),
        ("encoder.conv_out.weight", (3, 3, 512, 8), P(None, None, None, "fsdp")),
        ("encoder.conv_out.weight", (3, 3, 512, 6), P(None, None, "fsdp")),
    ],
)  # fmt: skip
def test_heads_and_feed_forward_lie_on_tensor_and_all_else_on_fsdp(path, shape, expected):
    assert layout(data=2, fsdp=4, context=2, tensor=2).spec(path, shape) == expected


@pytest.mark.parametrize(
    "one", [layout(fsdp=8), layout(fsdp=4, tensor=2), layout(fsdp=64, tensor=5), layout(fsdp=3), CONV_IN], ids=str
)
def test_a_slice_of_a_stack_lies_as_the_stack_does_but_for_its_depth(one):
    stacked = {path: x for path, x in {**SDXL, **BIG_G}.items() if is_stacked(path)}
    assert len(stacked) > 200
    for path, x in stacked.items():
        within = path.rpartition("transformer_blocks." if "transformer_blocks" in path else "layers.")[2]
        of_stack = one.spec(path, x.shape)
        assert one.spec(within, x.shape[1:]) == P(*of_stack[1:]), path
        assert of_stack == P() or of_stack[0] is None


@pytest.mark.parametrize(("model", "config"), [(UNet, UNetConfig.tiny()), (CLIPText, CLIPTextConfig.tiny())])
def test_what_is_gathered_layer_by_layer_is_the_whole_model_as_it_is_stored(model, config, monkeypatch):
    monkeypatch.setattr(specs, "SMALL", 256)
    one = layout(fsdp=4, tensor=2)
    gathered = Counter()

    def gather(layer):
        arrays = eqx.filter(layer, eqx.is_array)
        gathered.update((x.shape, one.spec(path, x.shape)) for path, x in leaves(arrays).items())
        return layer

    def run(model):
        compute = Compute(gather=gather)
        if isinstance(model, CLIPText):
            return model(jnp.zeros((1, 77), jnp.int32), compute=compute)
        added = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes = [(1, 8, 8, 4), (1,), (1, 77, config.cross_attention_dim), (1, added), (1, 6)]
        return model(*map(jnp.zeros, shapes), compute=compute)

    parameters = eqx.filter_eval_shape(model, config, key=jr.key(0))
    jax.eval_shape(run, parameters)
    stored = Counter()
    for path, x in leaves(parameters).items():
        depth = 1 if is_stacked(path) else 0
        stored[x.shape[depth:], P(*one.spec(path, x.shape)[depth:])] += 1
    assert gathered >= stored and gathered.keys() == stored.keys()  # the last layer of CLIP runs outside its stack
    assert sum(spec != P() for _, spec in stored) > 5


@pytest.mark.parametrize("fsdp", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("others", [{}, {"tensor": 2}, {"context": 2, "data": 2}], ids=str)
def test_by_far_most_of_sdxl_is_shared_by_fsdp(fsdp, others):
    one = layout(fsdp=fsdp, **others)
    whole = {path: x.size for path, x in SDXL.items() if "fsdp" not in str(one.spec(path, x.shape))}
    assert sum(whole.values()) < 0.005 * sum(x.size for x in SDXL.values())
    assert max(whole.values()) * 4 <= 2**20


def test_on_256_devices_what_stays_whole_is_what_they_divide_no_dimension_of():
    one = layout(fsdp=256)
    whole = {path: x for path, x in SDXL.items() if one.spec(path, x.shape) == P()}
    large = {path: x for path, x in whole.items() if x.size * 4 > 2**20}
    assert sum(x.size for x in whole.values()) < 0.04 * sum(x.size for x in SDXL.values())
    assert not [path for path, x in large.items() if any(n % 256 == 0 for n in x.shape[1 if is_stacked(path) else 0 :])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_moments_and_average_lie_as_their_parameter(sizes, dtype):
    optimizer = make_optimizer(OptimConfig(moments_dtype=dtype), lambda _: 1e-3)

    def make():
        return new_state(Networks(UNet(UNetConfig.tiny(), key=jr.key(0)), None), optimizer, ema=True, key=jr.key(1))

    where = layout(**sizes).shardings(jax.eval_shape(make))
    parameters = [s.spec for s in jax.tree.leaves(where.trained)]
    assert any(s != P() for s in parameters) == (sizes != {})
    assert [s.spec for s in jax.tree.leaves(where.ema)] == parameters
    (adam,) = [s for s in jax.tree.leaves(where.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")]
    for moment in (adam.mu, adam.nu):
        assert [s.spec for s in jax.tree.leaves(moment)] == parameters
    assert where.step.spec == where.key.spec == P()


def ruled(**names: tuple[str, ...]) -> Any:
    """The default rules but for these names."""
    return tuple({**dict(ParallelConfig.logical_axis_rules), **names}.items())


def without(axis: str) -> Any:
    """What takes an axis out of the shares of an array."""
    return lambda shares: [tuple(one for one in axes if one != axis) for axes in shares]


@pytest.mark.parametrize(
    ("names", "ndim", "part", "change"),
    [
        ({"embed": ()}, 2, "", without("fsdp")),
        ({"mlp": ()}, 2, ".ff.", without("tensor")),
        ({"heads": ()}, 2, ".attn", without("tensor")),
        ({"conv_out": ()}, 4, "", without("fsdp")),
        ({"conv_in": ("fsdp",), "conv_out": ()}, 4, "", lambda shares: [*shares[:2], shares[3], shares[2]]),
    ],
    ids=["embed", "mlp", "heads", "conv_out", "conv_in for conv_out"],
)
def test_a_rule_that_is_overridden_changes_the_dimensions_of_its_name_alone(names, ndim, part, change):
    default, other = (layout(rules, fsdp=4, tensor=2) for rules in (ruled(), ruled(**names)))
    changed = 0
    for path, x in SDXL.items():
        before, after = (shares(one.spec(path, x.shape), x.ndim) for one in (default, other))
        wanted = change(before) if x.ndim - is_stacked(path) == ndim and part in path else before
        assert after == wanted, path
        changed += after != before
    assert changed > 20


def test_several_axes_may_share_a_dimension():
    one = layout(ruled(heads=("tensor", "fsdp"), embed=()), fsdp=4, tensor=2)
    assert one.spec(STACK + "attn1.to_q.weight", (10, 640, 640)) == P(None, ("tensor", "fsdp"))
    assert one.spec(STACK + "attn1.to_out.0.weight", (10, 640, 640)) == P(None, None, ("tensor", "fsdp"))


def test_a_layout_tells_the_axes_of_a_name_with_and_without_those_of_one_device():
    one = layout(data=2, tensor=3)
    assert one.named("activation_batch") == ("data", "fsdp") and one.named("unknown") == ()
    assert one.axes("activation_batch") == one.batch == ("data",)
    assert one.size(("data", "fsdp", "tensor")) == 6
    assert one.whole.spec == P()


def here(**sizes: int) -> Layout:
    """A layout on the devices here."""
    inside: Any = {f"ici_{axis}_parallelism": n for axis, n in {"data": 1, **sizes}.items()}
    return Layout(make_mesh(ParallelConfig(**inside), jax.devices()[: math.prod(sizes.values())]))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}], ids=str)
def test_a_gathered_layer_is_whole_but_for_tensor_and_its_gradient_goes_back_to_its_shards(sizes):
    one = here(**sizes)
    layer = {"ff": {"net": [{"proj": Linear(64, 512, key=jr.key(0))}]}, "conv": Conv2d(32, 64, key=jr.key(1))}
    stored = one.shardings(layer)
    weight, conv = (lambda tree: tree["ff"]["net"][0]["proj"].weight), (lambda tree: tree["conv"].weight)
    assert "fsdp" in str(weight(stored).spec) and "fsdp" in str(conv(stored).spec)
    gathered = jax.jit(one.gather, in_shardings=(stored,))(layer)
    used = NamedSharding(one.mesh, P("tensor"))
    assert weight(gathered).sharding.is_equivalent_to(used, 2) and conv(gathered).sharding.is_fully_replicated
    for x, y in zip(jax.tree.leaves(layer), jax.tree.leaves(gathered), strict=True):
        np.testing.assert_array_equal(x, y)

    def loss(layer: Any) -> Any:
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(one.gather(layer)))

    gradient = jax.jit(jax.grad(loss), in_shardings=(stored,))(layer)
    for x, y, where in zip(*map(jax.tree.leaves, (layer, gradient, stored)), strict=True):
        assert y.sharding.is_equivalent_to(where, y.ndim)
        np.testing.assert_array_equal(2 * x, y)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 8, 6, 3), P(("data", "fsdp"), "context")),
        ((8, 16, 5), P(("data", "fsdp"), "context")),
        ((8, 7, 6, 3), P(("data", "fsdp"))),
        ((8, 16), P(("data", "fsdp"))),
        ((8,), P(("data", "fsdp"))),
    ],
    ids=str,
)
def test_activations_are_shared_by_samples_and_rows_where_those_divide(shape, spec):
    one = here(data=2, fsdp=2, context=2)
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    spread = jax.device_put(x, NamedSharding(one.mesh, P(("data", "fsdp", "context"))))
    for function in (one.place, one.enter):
        y = jax.jit(function)(spread)
        assert y.sharding.is_equivalent_to(NamedSharding(one.mesh, spec), y.ndim)
        np.testing.assert_array_equal(x, y)


def test_rows_are_shared_by_tensor_too_so_that_no_axis_shares_nothing():
    one = here(fsdp=2, context=2, tensor=2)
    y = jax.jit(one.place)(jnp.ones((4, 8, 2, 3)))
    assert y.sharding.is_equivalent_to(NamedSharding(one.mesh, P("fsdp", ("context", "tensor"))), 4)


@pytest.mark.parametrize(
    ("sizes", "names", "says"),
    [
        (
            {"data": 2, "fsdp": 2},
            {"activation_batch": ("data",)},
            r"activation_batch \['data'\] must have the axis fsdp",
        ),
        ({"data": 2}, {"activation_batch": ()}, "must have the axis data too, which the mesh has devices on"),
        ({"fsdp": 2, "tensor": 2}, {"conv_out": ("fsdp", "tensor")}, "the axis tensor too, which conv_out has devices"),
        ({"context": 2}, {"conv_in": ("context",)}, "the axis context too, which conv_in has devices on"),
        ({}, {"activation_length": ("context", "tensor")}, r"must not share an axis; \['tensor'\] is in two of them"),
    ],
    ids=["batch without fsdp", "no batch", "conv_out over tensor", "conv_in over context", "tensor twice"],
)
def test_rules_under_which_results_would_be_wrong_are_refused(sizes, names, says):
    with pytest.raises(ValueError, match=says):
        layout(ruled(**names), **sizes).check()


@pytest.mark.parametrize(
    "names", [{}, {"embed": ()}, {"conv_in": ("fsdp",), "conv_out": ()}, {"heads": ("fsdp",)}], ids=str
)
def test_other_rules_are_not(names):
    layout(ruled(**names), data=2, fsdp=2, context=2, tensor=2).check()
