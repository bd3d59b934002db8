"""Every way to draw against diffusers' pipelines, from files to pixels: same folder, same arguments, same noise."""

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_torch as theirs
import pytest
import small_models as small
from safetensors.numpy import load_file, save_file
from twins import (
    assert_twins,
    difference,
    draw_ours,
    draw_theirs,
    load_ours,
    load_theirs,
    their_kind,
    their_scheduler,
)

from sdxl_eqx.config import LoraTrainingConfig, TextEncoderConfig, TrainConfig
from sdxl_eqx.generation import Pipeline
from sdxl_eqx.training.networks import Networks, join, split, with_changes
from sdxl_eqx.training.targets import lora_shape
from sdxl_eqx.weights.adapters import parts_of, to_lora
from sdxl_eqx.weights.lora import write_kohya, write_peft

pytestmark = pytest.mark.parity

PROMPT, SEED = "a red fox in the snow!", [3]
SIZE = (64, 48)
COMMON: dict[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 3, "guidance_scale": 4.0}
"""Three evaluations in every case, so that those of a kind share what is compiled."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return load_theirs("StableDiffusionXLPipeline", folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return load_ours(folder)


def without(asked: dict[str, Any], *names: str) -> dict[str, Any]:
    """Arguments but for some."""
    return {key: value for key, value in asked.items() if key not in names}


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases, of which those that are not among `quick` run where slow tests are asked for: each compiles anew."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


TEXT_TO_IMAGE: dict[str, dict[str, Any]] = {
    "an absent negative prompt": {},
    "a negative prompt": {"negative_prompt": "blurry"},
    "other prompts for the second encoder": {
        "negative_prompt": "blurry", "prompt_2": "oil on canvas", "negative_prompt_2": "a photo",
    },
    "sizes and crop": {
        "original_size": (300, 200), "crops_coords_top_left": (7, 20), "target_size": (96, 128),
        "negative_original_size": (32, 16), "negative_crops_coords_top_left": (4, 40),
        "negative_target_size": (64, 24),
    },
    "positive sizes alone": {"original_size": (300, 200), "target_size": (96, 128)},
    "guidance that is rescaled": {"guidance_rescale": 0.7, "guidance_scale": 9.0},
    "sides that halve unevenly": {"height": 40, "width": 72},
}  # fmt: skip


@pytest.mark.parametrize("case", slow_but(TEXT_TO_IMAGE, *[*TEXT_TO_IMAGE][:5]))
def test_text_to_image(case: str, pipeline: Pipeline, pipe: Any):
    # One picture: of two, diffusers 0.42 gives the second half the sizes of the first (it repeats after it joins).
    asked = {**COMMON, **TEXT_TO_IMAGE[case]}
    assert_twins(draw_ours(pipeline, PROMPT, SEED, **asked), draw_theirs(pipe, PROMPT, SEED, **asked))


@pytest.mark.slow
def test_two_pictures_at_once_without_guidance(pipeline: Pipeline, pipe: Any):
    asked = {**COMMON, "guidance_scale": 1.0}
    prompts, seeds = [PROMPT, "wow"], [3, 8]
    assert_twins(draw_ours(pipeline, prompts, seeds, **asked), draw_theirs(pipe, prompts, seeds, **asked))


def test_an_absent_negative_prompt_is_encoded_where_the_model_says_so(folder: Path, pipeline: Pipeline, tmp_path: Path):
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    wanted = draw_theirs(load_theirs("StableDiffusionXLPipeline", tmp_path), PROMPT, SEED, **COMMON)
    assert_twins(draw_ours(load_ours(tmp_path), PROMPT, SEED, **COMMON), wanted)
    assert difference(draw_ours(pipeline, PROMPT, SEED, **COMMON), wanted) > 2


SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "trailing"},
}


def with_scheduler(folder: Path, name: str, **changes: Any) -> Pipeline:
    """Our pipeline with another scheduler, by its flags."""
    flags = {"_class_name": name.removesuffix("Scheduler"), **changes}
    return load_ours(folder, **{f"diffusion_scheduler_config.{key}": value for key, value in flags.items()})


@pytest.mark.parametrize("name", slow_but(SCHEDULERS, "DPMSolverMultistepScheduler"))
def test_another_scheduler(name: str, folder: Path, pipe: Any):
    changes = SCHEDULERS[name]
    ours = draw_ours(with_scheduler(folder, name, **changes), PROMPT, SEED, **COMMON)
    other = their_kind(pipe, "StableDiffusionXLPipeline", scheduler=their_scheduler(pipe, name, **changes))
    assert_twins(ours, draw_theirs(other, PROMPT, SEED, **COMMON))


EULER, DPM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
STRENGTHS = {0.3: 10, 0.7: 5, 1.0: 3}
"""And of how many steps they are three."""


@pytest.mark.parametrize("strength", slow_but(STRENGTHS, 0.7))
@pytest.mark.parametrize("name", slow_but([EULER, DPM], EULER))
def test_image_to_image(name: str, strength: float, folder: Path, pipe: Any):
    asked = {**COMMON, "strength": strength, "num_inference_steps": STRENGTHS[strength], "image": small.picture(SIZE)}
    other = their_kind(pipe, "StableDiffusionXLImg2ImgPipeline", scheduler=their_scheduler(pipe, name))
    wanted = draw_theirs(other, PROMPT, SEED, **without(asked, "height", "width"))
    assert_twins(draw_ours(with_scheduler(folder, name), PROMPT, SEED, **asked), wanted)


@pytest.fixture(scope="module")
def inpainting_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_unet(tmp_path_factory.mktemp("models") / "inpainting", small.INPAINTING)


PAINTED: dict[str, tuple[str, float, int, tuple[int, int], tuple[int, int]]] = {
    "nearly all steps": (EULER, 0.9999, 4, SIZE, SIZE),
    "all steps": (EULER, 1.0, 3, SIZE, SIZE),
    "some steps over a picture and a mask of other sizes": (EULER, 0.6, 5, (50, 70), (90, 64)),
    "a scheduler that preserves variance": ("DDIMScheduler", 0.6, 5, SIZE, (32, 24)),
    "a solver of second order": (DPM, 1.0, 3, SIZE, SIZE),
}


def painting(case: str) -> dict[str, Any]:
    """Arguments of a case."""
    _, strength, steps, size, mask_size = PAINTED[case]
    inputs = {"image": small.picture(size), "mask": small.mask(mask_size)}
    return {**COMMON, "strength": strength, "num_inference_steps": steps, **inputs}


def their_painting(pipe: Any, asked: dict[str, Any], scheduler: str, **parts: Any) -> Any:
    """What diffusers makes of those arguments."""
    changed = their_scheduler(pipe, scheduler)
    other = their_kind(pipe, "StableDiffusionXLInpaintPipeline", scheduler=changed, **parts)
    return draw_theirs(other, PROMPT, SEED, **without(asked, "mask"), mask_image=asked["mask"])


@pytest.mark.parametrize("case", slow_but(PAINTED, "some steps over a picture and a mask of other sizes"))
def test_inpainting(case: str, folder: Path, pipe: Any):
    asked, name = painting(case), PAINTED[case][0]
    assert_twins(draw_ours(with_scheduler(folder, name), PROMPT, SEED, **asked), their_painting(pipe, asked, name))


@pytest.mark.parametrize("case", slow_but([*PAINTED][:3], "nearly all steps"))
def test_inpainting_by_a_unet_that_sees_mask_and_picture(case: str, folder: Path, inpainting_unet: Path, pipe: Any):
    asked = painting(case)
    unet = theirs.UNet2DConditionModel.from_pretrained(inpainting_unet, local_files_only=True)
    ours = draw_ours(load_ours(folder, unet_checkpoint=str(inpainting_unet)), PROMPT, SEED, **asked)
    assert_twins(ours, their_painting(pipe, asked, EULER, unet=unet))


LAYERS = {
    "unet": ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
             "mid_block.attentions.0.transformer_blocks.1.attn2.to_v",
             "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"),
    "text_encoder": ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.self_attn.out_proj"),
    "text_encoder_2": ("text_model.encoder.layers.1.self_attn.out_proj",),
}  # fmt: skip
"""diffusers 0.42 takes a text encoder's part of kohya's file only where an out_proj is in it."""

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@pytest.fixture(scope="module")
def loras(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One with kohya's keys, one with PEFT's, of other ranks."""
    to = tmp_path_factory.mktemp("loras")
    kohya, peft = {}, {}
    for part, paths in LAYERS.items():
        (file,) = (folder / part).glob("*.safetensors")
        shapes = {path: load_file(file)[f"{path}.weight"].shape for path in paths}
        named = {KOHYA[part] + path.replace(".", "_"): shape for path, shape in shapes.items()}
        kohya |= small.lora_tensors(named, (".lora_down.weight", ".lora_up.weight"), 3)
        kohya |= {f"{name}.alpha": np.float32(2) for name in named}
        named = {f"{part}.{path}": shape for path, shape in shapes.items()}
        peft |= small.lora_tensors(named, (".lora_A.weight", ".lora_B.weight"), 2)
    save_file({key: np.asarray(value) for key, value in kohya.items()}, to / "kohya.safetensors")
    save_file(peft, to / "peft.safetensors")
    return to / "kohya.safetensors", to / "peft.safetensors"


@pytest.fixture
def adapted(pipe: Any, loras: tuple[Path, Path]) -> Iterator[Any]:
    """Their pipeline with both LoRAs as adapters."""
    parts = {part: copy.deepcopy(getattr(pipe, part)) for part in LAYERS}
    other = their_kind(pipe, "StableDiffusionXLPipeline", **parts)
    with theirs.their_warnings_are_theirs():
        for file in loras:
            other.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
        other.set_adapters(["kohya", "peft"], [0.8, 0.3])
        yield other


def test_two_loras(loras: tuple[Path, Path], folder: Path, pipeline: Pipeline, adapted: Any):
    wanted = draw_theirs(adapted, PROMPT, SEED, **COMMON)
    names = tuple(str(file) for file in loras)
    flags = {"lora_config.lora_model_name_or_path": names, "lora_config.scale": (0.8, 0.3)}
    loaded = load_ours(folder, **flags)
    ours = draw_ours(loaded, PROMPT, SEED, **COMMON)
    assert_twins(ours, wanted)
    plain = draw_ours(pipeline, PROMPT, SEED, **COMMON)
    assert difference(plain, wanted) > 2
    later = pipeline.with_loras(dict(zip(names, (0.8, 0.3), strict=True)))
    np.testing.assert_array_equal(draw_ours(later, PROMPT, SEED, **COMMON).pictures, ours.pictures)
    np.testing.assert_array_equal(draw_ours(loaded.with_loras({}), PROMPT, SEED, **COMMON).pictures, plain.pictures)


@pytest.mark.parametrize("dora", slow_but([False, True], False), ids=["LoRA", "DoRA"])
def test_what_trained_draws_the_same_here_and_from_both_files_there(
    dora: bool, folder: Path, pipeline: Pipeline, pipe: Any, tmp_path: Path
):
    lora = LoraTrainingConfig(lora_rank=2, lora_alpha=3.0, use_dora=dora)
    config, models = TrainConfig(lora=lora, text=TextEncoderConfig(train_text_encoder=True)), pipeline.models
    changes, frozen = split(with_changes(Networks(models.unet, models.encoders), config, key=jr.key(1)), config)
    rng = np.random.default_rng(0)
    changes = jax.tree.map(lambda x: x + jnp.asarray(0.05 * rng.standard_normal(x.shape), x.dtype), changes)
    whole = join(changes, frozen)
    assert whole.encoders is not None
    trained = dataclasses.replace(models, unet=whole.unet, encoders=whole.encoders)
    ours = draw_ours(dataclasses.replace(pipeline, models=trained), PROMPT, SEED, **COMMON)
    assert difference(ours, draw_ours(pipeline, PROMPT, SEED, **COMMON)) > 2
    saved = to_lora(parts_of(changes.unet, changes.encoders), lora_shape(lora), {})
    write_peft(saved, tmp_path / "peft.safetensors")
    write_kohya(saved, pipeline.parts.unet, tmp_path / "kohya.safetensors")
    for form in ("peft",) if dora else ("peft", "kohya"):  # diffusers 0.42 takes DoRA's magnitudes out of kohya's files
        parts = {part: copy.deepcopy(getattr(pipe, part)) for part in LAYERS}
        other = their_kind(pipe, "StableDiffusionXLPipeline", **parts)
        with theirs.their_warnings_are_theirs():
            other.load_lora_weights(str(tmp_path), weight_name=f"{form}.safetensors")
            assert_twins(ours, draw_theirs(other, PROMPT, SEED, **COMMON))


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    to = tmp_path_factory.mktemp("nets")
    return str(small.save_controlnet(to / "one")), str(small.save_controlnet(to / "two", salt=1))


STEERED: dict[str, dict[str, Any]] = {
    "all the way": {"controlnet_conditioning_scale": (0.7,)},
    "from a step to another": {
        "controlnet_conditioning_scale": (1.0,), "control_guidance_start": (0.3,), "control_guidance_end": (0.7,),
    },
    "two of them": {
        "controlnet_conditioning_scale": (0.4, 0.8), "control_guidance_start": (0.3, 0.0),
        "control_guidance_end": (1.0, 0.7),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", slow_but(STEERED, "two of them"))
def test_controlnets(case: str, nets: tuple[str, str], folder: Path, pipe: Any):
    asked = STEERED[case]
    count = len(asked["controlnet_conditioning_scale"])
    hints = [small.picture(SIZE, 5), small.picture((100, 90), 6)][:count]
    loaded = [theirs.ControlNetModel.from_pretrained(net, local_files_only=True) for net in nets[:count]]
    other = their_kind(pipe, "StableDiffusionXLControlNetPipeline", controlnet=loaded if count > 1 else loaded[0])
    told = {key: list(value) if count > 1 else value[0] for key, value in asked.items()}
    wanted = draw_theirs(other, PROMPT, SEED, image=hints if count > 1 else hints[0], **told, **COMMON)
    pipeline = load_ours(folder, controlnet_model_name_or_path=nets[:count], **asked)
    assert_twins(draw_ours(pipeline, PROMPT, SEED, hints=hints, **COMMON), wanted)


@pytest.fixture(scope="module", params=slow_but([False, True], False), ids=["encodes", "zeros"])
def refiner(request: pytest.FixtureRequest, pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """diffusers' pipeline of a refiner, and the folder that it saves; what an absent negative prompt is it says."""
    to = tmp_path_factory.mktemp("refiners") / "refiner"
    found = their_kind(
        pipe, "StableDiffusionXLImg2ImgPipeline",
        unet=theirs.their_unet(small.REFINER), text_encoder=None, tokenizer=None,
        scheduler=their_scheduler(pipe, EULER), requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=request.param,
    )  # fmt: skip
    with theirs.their_warnings_are_theirs():
        found.save_pretrained(to)
    return found, to


@pytest.mark.parametrize(("steps", "until", "changes"), [
    (4, 0.8, {"negative_prompt": "blurry", "prompt_2": "oil on canvas"}),
    pytest.param(6, 0.6, {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_refiner_draws_the_last_steps(
    steps: int, until: float, changes: dict[str, Any], refiner: tuple[Any, Path], folder: Path, pipe: Any
):
    other, at = refiner
    asked = {**COMMON, "num_inference_steps": steps, **changes}
    scores = ("aesthetic_score", "negative_aesthetic_score")
    first = draw_theirs(pipe, PROMPT, SEED, **without(asked, *scores), denoising_end=until)
    begun = {"image": theirs.to_torch(first.latents), "denoising_start": until}
    wanted = draw_theirs(other, PROMPT, SEED, **without(asked, "height", "width"), **begun)
    pipeline = load_ours(folder, refiner_model_name_or_path=str(at), refiner_fraction=1 - until)
    assert_twins(draw_ours(pipeline, PROMPT, SEED, **asked), wanted)


def test_a_refiner_draws_the_last_steps_over_a_picture_too(refiner: tuple[Any, Path], folder: Path, pipe: Any):
    other, at = refiner
    asked = {**COMMON, "num_inference_steps": 6, "strength": 0.7, "image": small.picture(SIZE)}
    base = their_kind(pipe, "StableDiffusionXLImg2ImgPipeline", scheduler=their_scheduler(pipe, EULER))
    first = draw_theirs(base, PROMPT, SEED, **without(asked, "height", "width"), denoising_end=0.7)
    begun = {"image": theirs.to_torch(first.latents), "denoising_start": 0.7}
    wanted = draw_theirs(other, PROMPT, SEED, **without(asked, "height", "width", "image", "strength"), **begun)
    pipeline = load_ours(folder, refiner_model_name_or_path=str(at), refiner_fraction=0.3)
    assert_twins(draw_ours(pipeline, PROMPT, SEED, **asked), wanted)
