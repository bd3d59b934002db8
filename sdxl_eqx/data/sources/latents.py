"""TFRecords of latents and encoded captions, as MaxDiffusion writes them for SDXL."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources.examples import parse_example, parse_tensor
from sdxl_eqx.data.sources.records import Shards, TFRecords

FEATURES = ("pixel_values", "prompt_embeds", "text_embeds")
"""Latent, context and pooled text, each a serialized tensor; input_ids, which may be there too, are not read."""

TOKENS = 77
"""Tokens of an encoded caption."""

LOGVAR = -30.0
"""Of a posterior whose samples are its mean: a deviation of 3e-7, and the least that diffusers' VAE allows."""


class LatentRecords:
    """Random access to samples as the frozen encoders would give them, from tf.train.Examples in TFRecord files.

    `pixel_values` is a latent of (channels, R/8, R/8), sampled from the VAE's posterior and multiplied by
    `scaling_factor`, which is taken off again. All samples are of the shapes of the first one.

    Args:
        paths: the files, whose records follow one another.
        scaling_factor: the VAE's.
        channels: those of its latents.
        max_samples: only the first so many; -1 is all.
        index_folder: where an index goes that cannot lie beside its file.
        context_width: width that `prompt_embeds` must have.
        pooled_width: width that `text_embeds` must have.

    Raises:
        ValueError: a file is no TFRecord file or damaged, there are no records, or the first one is not as above.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        scaling_factor: float,
        channels: int,
        max_samples: int = -1,
        index_folder: Path | None = None,
        context_width: int | None = None,
        pooled_width: int | None = None,
    ):
        self.scaling_factor = scaling_factor
        self._files = [TFRecords(path, index_folder=index_folder) for path in paths]
        self._shards = Shards(paths, [len(file) for file in self._files], max_samples)
        try:
            first = self._tensors(0)
        except BadSample as error:
            raise ValueError(
                f"{error}. --dataset-type tfrecord reads what MaxDiffusion writes for SDXL: tf.train.Examples with the "
                f"serialized tensors {', '.join(FEATURES)}"
            ) from error
        self._shapes = [tensor.shape for tensor in first]
        wanted = ((channels, None, None), (TOKENS, context_width), (pooled_width,))
        for feature, shape, want in zip(FEATURES, self._shapes, wanted, strict=True):
            if len(shape) != len(want) or any(w not in (None, n) for n, w in zip(shape, want, strict=True)):
                rule = ", ".join("any" if w is None else str(w) for w in want)
                raise ValueError(
                    f"{self.name(0)}: {feature} must be of shape ({rule}), not {shape}; "
                    "give records that were made with the VAE and the text encoders of the model that is trained"
                )
        if len(set(self._shapes[0][1:])) > 1:
            raise ValueError(
                f"{self.name(0)}: pixel_values must be of a square picture, not of shape {self._shapes[0]}"
            )

    def __len__(self) -> int:
        return self._shards.count

    @property
    def resolution(self) -> int:
        """Side of the pictures, in pixels."""
        return 8 * self._shapes[0][1]

    def __repr__(self) -> str:
        return f"LatentRecords({len(self._files)} files, {len(self)} samples)"

    def name(self, index: int) -> str:
        """The record and its file; records count from 0."""
        return self._shards.name(index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """A sample as `LatentBatch` names its fields, without a batch axis; float16 text stays it.

        Its time_ids are those of a picture of just this size, as MaxDiffusion feeds.

        Raises:
            IndexError: there are fewer samples.
            BadSample: the record is damaged, of other shapes than the first, or holds what is no number.
        """
        latent, context, pooled = self._tensors(index)
        shapes = [latent.shape, context.shape, pooled.shape]
        if shapes != self._shapes:
            raise BadSample(self.name(index), f"its tensors are of shapes {shapes}, those of the first {self._shapes}")
        if not all(np.isfinite(tensor).all() for tensor in (latent, context, pooled)):
            raise BadSample(self.name(index), "a tensor holds NaN or infinity")
        mean = np.ascontiguousarray(latent.transpose(1, 2, 0), np.float32) / np.float32(self.scaling_factor)
        side = 8 * mean.shape[0]
        return {
            "mean": mean,
            "logvar": np.full_like(mean, LOGVAR),
            "context": _text(context),
            "pooled": _text(pooled),
            "time_ids": np.array([side, side, 0, 0, side, side], np.float32),
        }

    def _tensors(self, index: int) -> list[np.ndarray]:
        file, place = self._shards.find(index)
        try:
            features = parse_example(self._files[file].record(place))
            return [_tensor(features, name) for name in FEATURES]
        except (OSError, ValueError) as error:
            raise BadSample(self.name(index), str(error)) from error


def _tensor(features: dict[str, list[bytes] | np.ndarray], name: str) -> np.ndarray:
    values = features.get(name)
    if not isinstance(values, list) or len(values) != 1:
        have = ", ".join(sorted(features)) or "none"
        raise ValueError(f"it has no serialized tensor {name} (features: {have})")
    try:
        return parse_tensor(values[0])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _text(tensor: np.ndarray) -> np.ndarray:
    return tensor if tensor.dtype == np.float16 else tensor.astype(np.float32, copy=False)
