"""The same picture drawn by our pipeline and by diffusers', from the same files and with the same noise."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_torch as theirs
import pytest
from PIL import Image

from sdxl_eqx.generation import Pipeline
from sdxl_eqx.generation import pipeline as generation
from sdxl_eqx.sampling import pipeline as sampling

torch = theirs.torch


@dataclass(frozen=True)
class Drawn:
    """Pictures from 0 to 255 and the latents, scaled, that they were decoded from."""

    pictures: np.ndarray
    latents: np.ndarray


def load_ours(folder: Path, **flags: Any) -> Pipeline:
    """Our pipeline as the script loads it, in float32 on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "choose_hardware", lambda _: jax.devices()[:1])
        return Pipeline.load(str(folder), activations_dtype="float32", **flags)


def load_theirs(kind: str, folder: Path, **parts: Any) -> Any:
    """diffusers' pipeline of that name, from the same folder; `parts` take the place of its own."""
    with pytest.MonkeyPatch.context() as patch, theirs.their_warnings_are_theirs():
        patch.setenv("HF_HUB_OFFLINE", "1")
        pipe = getattr(theirs.lazy, kind).from_pretrained(folder, local_files_only=True, add_watermarker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_kind(pipe: Any, kind: str, **parts: Any) -> Any:
    """diffusers' pipeline of another name with the same parts but for `parts`."""
    with theirs.their_warnings_are_theirs():
        other = getattr(theirs.lazy, kind)(**{**pipe.components, **parts}, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    return other


def their_scheduler(pipe: Any, name: str, **changes: Any) -> Any:
    """A scheduler of that class with the pipeline's config, as diffusers' documentation swaps them."""
    with theirs.their_warnings_are_theirs():
        return getattr(theirs.lazy, name).from_config(pipe.scheduler.config, **changes)


def draw_ours(pipeline: Pipeline, prompt: Any, seeds: Sequence[int], **asked: Any) -> Drawn:
    """What `Pipeline.__call__` draws."""
    found: list[np.ndarray] = []
    decode = sampling.decode

    def keep(vae: Any, latents: Any, **options: Any) -> Any:
        found.append(np.asarray(latents))
        return decode(vae, latents, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "decode", keep)
        pictures = pipeline(prompt, seeds=list(seeds), **asked)
    return Drawn(pictures, found[0])


def draw_theirs(pipe: Any, prompt: Any, seeds: Sequence[int], **asked: Any) -> Drawn:
    """What diffusers' pipeline draws where our noise is."""
    asked = {key: _pictures(value) for key, value in asked.items()}
    with torch.no_grad(), theirs.their_warnings_are_theirs(), our_noise():
        latents = pipe(prompt, generator=generators(seeds), output_type="latent", **asked).images
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        pictures = pipe.image_processor.postprocess(pixels, output_type="pil")
    return Drawn(np.stack([np.asarray(picture) for picture in pictures]), theirs.to_numpy(latents))


def generators(seeds: Sequence[int]) -> list[Any]:
    """A generator for each picture, which says nothing but its seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _pictures(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return Image.fromarray(value)
    return [_pictures(one) for one in value] if isinstance(value, list) else value


@contextlib.contextmanager
def our_noise() -> Iterator[None]:
    """Whatever diffusers draws at random is what we draw for the generators' seeds: the initial noise of its
    pipelines, the posterior's of its autoencoder, and fresh noise step by step of its schedulers."""
    count = iter(range(1000))

    def initial(seed: int, shape: tuple[int, int, int]) -> Any:
        return sampling.initial_noise([seed], shape)

    def posterior(seed: int, shape: tuple[int, int, int]) -> Any:
        return jr.normal(jr.fold_in(jr.key(seed), sampling.POSTERIOR), (1, *shape), jnp.float32)

    def instead(kind: Any) -> Any:
        def randn_tensor(shape: tuple[int, ...], generator: Any = None, **_: Any) -> Any:
            own = kind if kind is not None else _step(next(count))
            given = generator if isinstance(generator, list) else [generator]
            b, c, h, w = shape
            noise = [np.asarray(own(one.initial_seed(), (h, w, c))) for one in given[:b]]
            return theirs.to_torch(np.concatenate(noise))

        return randn_tensor

    def _step(index: int) -> Any:
        def of(seed: int, shape: tuple[int, int, int]) -> Any:
            return sampling.step_noise(jnp.stack([jr.key(seed)]), jnp.int32(index), (1, *shape))

        return of

    kinds = {"pipelines": initial, "models": posterior, "schedulers": None}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            part = name.split(".")[1] if name.startswith("diffusers.") else ""
            if part in kinds and "randn_tensor" in vars(module):
                patch.setattr(module, "randn_tensor", instead(kinds[part]))
        yield


def assert_twins(ours: Drawn, wanted: Drawn, *, atol: float = 2e-3) -> None:
    """Latents are close and pictures within two levels, of which neither is flat."""
    assert np.std(wanted.latents) > 0.05 and np.std(wanted.pictures) > 5
    assert ours.pictures.shape == wanted.pictures.shape
    scale = max(1.0, float(np.std(wanted.latents)))
    np.testing.assert_allclose(ours.latents / scale, wanted.latents / scale, rtol=0, atol=atol)
    assert difference(ours, wanted) <= 2


def difference(one: Drawn, other: Drawn) -> int:
    """The largest difference of pictures in levels."""
    return int(np.abs(one.pictures.astype(int) - other.pictures.astype(int)).max())
