import dataclasses
import gc
import json
import logging
import shutil
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from orbax.checkpoint._src.multihost import multislice
from tiny_step import FROZEN, OPTIM, QUICK, UNET, assert_equal, begin, optimizer, random_model, words

from sdxl_eqx.config import ParallelConfig
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.parallel import specs
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.checkpoint import Checkpoints, NotSaved, Saved, load_unet
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.state import new_state

# When a restore fails, Orbax leaves reads that it never began, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SAVED = Saved(UNET.to_json(), True, {"run_name": "x", "learning_rate": 1e-3}, {"next_batch": 12, "batch_size": 4})


def layout(n: int) -> Layout:
    """A layout on the first n devices, with fsdp where there are several."""
    return Layout(make_mesh(ParallelConfig(ici_fsdp_parallelism=min(n, 4)), jax.devices()[:n]))


def laid_out(state, n: int):
    """The state over n devices."""
    return jax.device_put(state, layout(n).shardings(state))


def shapes(state, n: int = 1):
    """What a state is to be restored as, on n devices."""
    abstract = jax.eval_shape(lambda: state)
    where = layout(n).shardings(abstract)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, where)


@pytest.fixture
def state(unet):
    """A state in which every part is another one."""
    state = begin(unet)
    other = random_model(lambda: UNet(UNET, key=jr.key(0)), 5)
    return eqx.tree_at(lambda s: (s.ema, s.step), state, (Networks(other, None), jnp.int32(6)))


@pytest.fixture
def checkpoints(tmp_path):
    """The checkpoints of a run."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    yield checkpoints
    checkpoints.close()
    gc.collect()


def test_a_state_comes_back_bit_for_bit_with_its_key_and_what_stands_beside(state, checkpoints):
    checkpoints.save(6, state, SAVED)
    checkpoints.wait()
    restored = checkpoints.restore(6, shapes(state))
    assert_equal(restored, state)
    assert jnp.issubdtype(restored.key.dtype, jax.dtypes.prng_key)
    assert jr.key_impl(restored.key) == jr.key_impl(state.key)
    assert checkpoints.saved(6) == SAVED
    assert checkpoints.latest() == 6


def test_a_state_without_an_average_comes_back(unet, checkpoints):
    state = begin(unet, dataclasses.replace(OPTIM, ema_decay=0.0))
    checkpoints.save(1, state, dataclasses.replace(SAVED, ema=False))
    checkpoints.wait()
    restored = checkpoints.restore(1, shapes(state))
    assert restored.ema is None and restored.best is restored.trained
    assert_equal(restored, state)


@pytest.mark.parametrize("n", [1, 2])
def test_what_8_devices_saved_fewer_restore(n, state, checkpoints, monkeypatch):
    monkeypatch.setattr(specs, "SMALL", 64)
    spread = laid_out(state, 8)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread.trained))
    checkpoints.save(6, spread, SAVED)
    checkpoints.wait()
    like = shapes(state, n)
    restored = checkpoints.restore(6, like)
    assert_equal(restored, state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert len(x.devices()) == n
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_one_replica_reads_for_all(state, checkpoints, monkeypatch):
    monkeypatch.setattr(specs, "SMALL", 64)
    checkpoints.save(6, laid_out(state, 8), SAVED)
    checkpoints.wait()
    checkpoints.broadcast_over = "data"
    sent, send = [], multislice.broadcast_one_replica_to_all

    def counted(*args: Any, **options: Any) -> Any:
        sent.append(args)
        return send(*args, **options)

    monkeypatch.setattr(multislice, "broadcast_one_replica_to_all", counted)
    like = shapes(state, 8)
    restored = checkpoints.restore(6, like)
    assert_equal(restored, state)
    assert sent
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_only_the_newest_are_kept(state, checkpoints, tmp_path):
    for step in (2, 4, 6, 8):
        checkpoints.save(step, state, SAVED)
    checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["6", "8"]


def test_a_step_that_is_saved_already_is_not_saved_again(state, checkpoints):
    checkpoints.save(6, state, SAVED)
    checkpoints.save(6, eqx.tree_at(lambda s: s.key, state, jr.key(99)), SAVED)
    checkpoints.wait()
    assert_equal(checkpoints.restore(6, shapes(state)).key, state.key)


def test_what_is_saved_is_the_state_of_its_step_although_later_steps_write_into_its_memory(state, checkpoints):
    def is_key(x):
        return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

    def fresh(state):
        return jax.tree.map(lambda x: jr.clone(x) if is_key(x) else jnp.copy(x), state)

    @partial(jax.jit, donate_argnums=0, compiler_options=QUICK)
    def later(state):
        return jax.tree.map(lambda x: x if is_key(x) else x + 1, state)

    state = fresh(state)
    copies = {}
    reused = 0
    for n in range(1, 9):
        given = state.trained.unet.conv_in.weight
        state = later(state)
        reused += given.is_deleted()
        if n in (2, 5):
            copies[n] = fresh(state)  # on the device: what NumPy looks at is no longer given away
            checkpoints.save(n, state, SAVED)
    assert reused >= 4
    checkpoints.wait()
    for n, copy in copies.items():
        assert_equal(checkpoints.restore(n, shapes(copy)), copy)


def test_the_step_after_a_restore_is_the_step_that_would_have_been(unet, latents, schedule, step, checkpoints):
    state = begin(unet)
    state, _ = step(state, FROZEN, latents, schedule)
    checkpoints.save(1, state, SAVED)
    checkpoints.wait()
    restored = checkpoints.restore(1, shapes(state))
    assert_equal(step(restored, FROZEN, latents, schedule), step(state, FROZEN, latents, schedule))


def test_a_full_disk_leaves_the_checkpoints_there_as_they_are(state, checkpoints, monkeypatch, tmp_path):
    checkpoints.save(2, state, SAVED)
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)
    needed = sum(array.nbytes for array in words(state))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        with pytest.raises(NotSaved, match=r"no checkpoint of step 4.*last good checkpoint is that of step 2\."):
            checkpoints.save(4, state, SAVED)
        assert checkpoints.latest() == 2
        assert_equal(checkpoints.restore(2, shapes(state)), state)
    checkpoints.save(6, state, SAVED)
    checkpoints.wait()
    assert checkpoints.latest() == 6


def test_a_checkpoint_of_another_model_is_refused(state, checkpoints):
    checkpoints.save(6, state, SAVED)
    checkpoints.wait()
    wide = dataclasses.replace(UNET, block_out_channels=(16,))
    other = new_state(
        Networks(random_model(lambda: UNet(wide, key=jr.key(0)), 0), None), optimizer(), ema=True, key=jr.key(0)
    )
    with pytest.raises(ValueError, match=r"does not fit this run's model or optimizer.*another --run-name"):
        checkpoints.restore(6, shapes(other))


def test_a_checkpoint_of_another_format_is_refused(state, checkpoints, tmp_path):
    checkpoints.save(6, state, SAVED)
    checkpoints.wait()
    file = tmp_path / "run" / "checkpoints" / "6" / "meta" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 3}))
    with pytest.raises(ValueError, match=r"has checkpoint format 3, this version reads 2"):
        checkpoints.saved(6)


def test_a_run_of_an_earlier_version_is_not_gone_on_with_but_its_weights_are_read(state, checkpoints, tmp_path):
    checkpoints.save(6, state, SAVED)
    checkpoints.wait()
    file = tmp_path / "run" / "checkpoints" / "6" / "meta" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    with pytest.raises(ValueError, match=r"written by an earlier version.*--unet-checkpoint .*/run"):
        checkpoints.restore(6, shapes(state))
    assert_equal(load_unet(tmp_path / "run"), state.ema.unet)


@pytest.fixture(scope="module")
def run(unet, tmp_path_factory):
    """A run with two checkpoints, whose average is another one than its weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    state = eqx.tree_at(
        lambda s: s.ema, begin(unet), Networks(random_model(lambda: UNet(UNET, key=jr.key(0)), 5), None)
    )
    checkpoints.save(1, eqx.tree_at(lambda s: s.ema, state, state.trained), SAVED)
    checkpoints.save(2, state, SAVED)
    checkpoints.close()
    return folder, state


def test_load_unet_takes_the_newest_average_by_default(run):
    folder, state = run
    assert_equal(load_unet(folder), state.ema.unet)
    assert_equal(load_unet(str(folder), ema=False), state.trained.unet)
    assert_equal(load_unet(folder, step=1), state.trained.unet)


def test_load_unet_gives_a_model_that_runs(run):
    folder, _ = run
    unet = load_unet(folder)
    assert unet.config == UNET
    inputs = (jnp.ones((1, 4, 4, 4)), jnp.ones(1), jnp.ones((1, 77, 32)), jnp.ones((1, 16)), jnp.ones((1, 6)))
    assert bool(jnp.isfinite(jax.jit(lambda *x: unet(*x), compiler_options=QUICK)(*inputs)).all())


def test_load_unet_names_what_is_there(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match=r"has no checkpoint of step 7; it has \[1, 2\]"):
        load_unet(folder, step=7)
    with pytest.raises(ValueError, match="give the folder of a run"):
        load_unet(tmp_path)


def test_load_unet_says_nothing_of_what_it_was_not_asked_for(run, caplog):
    with caplog.at_level(logging.WARNING):
        load_unet(run[0])
    assert not [record for record in caplog.records if "could not be restored" in record.getMessage()]
