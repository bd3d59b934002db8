import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_eqx.data.batch import Batch, LatentBatch, LatentTextBatch, to_batch


def test_every_leaf_of_a_batch_is_an_array_of_numpy_or_jax():
    batch = Batch(
        pixels=np.zeros((2, 8, 8, 3), np.uint8),
        input_ids=np.zeros((2, 77), np.int32),
        input_ids_2=np.zeros((2, 77), np.int32),
        time_ids=np.zeros((2, 6), np.float32),
    )
    moved = jax.tree.map(jnp.asarray, batch)
    assert isinstance(moved, Batch)
    assert [leaf.dtype for leaf in jax.tree.leaves(moved)] == [jnp.uint8, jnp.int32, jnp.int32, jnp.float32]


def test_a_latent_batch_shares_nothing_with_a_batch_but_time_ids_and_what_both_may_have():
    names, latent_names = ({f.name for f in dataclasses.fields(kind)} for kind in (Batch, LatentBatch))
    assert names & latent_names == {"time_ids", "control", "weight"}


def test_the_fields_say_which_batch_it_is():
    moments, ids = np.zeros((2, 4, 4, 4), np.float32), np.zeros((2, 77), np.int32)
    fields = {
        "pixels": np.zeros((2, 8, 8, 3), np.uint8),
        "mean": moments,
        "logvar": moments,
        "input_ids": ids,
        "input_ids_2": ids,
        "context": np.zeros((2, 77, 8), np.float16),
        "pooled": np.zeros((2, 4), np.float32),
        "time_ids": np.zeros((2, 6), np.float32),
    }
    optional = {"control": np.zeros((2, 8, 8, 3), np.uint8), "weight": np.ones(2, np.float32)}
    for kind in (Batch, LatentBatch, LatentTextBatch):
        needed = {field.name: fields[field.name] for field in dataclasses.fields(kind) if field.name in fields}
        plain = to_batch(needed)
        assert type(plain) is kind and plain.control is None and plain.weight is None
        assert len(jax.tree.leaves(plain)) == len(needed)
        for names in (["control"], ["weight"], ["control", "weight"]):
            batch = to_batch(needed | {name: optional[name] for name in names})
            assert type(batch) is kind and len(jax.tree.leaves(batch)) == len(needed) + len(names)
    with pytest.raises(ValueError, match=r"fields of a batch, not \['mean', 'pixels'\]"):
        to_batch({name: fields[name] for name in ("pixels", "mean")})
