"""`model_index.json`: which pipeline of diffusers a model is for, and the classes of its parts."""

from typing import Any

from sdxl_eqx.weights.model import PARTS, Model

INDEX_NAME = "model_index.json"

NOTHING = [None, None]
"""What stands for a part that is not there."""

INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.42.0",
    "feature_extractor": NOTHING,
    "force_zeros_for_empty_prompt": True,
    "image_encoder": NOTHING,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""Of SDXL base."""

REFINER: dict[str, Any] = {
    **INDEX,
    "_class_name": "StableDiffusionXLImg2ImgPipeline",
    "force_zeros_for_empty_prompt": False,
    "requires_aesthetics_score": True,
}
"""Of SDXL's refiner."""


def index_of(*, caption_dropout: float) -> dict[str, Any]:
    """That of a model trained with that much caption dropout.

    It says what an absent negative prompt means: with dropout the model has learned the encoded empty one.
    """
    return {**INDEX, "force_zeros_for_empty_prompt": caption_dropout == 0}


def complete_index(model: Model) -> tuple[dict[str, Any], list[str]]:
    """(`model_index.json` of what is in the model, components that its own index names and that are not written)."""
    published = INDEX if "text_encoder" in model.parts else REFINER
    index = {**(model.index or published)}
    # The refiner has the second text encoder alone, and its tokenizer.
    there = {**{part: part in model.parts for part in PARTS}, "tokenizer": "text_encoder" in model.parts}
    for name, is_there in there.items():
        if not is_there:
            index[name] = NOTHING
        elif not index.get(name) or index[name] == NOTHING:
            index[name] = INDEX[name]
    lost = [name for name, value in index.items() if isinstance(value, list) and name not in INDEX and any(value)]
    return {**index, **dict.fromkeys(lost, NOTHING)}, lost
