"""Encoding a data set once, on all devices and by all processes, into the cache."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.data.bad import BadItems, BadSample
from sdxl_eqx.data.buckets import Buckets
from sdxl_eqx.data.cache import PICTURES, TEXT, Cached, Contents, open_stores
from sdxl_eqx.data.pictures import Size
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.store import StoreWriter
from sdxl_eqx.data.survey import Survey
from sdxl_eqx.data.tokenizer import tokenize
from sdxl_eqx.loading import ModelParts, text_fingerprint, vae_fingerprint
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel import hosts
from sdxl_eqx.parallel.mesh import batch_sharding, own_rows
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.step import encode_pixels

log = logging.getLogger("sdxl_eqx")

AT_ONCE = 2 * 1024**2
"""Pixels that a device encodes at once: the VAE's widest float32 arrays take 0.5 GB for a picture of 1024 x 1024, and
without a kernel its attention's scores 1 GB."""

CAPTIONS_AT_ONCE = 16
"""Captions that a device encodes at once."""


@dataclass(frozen=True)
class Encoding:
    """The frozen encoders on the devices of a run."""

    config: TrainConfig
    layout: Layout
    compute: Compute
    parts: ModelParts
    encoders: Encoders

    def cached(
        self, source: Source, folder: Path, survey: Survey, buckets: Buckets, bad: BadItems, *, on_host: Encoders
    ) -> Cached:
        """The encoded data set: what is there already, and the rest encoded now. `on_host` are the encoders again.

        Raises:
            ValueError: where too many samples cannot be used, or the cache is damaged or not seen by all processes.
            OSError: where it cannot be written.
        """
        config = self.config
        vae, text = vae_fingerprint(on_host.vae, self.parts.vae), None
        if config.is_text_cached:
            encoders = (on_host.text_encoder, on_host.text_encoder_2)
            text = f"{text_fingerprint(encoders, self.parts)} {config.model.activations_dtype}"
        contents = Contents.of(
            survey, buckets.shapes, buckets.of, config.data, seed=config.run.seed, vae=vae, text=text
        )  # fmt: skip
        began = time.perf_counter()
        pictures, texts = hosts.together(partial(open_stores, folder))
        todo = contents.missing_pictures(pictures), contents.missing_text(texts)
        # All processes encode what any of them lacks.
        todo = tuple(_union(indices) for indices in todo)
        if any(len(indices) for indices in todo):
            log.info(
                "encoding %d pictures and %d captions once, into %s%s", *map(len, todo), folder,
                "" if text is not None else " (latents alone: captions change from visit to visit)",
            )  # fmt: skip
            self._encode_pictures(source, contents, folder, todo[0], bad)
            self._encode_text(source, contents, folder, todo[1])
        cached = hosts.together(partial(Cached, folder, contents))
        unusable = {failure.name for failure in survey.bad} | bad.reasons.keys()
        for i in np.flatnonzero(~cached.usable & (buckets.of >= 0)):
            if source.name(int(i)) not in unusable:
                raise ValueError(
                    f"{folder}: another process encoded {source.name(int(i))}, and this one does not see it; "
                    "share --dataset-save-location between all hosts."
                )
        if any(len(indices) for indices in todo):
            log.info("encoded in %.1f s: %d samples are ready", time.perf_counter() - began, int(cached.usable.sum()))
        return cached

    def empty(self) -> dict[str, np.ndarray]:
        """(context, pooled) of the empty prompt, without a batch axis."""
        size = self.layout.mesh.size
        chunks, spread = self.config.data.caption_chunks, self._spread(size)
        rows = len(own_rows(spread, size))
        ids = (tokenize(t, [""] * rows, chunks)[0] for t in self.parts.tokenizers)
        put = (jax.make_array_from_process_local_data(spread, x) for x in ids)
        context, pooled = self._compiled(_captions, size)(self.encoders, *put)
        return {"context": _own(context)[0], "pooled": _own(pooled)[0]}

    def _encode_pictures(
        self, source: Source, contents: Contents, folder: Path, todo: Int[np.ndarray, " m"], bad: BadItems
    ) -> None:
        mesh = self.layout.mesh
        found: list[BadSample] = []

        def prepare(index: int) -> tuple[np.ndarray, np.ndarray] | BadSample:
            try:
                return contents.pixels(source, index)
            except BadSample as error:
                return error

        with StoreWriter(folder / PICTURES) as writer:
            for shape, indices in _by_shape(contents, todo):
                size = max(min(8 // mesh.size, AT_ONCE // (shape[0] * shape[1])), 1) * mesh.size
                encode, spread = self._compiled(_pictures, size), self._spread(size)
                ours = _Share(indices, size, own_rows(spread, size))
                prepared = iter(ours.read(prepare, self.config.data.transform_images_num_proc))
                for chunk in ours.chunks:
                    items = hosts.together(partial(_take, prepared, chunk, found, bad))
                    blank = (np.zeros((*shape, 3), np.uint8), np.zeros(6, np.float32))
                    pixels = np.stack([blank[0] if isinstance(item, BadSample) else item[0] for item in items])
                    moments = encode(self.encoders, jax.make_array_from_process_local_data(spread, pixels))
                    mean, logvar = (_own(x) for x in moments)
                    hosts.together(partial(_write_pictures, writer, contents, chunk, items, mean, logvar))
        for name, reason in (
            pair for pairs in hosts.gather_json([(b.name, b.reason) for b in found]) for pair in pairs
        ):
            bad.add(BadSample(name, reason))

    def _encode_text(self, source: Source, contents: Contents, folder: Path, todo: Int[np.ndarray, " m"]) -> None:
        mesh, dtype = self.layout.mesh, jnp.dtype(self.config.model.activations_dtype)
        if not len(todo):
            return
        size = CAPTIONS_AT_ONCE * mesh.size
        encode, spread = self._compiled(_captions, size), self._spread(size)
        ours = _Share(todo, size, own_rows(spread, size))

        def ids(chunk: Sequence[int]) -> tuple[np.ndarray, ...]:
            said = [contents.caption(source, index) for index in chunk]
            return tuple(tokenize(t, said, self.config.data.caption_chunks)[0] for t in self.parts.tokenizers)

        with StoreWriter(folder / TEXT) as writer:
            for chunk in ours.chunks:
                rows = hosts.together(partial(ids, chunk))
                put = (jax.make_array_from_process_local_data(spread, x) for x in rows)
                context, pooled = (_own(x).astype(dtype) for x in encode(self.encoders, *put))
                hosts.together(partial(_write_text, writer, contents, chunk, context, pooled))

    def _spread(self, size: int) -> Any:
        mesh = self.layout.mesh
        return batch_sharding(mesh, mesh.axis_names, size)

    def _compiled(self, function: Callable[..., Any], size: int) -> Callable[..., Any]:
        layout, compute = self.layout, self.compute
        enter = layout.enter if layout.mesh.size > 1 else lambda tree: tree
        return jax.jit(
            lambda encoders, *inputs: function(encoders, *enter(inputs), compute=compute),
            out_shardings=self._spread(size),
        )


def _pictures(encoders: Encoders, pixels: Any, *, compute: Any) -> Any:
    moments = encode_pixels(encoders.vae, pixels, compute=compute)
    return moments.mean, moments.logvar


def _captions(encoders: Encoders, ids: Any, ids_2: Any, *, compute: Any) -> Any:
    return encoders.encode_text(ids, ids_2, compute=compute)


class _Share:
    """What this process encodes: its rows of chunks of a size, the last one filled up with its last index."""

    def __init__(self, indices: Int[np.ndarray, " m"], size: int, rows: Sequence[int]):
        padded = np.concatenate([indices, np.repeat(indices[-1:], -len(indices) % size)]).reshape(-1, size)
        self.chunks: list[list[int]] = padded[:, list(rows)].tolist()

    def read(self, prepare: Callable[[int], Any], threads: int) -> Any:
        """What `prepare` makes of each index, in order; threads read ahead."""
        flat = [index for chunk in self.chunks for index in chunk]
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        return grain.MapDataset.source(flat).map(prepare).to_iter_dataset(options)


def _by_shape(contents: Contents, todo: Int[np.ndarray, " m"]) -> Iterator[tuple[Size, Int[np.ndarray, " k"]]]:
    bucket = contents.bucket[todo % max(contents.count, 1)]
    for b, shape in enumerate(contents.shapes):
        if (bucket == b).any():
            yield shape, todo[bucket == b]


def _take(prepared: Iterator[Any], chunk: Sequence[int], found: list[BadSample], bad: BadItems) -> list[Any]:
    items = [next(prepared) for _ in chunk]
    for item in items:
        if isinstance(item, BadSample):
            found.append(item)
            bad.add(item)
    return items


def _write_pictures(
    writer: StoreWriter, contents: Contents, chunk: Sequence[int], items: list[Any], mean: Any, logvar: Any
) -> None:
    written = set()
    for i, (index, item) in enumerate(zip(chunk, items, strict=True)):
        if not isinstance(item, BadSample) and index not in written:
            written.add(index)
            writer.add(contents.pictures[index], {"mean": mean[i], "logvar": logvar[i], "time_ids": item[1]})


def _write_text(writer: StoreWriter, contents: Contents, chunk: Sequence[int], context: Any, pooled: Any) -> None:
    written = set()
    for i, index in enumerate(chunk):
        if index not in written:
            written.add(index)
            writer.add(contents.text[index], {"context": context[i], "pooled": pooled[i]})


def _own(x: jax.Array) -> np.ndarray:
    """The rows of a spread array that this process holds, in order."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _union(indices: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """The indices that any process has, in the order of the first one that has them."""
    everyone = hosts.gather_json(indices.tolist())
    return np.array(list(dict.fromkeys(i for one in everyone for i in one)), int)
