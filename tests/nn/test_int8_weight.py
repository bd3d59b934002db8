"""Weights that are stored in 8 bits: what they are and compute, and what is kept of them for the backward pass."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.linear import Int8Weight, Linear
from sdxl_eqx.nn.lora import LoraLinear, LoraShape, add_lora
from sdxl_eqx.nn.quantize import stored_in_int8
from sdxl_eqx.nn.transformer import Transformer

X = jr.normal(jr.key(1), (2, 4, 6, 16))
CONTEXT = jr.normal(jr.key(2), (2, 5, 24))


@pytest.fixture(scope="module")
def stage() -> Transformer:
    return Transformer(16, 24, 2, 2, groups=4, key=jr.key(0))


@pytest.mark.parametrize("shape", [(6, 10), (3, 6, 10)], ids=["one", "stack"])
def test_each_number_is_off_by_half_a_step_of_its_output_at_most(shape):
    sizes = np.logspace(-3, 2, 6, dtype=np.float32)[:, None]
    weight = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32) * sizes)
    stored = Int8Weight.of(weight)
    step = np.abs(weight).max(axis=-1, keepdims=True) / 127
    assert stored.shape == shape and stored.scale.shape == (*shape[:-1], 1)
    assert (np.abs(stored.astype(jnp.float32) - weight) <= step * 0.5001).all()
    assert (np.abs(np.asarray(stored.values)).max(axis=-1) == 127).all()


def test_an_output_of_zeros_stays_one():
    assert (Int8Weight.of(jnp.zeros((2, 3))).astype(jnp.float32) == 0).all()


def test_dense_layers_of_transformer_stages_alone_are_stored_so(stage):
    model = (stage, Linear(4, 4, key=jr.key(0)))
    stored = stored_in_int8(model)
    kinds = [leaf.dtype for leaf in jax.tree.leaves(stored[0]) if leaf.ndim == 3]
    assert kinds and set(map(str, kinds)) == {"int8", "float32"}  # values and scales
    assert stored[1].weight is model[1].weight
    before, after = (sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for part in (stage, stored[0]))
    assert after < 0.45 * before


def dequantized(stage: Transformer) -> Transformer:
    """The stage with the same numbers in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32), stored_in_int8(stage), is_leaf=lambda x: isinstance(x, Int8Weight)
    )


def plain(stage: Transformer) -> Transformer:
    """`dequantized`, multiplied as ever."""
    leaves = jax.tree.leaves(dequantized(stage))
    return jax.tree.unflatten(jax.tree.structure(stage), leaves)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_changes_and_inputs_have_the_gradients_of_the_same_numbers_in_float32(stage, dora, remat):
    def adapted(stage):
        return add_lora(
            stage, lambda path: path.endswith(("to_q", "proj")), LoraShape(2, 1.0, dora=dora), key=jr.key(3)
        )

    ours, theirs = adapted(stored_in_int8(stage)), adapted(plain(stage))

    def trains(path, leaf):
        return "lora_" in jax.tree_util.keystr(path)

    def loss(changes, rest, x):
        whole = jax.tree.map(lambda a, b: b if a is None else a, changes, rest, is_leaf=lambda x: x is None)
        return jnp.sum(whole(x, CONTEXT, Compute(remat=remat)) ** 2)

    def gradients(model):
        paths = jax.tree_util.tree_map_with_path(trains, model)
        changes = jax.tree.map(lambda x, t: x + 0.1 if t else None, model, paths)
        rest = jax.tree.map(lambda x, t: None if t else x, model, paths)
        of_both = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
        value, (of_changes, of_x) = of_both(changes, rest, X)
        return [value, of_x, *jax.tree.leaves(of_changes)]

    pairs = list(zip(gradients(ours), gradients(theirs), strict=True))
    assert len(pairs) > 3
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.abs(b).max()))


def test_the_backward_pass_keeps_no_number_of_them(stage):
    """Without remat, what is kept of a layer is the 8-bit weight itself, never a copy in the dtype of the product."""

    def kept(model: Transformer) -> set[tuple[str, tuple[int, ...]]]:
        pullback = jax.eval_shape(lambda m: jax.vjp(lambda x: m(x, CONTEXT, Compute(remat="none")), X)[1], model)
        return {(str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(pullback)}

    up = (2, 128, 16)  # of both blocks' feed-forward
    assert ("float32", up) in kept(stage)
    stored = kept(stored_in_int8(stage))
    assert ("int8", up) in stored and ("float32", up) not in stored


def test_a_cast_leaves_scales_as_they_are(stage):
    halved = cast(stored_in_int8(stage), jnp.bfloat16)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(halved)}
    assert dtypes == {"int8", "float32", "bfloat16"}
    y = halved(X.astype(jnp.bfloat16), CONTEXT.astype(jnp.bfloat16), Compute())
    assert y.dtype == jnp.bfloat16


def test_dora_begins_with_the_sizes_of_what_is_stored():
    layer = Linear(8, 4, key=jr.key(0))
    assert isinstance(layer.weight, jax.Array)
    stored = Int8Weight.of(layer.weight)
    object.__setattr__(layer, "weight", stored)
    change = LoraLinear(layer, LoraShape(2, 1.0, dora=True), key=jr.key(1))
    assert change.lora_magnitude is not None
    np.testing.assert_allclose(change.lora_magnitude, jnp.linalg.norm(stored.astype(jnp.float32), axis=1), rtol=1e-6)
