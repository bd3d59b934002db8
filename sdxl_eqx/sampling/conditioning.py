"""What the UNet is told: prompts through the text encoders, sizes and crops as numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.sdxl import Conditioning, Encoders
from sdxl_eqx.sampling.drawing import Drawing

Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Prompts to the ids of both tokenizers, each `[b, 77]` or a multiple."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """What one picture is to show, and what the model is told of its size and crop, in (height, width) and (top, left).

    A negative prompt of None is absent: zeros for a model that learned them, else the encoded empty prompt. An empty
    prompt_2 is the same as the prompt; sizes of None are the picture's own, and of the negative ones the positive ones.
    """

    prompt: str
    negative_prompt: str | None = None
    prompt_2: str = ""
    negative_prompt_2: str = ""
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size | None = None
    negative_target_size: Size | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    def time_ids(self, size: Size, *, negative: bool = False, aesthetic: bool = False) -> list[float]:
        """The numbers of a picture of (height, width) `size`; with `aesthetic` those of the refiner."""
        original, crop, target = self.original_size or size, self.crops_coords_top_left, self.target_size or size
        score = self.aesthetic_score
        if negative:
            original = self.negative_original_size or original
            crop = crop if self.negative_crops_coords_top_left is None else self.negative_crops_coords_top_left
            target, score = self.negative_target_size or target, self.negative_aesthetic_score
        numbers = (*original, *crop, score) if aesthetic else (*original, *crop, *target)
        return [float(number) for number in numbers]


def condition(
    encoders: Encoders, tokenize: Tokenize, prompts: Sequence[Prompt], size: Size, drawing: Drawing
) -> Conditioning:
    """What prompts say of pictures of (height, width) `size`."""
    ids = tokenize([p.prompt for p in prompts])[0]
    ids_2 = tokenize([p.prompt_2 or p.prompt for p in prompts])[1]
    context, pooled = encode_text(encoders, *drawing.put((ids, ids_2)), drawing=drawing)
    return _with_time_ids(context, pooled, [p.time_ids(size) for p in prompts], drawing)


def condition_negative(
    encoders: Encoders, tokenize: Tokenize, prompts: Sequence[Prompt], size: Size, drawing: Drawing, *, zeros: bool
) -> Conditioning:
    """What guidance leads away from; with `zeros`, zeros are what an absent negative prompt is (diffusers'
    `force_zeros_for_empty_prompt`)."""
    ids = tokenize([p.negative_prompt or "" for p in prompts])[0]
    ids_2 = tokenize([p.negative_prompt_2 or p.negative_prompt or "" for p in prompts])[1]
    context, pooled = encode_text(encoders, *drawing.put((ids, ids_2)), drawing=drawing)
    there = [not zeros or p.negative_prompt is not None or bool(p.negative_prompt_2) for p in prompts]
    context, pooled = _kept(context, pooled, drawing.put(np.array(there)))
    return _with_time_ids(context, pooled, [p.time_ids(size, negative=True) for p in prompts], drawing)


def condition_refiner(
    encoder: CLIPText,
    tokenize: Tokenize,
    prompts: Sequence[Prompt],
    size: Size,
    drawing: Drawing,
    *,
    negative: bool = False,
    zeros: bool = False,
) -> Conditioning:
    """What the refiner, which has the second text encoder alone, is told of prompts, or of negative prompts, where
    `zeros` are what an absent one is."""
    texts = [(p.negative_prompt or "") if negative else p.prompt for p in prompts]
    context, pooled = _encode_one(encoder, drawing.put(tokenize(texts)[1]), drawing=drawing)
    if negative and zeros:
        there = [p.negative_prompt is not None for p in prompts]
        context, pooled = _kept(context, pooled, drawing.put(np.array(there)))
    ids = [p.time_ids(size, negative=negative, aesthetic=True) for p in prompts]
    return _with_time_ids(context, pooled, ids, drawing)


@partial(jax.jit, static_argnames="drawing")
def encode_text(
    encoders: Encoders, ids: Int[Array, "b s"], ids_2: Int[Array, "b s"], *, drawing: Drawing
) -> tuple[Float[Array, "b s e"], Float[Array, "b p"]]:
    """(context, pooled) of tokenized prompts."""
    ids, ids_2 = drawing.place((ids, ids_2))
    return encoders.encode_text(ids, ids_2, compute=drawing.decoding)


@partial(jax.jit, static_argnames="drawing")
def _encode_one(
    encoder: CLIPText, ids: Int[Array, "b s"], *, drawing: Drawing
) -> tuple[Float[Array, "b s e"], Float[Array, "b p"]]:
    length = min(ids.shape[1], encoder.config.max_position_embeddings)
    hidden, pooled = encoder(drawing.place(ids).reshape(-1, length), compute=drawing.decoding)
    assert pooled is not None  # the second encoder projects
    return hidden.reshape(len(ids), ids.shape[1], -1), pooled[:: ids.shape[1] // length]


@jax.jit
def _kept(context: Array, pooled: Array, there: Array) -> tuple[Array, Array]:
    return jnp.where(there[:, None, None], context, 0), jnp.where(there[:, None], pooled, 0)


def _with_time_ids(context: Array, pooled: Array, time_ids: Sequence[list[float]], drawing: Drawing) -> Conditioning:
    return Conditioning(context, pooled, jnp.asarray(drawing.put(np.array(time_ids, np.float32))))
