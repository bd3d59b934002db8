"""What must be known of every sample before the first batch: its size for the buckets, its content for the cache."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np
import safetensors.numpy
from jaxtyping import Int32

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.pictures import picture_size
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.store import Keys, key_text


@dataclass(frozen=True)
class Survey:
    """Of n samples, in their order."""

    sizes: Int32[np.ndarray, "n 2"]
    """(height, width) of each picture, upright, in pixels; (0, 0) where it cannot be used."""
    pictures: Keys
    """Digest of each picture's file; empty where only sizes were asked for."""
    captions: Keys
    """Digest of every caption, one sample's after the other's; empty where only sizes were asked for."""
    counts: Int32[np.ndarray, " n"]
    """Captions of each sample; 0 where it cannot be used."""
    bad: tuple[BadSample, ...]

    def to_bytes(self) -> bytes:
        """For another process."""
        arrays = {name: getattr(self, name) for name in ("sizes", "counts")}
        text = {name: getattr(self, name).view(np.uint8) for name in ("pictures", "captions")}
        bad = json.dumps([(bad.name, bad.reason) for bad in self.bad]).encode()
        return safetensors.numpy.save({**arrays, **text, "bad": np.frombuffer(bad, np.uint8)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Survey":
        """What `to_bytes` gave."""
        arrays = safetensors.numpy.load(data)
        keys = {name: arrays[name].view(key_text([]).dtype).reshape(-1) for name in ("pictures", "captions")}
        bad = tuple(BadSample(*fields) for fields in json.loads(arrays["bad"].tobytes()))
        return cls(arrays["sizes"], keys["pictures"], keys["captions"], arrays["counts"], bad)

    @classmethod
    def joined(cls, parts: Sequence["Survey"]) -> "Survey":
        """That of all samples, of which the i-th of k parts has samples i, i + k, i + 2 k and on."""
        if len(parts) == 1:
            return parts[0]
        n, k = sum(len(part.sizes) for part in parts), len(parts)
        whole = {field.name: _interleaved([getattr(part, field.name) for part in parts], n, k)
                 for field in dataclasses.fields(cls) if field.name in ("sizes", "counts", "pictures")}  # fmt: skip
        starts = [np.concatenate([[0], np.cumsum(part.counts)]) for part in parts]
        captions = [parts[i % k].captions[starts[i % k][i // k] : starts[i % k][i // k + 1]] for i in range(n)]
        return cls(captions=np.concatenate(captions) if captions else key_text([]), **whole,
                   bad=tuple(bad for part in parts for bad in part.bad))  # fmt: skip


def survey(
    source: Source,
    indices: range,
    *,
    digests: bool,
    num_threads: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Survey:
    """Look at some samples: at headers alone for sizes, at whole files and captions for `digests`."""
    threads = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=8 * num_threads)
    look = partial(_look, source, digests=digests)
    sizes = np.zeros((len(indices), 2), np.int32)
    counts = np.zeros(len(indices), np.int32)
    pictures, captions, bad = [], [], []
    for i, seen in enumerate(grain.MapDataset.source(indices).map(look).to_iter_dataset(threads)):
        progress(i)
        if isinstance(seen, BadSample):
            bad.append(seen)
            pictures.append("")
            continue
        sizes[i], digest, said = seen
        pictures.append(digest)
        captions.extend(said)
        counts[i] = len(said)
    return Survey(sizes, key_text(pictures), key_text(captions), counts, tuple(bad))


def _look(source: Source, index: int, *, digests: bool) -> tuple[tuple[int, int], str, list[str]] | BadSample:
    name = source.name(index)
    try:
        if not digests:
            return picture_size(partial(source.picture, index), name), "", []
        data = source.picture(index)
        said = [_digest(caption.encode("utf-8", "surrogatepass")) for caption in source.captions(index)]
        return picture_size(lambda limit: data if limit < 0 else data[:limit], name), _digest(data), said
    except BadSample as error:
        return error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _interleaved(parts: list[np.ndarray], n: int, k: int) -> np.ndarray:
    whole = np.empty((n, *parts[0].shape[1:]), parts[0].dtype)
    for i, part in enumerate(parts):
        whole[i::k] = part
    return whole
