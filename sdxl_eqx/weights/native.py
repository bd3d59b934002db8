"""Models as this project lays them out, in Orbax: stacked blocks, HWIO convolutions, one item a part.

`FOLDER/sdxl_eqx.json` says what it is; `FOLDER/PART/` holds the arrays by their path in the module, as the checkpoints
of a run do (`run.py`).
"""

import collections
import contextlib
import functools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from sdxl_eqx.weights.destination import NATIVE, appearing
from sdxl_eqx.weights.folder import write_json
from sdxl_eqx.weights.model import PARTS, Model
from sdxl_eqx.weights.names import Place
from sdxl_eqx.weights.read import read_json
from sdxl_eqx.weights.skeletons import skeleton_places
from sdxl_eqx.weights.tensors import Tensor, Tensors, check_finite, map_file, mapped_tensor

FORMAT = 1
"""Version of the layout, here and in the checkpoints of a run; another one is refused."""

AT_ONCE = 2**26
"""Bytes that are read or written together; a larger array goes alone."""

DISK = ("RESOURCE_EXHAUSTED", "INTERNAL", "FAILED_PRECONDITION", "DATA_LOSS")
"""How TensorStore's errors of writing begin, which come as ValueError."""


@dataclass(frozen=True)
class _Array:
    """An array that Orbax is to write and that is made when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements, which Orbax reports."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Size in bytes, which Orbax reports."""
        return self.size * self.dtype.itemsize


class _InTurn(ocp.type_handlers.NumpyHandler):
    """Makes and writes arrays in turn, few at a time; Orbax's own handler would first copy all of them."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list[Any]:
        begun: collections.deque[tuple[int, list[Any]]] = collections.deque()
        try:
            for i, (value, info) in enumerate(zip(values, infos, strict=True)):
                while begun and value.nbytes + sum(size for size, _ in begun) > AT_ONCE:
                    for one in begun.popleft()[1]:
                        one.result()
                writing = await super().serialize([value.read()], [info], [args[i]] if args else None)
                begun.append((value.nbytes, list(writing)))
        except BaseException:
            # Or they would go on to write into a folder that is being removed.
            for one in (one for _, writing in begun for one in writing):
                with contextlib.suppress(Exception):
                    one.result()
            raise
        return [one for _, writing in begun for one in writing]


def write_native(
    model: Model, folder: Path, *, save_tokenizers: Callable[[Path], None], overwrite: bool = False
) -> None:
    """Write a model in this layout; the folder appears under its name when it is whole.

    `save_tokenizers` writes `tokenizer/` and `tokenizer_2/`. With `overwrite` a folder that was there is replaced.

    Raises:
        OSError: where it cannot be written; nothing is left, and what was there stays.
        ValueError: for numbers that are not finite, and for a stack of blocks of several dtypes.
    """
    registry = ocp.type_handlers.create_type_handler_registry((_Array, _InTurn(deepcopy_host_arrays=False)))
    with appearing(folder, overwrite=overwrite) as building:
        for part, tensors in model.parts.items():
            places = skeleton_places(part, model.configs[part])
            arrays = {place.path: _stacked(place, tensors) for place in places}
            with _quiet():
                # One file an array: through OCDBT, each would be held in memory once more. Half-precision weights
                # compress by a tenth, at several times the cost of writing them.
                handler = ocp.PyTreeCheckpointHandler(
                    type_handler_registry=registry, use_ocdbt=False, use_compression=False
                )
                try:
                    with ocp.Checkpointer(handler) as checkpointer:
                        checkpointer.save((building / part).absolute(), args=ocp.args.PyTreeSave(arrays))
                except (ValueError, OSError) as error:
                    if str(error).startswith(tuple(DISK)):
                        raise OSError(f"{folder}: cannot be written ({str(error).splitlines()[0][:200]})") from None
                    raise
                except Exception as error:  # what Orbax raises for a full disk has no class of its own
                    raise OSError(f"{folder}: cannot be written ({str(error).splitlines()[0][:200]})") from None
        write_json({"format": FORMAT, "configs": model.configs, "index": model.index}, building / NATIVE)
        if "text_encoder_2" in model.parts:
            save_tokenizers(building)


def _stacked(place: Place, tensors: Tensors) -> _Array:
    """An array of a module from a file's tensors."""
    dtypes = {tensors[key].dtype for key in place.keys}
    if len(dtypes) > 1:
        raise ValueError(f"{place.path}: its blocks have {sorted(map(str, dtypes))}; give --dtype to make them one.")
    shape = place.shape if len(place.shape) != 4 else tuple(place.shape[i] for i in (2, 3, 1, 0))

    def read() -> np.ndarray:
        array = place.from_file({key: tensors[key].read() for key in place.keys})
        check_finite(array, place.path)
        return array

    return _Array((len(place.keys), *shape) if place.stacked else shape, dtypes.pop(), read)


def read_native(folder: Path) -> Model:
    """A folder that `write_native` wrote; its arrays are read when they are asked for.

    Raises:
        ValueError: where it is damaged or of another format.
    """
    meta = read_json(folder / NATIVE)
    if meta.get("format") != FORMAT:
        raise ValueError(f"{folder}: has format {meta.get('format')}, this version reads {FORMAT}; use what wrote it.")
    configs = meta.get("configs")
    if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
        raise ValueError(f"{folder / NATIVE}: must hold the JSON config of each part; convert the model again.")
    for part in (*PARTS, "controlnet"):
        if (folder / part).is_dir() and part not in configs:
            raise ValueError(f"{folder / NATIVE}: has no config of {part}, which is there; convert the model again.")
    if not isinstance(meta.get("index"), dict | None):
        raise ValueError(f"{folder / NATIVE}: its index must be a JSON object; convert the model again.")
    there = [part for part in configs if part != "scheduler" and (folder / part).is_dir()]
    parts = {part: item_tensors(folder / part, part, configs[part]) for part in there}
    has_tokenizers = (folder / "tokenizer").is_dir()
    return Model(parts, configs, tokenizers=folder if has_tokenizers else None, index=meta.get("index"))


def item_tensors(folder: Path, part: str, config: dict[str, Any]) -> Tensors:
    """The arrays of one Orbax item as tensors in diffusers' names.

    Raises:
        ValueError: where it is no whole item, or not of that config.
    """
    places = skeleton_places(part, config)
    item = Item(folder, [place.path for place in places])
    unknown = sorted(item.metadata.keys() - {place.path for place in places})
    if unknown:
        raise ValueError(f"{folder}: has {unknown[0]} ({len(unknown)} such), which its config does not describe.")
    tensors: Tensors = {}
    for place in places:
        for i, key in enumerate(place.keys):
            tensors[key] = Tensor(place.shape, item.dtype(place.path), partial(_slice, item, place, i))
    return tensors


def _slice(item: "Item", place: Place, i: int) -> np.ndarray:
    array = item.read(place.path)
    return place.one_to_file(array[i] if place.stacked else array)


class Item:
    """The arrays of one Orbax item by path: mapped where they lie plainly in a file, else read a few at a time.

    Those that follow are read along, up to AT_ONCE bytes: each call of Orbax costs milliseconds. They are kept until
    the next call, as the slices of a stack are asked for in a row.
    """

    def __init__(self, folder: Path, order: Sequence[str] = ()):
        """`order` is that in which the arrays will be asked for."""
        self.folder = folder.absolute()
        self.checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self.held: dict[str, np.ndarray] = {}
        # Not all of them: each map holds a file open.
        self._plain = functools.lru_cache(maxsize=64)(self._find_plain)
        try:
            with _quiet():
                found: dict[str, Any] = dict(self.checkpointer.metadata(self.folder).item_metadata)  # pyright: ignore
        except (ValueError, KeyError, FileNotFoundError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: is no whole Orbax item ({str(error)[:200]}).") from None
        self.metadata = {path: found[path] for path in (*order, *found) if path in found}

    def dtype(self, path: str) -> np.dtype:
        """Of the array of that path.

        Raises:
            ValueError: where there is none.
        """
        if path not in self.metadata:
            raise ValueError(f"{self.folder}: has no {path}; it is not of the model that its config describes.")
        return np.dtype(self.metadata[path].dtype)

    def read(self, path: str) -> np.ndarray:
        """The array of that path.

        Raises:
            ValueError: where it cannot be read.
        """
        plain = self._plain(path)
        if plain is not None:
            return plain.read()
        if path not in self.held:
            self.held = {}  # before the next ones are read
            wanted = self._from(path)
            args = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted},
                partial_restore=True,
            )
            try:
                with _quiet():
                    self.held = dict(self.checkpointer.restore(self.folder, args=args))
            except Exception as error:  # what Orbax raises for damaged arrays has no class of its own
                raise ValueError(f"{self.folder}: {path} cannot be read ({str(error)[:200]}).") from error
        return self.held[path]

    def _find_plain(self, path: str) -> Tensor | None:
        """The array mapped, where it is one uncompressed chunk of a Zarr folder, as `write_native` has it."""
        dtype, shape = self.dtype(path), tuple(self.metadata[path].shape)
        file = self.folder / path / ".".join("0" * len(shape))
        try:
            zarr = json.loads((file.parent / ".zarray").read_text())
            size = file.stat().st_size
        except (OSError, ValueError):
            return None
        wanted = {"compressor": None, "filters": None, "order": "C", "chunks": list(shape)}
        if size != math.prod(shape) * dtype.itemsize or not size or any(zarr.get(k) != v for k, v in wanted.items()):
            return None
        return mapped_tensor(map_file(file), 0, dtype, shape)

    def _from(self, path: str) -> dict[str, Any]:
        """What to read with the array of that path, and it."""
        self.dtype(path)
        paths = list(self.metadata)
        wanted: dict[str, Any] = {}
        size = 0
        for name in paths[paths.index(path) :]:
            found = self.metadata[name]
            size += int(np.prod(found.shape, dtype=np.int64)) * np.dtype(found.dtype).itemsize
            if wanted and size > AT_ONCE:
                break
            wanted[name] = found
        return wanted


class _quiet:  # noqa: N801  reads as what it does
    """Without what Orbax says of each array that it reads or writes, and of errors, which are raised anyway."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("absl")
        self.level = self.logger.level
        self.logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)
