"""Checkpoints of a run: state, data position and config together, written by Orbax while training goes on."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import orbax.checkpoint as ocp
from etils import epath

from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.lora import FIELDS
from sdxl_eqx.parallel import hosts
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.state import TrainState
from sdxl_eqx.weights.native import Item
from sdxl_eqx.weights.run import FORMAT, Saved, find_checkpoint, read_meta
from sdxl_eqx.weights.skeletons import skeleton

log = logging.getLogger("sdxl_eqx")

MARGIN = 64 * 2**20
"""Bytes that must stay free beside a checkpoint."""


class NotSaved(ValueError):
    """A checkpoint was not written; those that were there before are whole."""


class Checkpoints:
    """The checkpoints of one run, `FOLDER/STEP/`; only whole ones count, and older ones go when a newer is whole."""

    def __init__(self, folder: Path | epath.Path, *, keep: int, broadcast_over: str | None = None):
        """`folder`: local, or in a bucket, where Orbax marks what is whole by a last object; `broadcast_over`: the axis
        of the mesh along which one replica reads a checkpoint for the others.

        Raises:
            ValueError: where the bucket cannot be reached.
        """
        self.is_remote = "://" in str(folder)
        self.folder = folder if self.is_remote else Path(folder).absolute()
        self.broadcast_over = broadcast_over
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
        )
        with self._explained(f"{self.folder}: cannot be read or written"):
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, saved: Saved) -> None:
        """Begin to write a checkpoint; returns as soon as the arrays are copied, so the state may be donated.

        Raises:
            NotSaved: where the disk of any process has too little room, or the one before could not be written.
        """
        if step == self.latest():
            return
        self.wait()
        if not self.is_remote:
            self._check_room(step, sum(x.nbytes for x in jax.tree.leaves(state) if not _is_key(x)) + MARGIN)
        meta = {"format": FORMAT, **{key: value for key, value in vars(saved).items() if key != "format"}}
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        with self._explained(f"no checkpoint of step {step}"):
            self.manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))

    def _check_room(self, step: int, needed: int) -> None:
        try:
            free = min(hosts.gather_json(hosts.together(lambda: shutil.disk_usage(self.folder).free)))
        except (ValueError, OSError) as error:
            raise NotSaved(f"no checkpoint of step {step}: {error}") from error
        if free < needed:
            raise NotSaved(
                f"no checkpoint of step {step}: it needs {needed / 2**30:.2f} GiB, {self.folder} has "
                f"{free / 2**30:.2f} GiB left. The last good checkpoint is that of step {self.latest()}. "
                "Free space, or lower --checkpoints-to-keep."
            )

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns whatever the libraries of a bucket raise into a NotSaved."""
        try:
            yield
        except (NotSaved, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # they have no common class
            if not self.is_remote:
                raise
            raise NotSaved(f"{what} ({type(error).__name__}: {str(error)[:300]}).") from error

    def saved(self, step: int) -> Saved:
        """What stands beside the arrays.

        Raises:
            ValueError: where it cannot be read or is of another format.
        """
        return read_meta(self.manager, step, Path(self.folder))  # which names it and reads nothing

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of that step, in the shapes, dtypes and shardings of `like` (`jax.ShapeDtypeStruct`s).

        Raises:
            ValueError: where the checkpoint is of another model.
        """
        if self.saved(step).format != FORMAT:
            raise ValueError(
                f"{self.folder / str(step)}: was written by an earlier version, whose optimizer has other names; start "
                f"another --run-name from its weights: --unet-checkpoint {Path(self.folder).parent}."
            )
        wanted = _items(like)
        try:
            if self.broadcast_over is None:
                args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
                items = dict(self.manager.restore(step, args=ocp.args.Composite(**args)))
            else:
                items = {name: self._broadcast(self.folder / str(step) / name, tree) for name, tree in wanted.items()}
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(
                f"{self.folder / str(step)}: does not fit this run's model or optimizer ({str(error)[:300]}). "
                "Use the flags that made it, or another --run-name."
            ) from error
        except jax.errors.JaxRuntimeError:  # the device's memory, not the checkpoint
            raise
        except Exception as error:  # what Orbax raises for damaged arrays has no class of its own
            raise ValueError(
                f"{self.folder / str(step)}: cannot be read ({str(error)[:200]}). "
                "Delete that folder to go on from the checkpoint before it."
            ) from error
        return _from_items(items, like)

    def _broadcast(self, folder: Path | epath.Path, wanted: Any) -> Any:
        """An item of a checkpoint, read by the first replica along an axis of the mesh and sent to the others."""
        mesh = next(x.sharding.mesh for x in jax.tree.leaves(wanted))
        handler = ocp.type_handlers.SingleReplicaArrayHandler(mesh.axis_names.index(self.broadcast_over))
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
        args = jax.tree.map(
            lambda x: ocp.type_handlers.SingleReplicaArrayRestoreArgs(
                dtype=x.dtype, sharding=x.sharding, global_shape=x.shape
            ),
            wanted,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(wanted, restore_args=args))

    def wait(self) -> None:
        """Until what was begun is written, by all processes.

        Raises:
            NotSaved: where any could not.
        """
        try:
            hosts.together(self.wait_here)
        except ValueError as error:
            raise NotSaved(str(error)) from error

    def wait_here(self) -> None:
        """Until what was begun is written, by this process.

        Raises:
            NotSaved: where it could not be.
        """
        try:
            with self._explained(f"{self.folder}: a checkpoint could not be written"):
                self.manager.wait_until_finished()
        except NotSaved:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise NotSaved(f"{self.folder}: a checkpoint could not be written ({error}).") from error

    def close(self) -> None:
        """Wait, and end the writer's threads; what a bucket refuses is said."""
        try:
            with self._explained(f"{self.folder}: a checkpoint could not be written"):
                self.manager.close()
        except NotSaved as error:
            log.error("%s", error)


def load_unet(run: str | Path, *, step: int | None = None, ema: bool = True) -> UNet:
    """The UNet of a run's newest checkpoint (or that of `step`): the average if it has one and `ema`, else the weights.

    Raises:
        ValueError: where there is no such checkpoint.
    """
    found = find_checkpoint(run, step=step)
    item = Item(found.item(ema=ema))
    shapes = skeleton("unet", found.saved.unet)
    return unflatten({path: jnp.array(item.read(path)) for path in flatten(shapes)}, shapes)


def flatten(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflatten(arrays: dict[str, Any], like: Any) -> Any:
    """The inverse of `flatten`, in the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in flatten(like)])


def _items(state: TrainState) -> dict[str, Any]:
    """A state as Orbax stores it: parts by name, each a flat mapping; typed keys as their words."""
    loop = {"step": state.step, "key": _key_words(state.key)}
    average = {} if state.ema is None else _by_part(state.ema)
    averages = {"ema" if part == "unet" else f"ema_{part}": arrays for part, arrays in average.items()}
    return {"loop": loop, "optimizer": flatten(state.opt_state), **_by_part(state.trained), **averages}


def _by_part(trained: Networks) -> dict[str, dict[str, Any]]:
    """What trains by part of the model, LoRAs apart from weights."""
    found: dict[str, dict[str, Any]] = {}
    for path, array in flatten(trained).items():
        part, _, rest = path.removeprefix("encoders.").partition(".")
        item = f"{part}_lora" if path.rpartition(".")[2] in FIELDS else part
        found.setdefault(item, {})[rest] = array
    return found


def _from_parts(items: dict[str, Any], like: Networks, *, ema: bool = False) -> Networks:
    """The inverse of `_by_part`, for the items of the average where it is meant."""
    arrays = []
    for path in flatten(like):
        part, _, rest = path.removeprefix("encoders.").partition(".")
        item = f"{part}_lora" if path.rpartition(".")[2] in FIELDS else part
        name = item if not ema else "ema" if item == "unet" else f"ema_{item}"
        arrays.append(items[name][rest])
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _from_items(items: dict[str, Any], like: TrainState) -> TrainState:
    return TrainState(
        step=items["loop"]["step"],
        key=jr.wrap_key_data(items["loop"]["key"]),
        trained=_from_parts(items, like.trained),
        opt_state=unflatten(items["optimizer"], like.opt_state),
        ema=None if like.ema is None else _from_parts(items, like.ema, ema=True),
    )


def _key_words(key: Any) -> Any:
    if isinstance(key, jax.ShapeDtypeStruct):
        words = jax.eval_shape(jr.key_data, key)
        return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=key.sharding)
    return jr.key_data(key)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
