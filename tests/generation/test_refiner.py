"""A refiner together with what else draws: over a picture, within a mask, beside a ControlNet, or refused."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_models as small
from tiny_folder import OWN, TEXT_2, UNET, VAE_CONFIG

from sdxl_eqx.generation import Pipeline
from sdxl_eqx.generation import pipeline as module
from sdxl_eqx.models.controlnet import ControlNetConfig
from sdxl_eqx.sampling import pipeline as sampling

REFINER = dataclasses.replace(
    UNET,
    cross_attention_dim=TEXT_2.hidden_size,
    projection_class_embeddings_input_dim=(TEXT_2.projection_dim or 0) + 5 * UNET.addition_time_embed_dim,
)
NET = ControlNetConfig(UNET, conditioning_embedding_out_channels=(8,) * VAE_CONFIG.downscale.bit_length())
FROM: dict[str, Any] = {"image": small.picture((OWN, OWN)), "strength": 0.75}
"""Of four steps the last three, of which the refiner draws two."""

MASK = np.zeros((OWN, OWN), np.uint8)
MASK[: OWN // 2] = 255

Load = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def load(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loads the model with a refiner for the second half of four steps, on one device."""
    refiner = small.save_unet(tmp_path_factory.mktemp("refiners") / "refiner", REFINER, salt=2)
    common = {"activations_dtype": "float32", "num_inference_steps": 4, "refiner_fraction": 0.5}

    def of(**flags: Any) -> Pipeline:
        return Pipeline.load(str(folder), **{**common, "refiner_model_name_or_path": str(refiner), **flags})

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose_hardware", lambda hardware: jax.devices()[:1])
        yield of
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def refined(load: Load) -> Pipeline:
    return load()


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """Draws a picture; its latents."""
    found: list[np.ndarray] = []
    decode = sampling.decode

    def keep(vae: Any, latents: Any, **options: Any) -> Any:
        found.append(np.asarray(latents[0]))
        return decode(vae, latents, **options)

    def of(pipeline: Pipeline, prompt: str, **asked: Any) -> np.ndarray:
        pipeline(prompt, seeds=3, **asked)
        return found[-1]

    monkeypatch.setattr(sampling, "decode", keep)
    return of


def unrefined(pipeline: Pipeline) -> Pipeline:
    """The pipeline with another refiner, which says nothing."""
    refiner = pipeline.models.refiner
    assert refiner is not None
    silent = dataclasses.replace(refiner, unet=jax.tree.map(lambda x: 0 * x, refiner.unet))
    return dataclasses.replace(pipeline, models=dataclasses.replace(pipeline.models, refiner=silent))


def test_over_a_picture_the_refiner_draws_the_last_steps(refined: Pipeline, latents: Callable[..., np.ndarray]):
    drawn = latents(refined, "a fox", **FROM)
    assert np.abs(drawn - latents(unrefined(refined), "a fox", **FROM)).mean() > 0.05
    assert np.abs(drawn - latents(refined, "a castle", **FROM)).mean() > 0.05
    assert np.abs(drawn - latents(refined, "a fox", **{**FROM, "image": 255 - FROM["image"]})).mean() > 0.05


@pytest.mark.parametrize("sees_mask", [False, True], ids=["plain", "inpainting"])
def test_outside_of_a_mask_neither_changes_the_picture(
    sees_mask: bool, load: Load, refined: Pipeline, latents: Callable[..., np.ndarray], tmp_path: Path
):
    if sees_mask:
        inpainting = dataclasses.replace(UNET, in_channels=9)
        refined = load(unet_checkpoint=str(small.save_unet(tmp_path / "unet", inpainting)))
    one, other = (latents(refined, prompt, mask=MASK, **FROM) for prompt in ("a fox", "a castle"))
    half = len(one) // 2
    np.testing.assert_array_equal(one[half:], other[half:])
    assert np.abs(one[:half] - other[:half]).mean() > 0.05


def test_a_controlnet_steers_the_steps_before_the_refiner_alone(
    load: Load,
    refined: Pipeline,
    latents: Callable[..., np.ndarray],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    steered = load(controlnet_model_name_or_path=(str(small.save_controlnet(tmp_path / "net", NET)),))
    hints = [small.picture((OWN, OWN), 5)]
    plain = latents(refined, "a fox")
    assert np.abs(latents(steered, "a fox", hints=hints) - plain).mean() > 0.02
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    late = latents(steered, "a fox", hints=hints, control_guidance_start=(0.5,))
    np.testing.assert_allclose(late, plain, atol=1e-4)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith("a ControlNet takes no part: of the 2 evaluations") and "start 0.5 and its end 1" in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {**FROM, "strength": 0.5},
            r"--refiner-fraction 0\.5: all 2 evaluations of --strength 0\.5 are within it.*raise",
        ),
        ({"num_inference_steps": 1}, r"--refiner-fraction 0\.5: all 1 evaluations are within it"),
    ],
)
def test_a_refiner_that_leaves_the_model_no_step_is_refused(asked: dict[str, Any], said: str, refined: Pipeline):
    with pytest.raises(ValueError, match=said):
        refined("a fox", seeds=0, **asked)


def test_a_refiner_that_has_no_step_is_refused(refined: Pipeline):
    models = dataclasses.replace(
        refined.models,
        refiner=dataclasses.replace(refined.models.refiner, fraction=1e-4),  # pyright: ignore
    )
    with pytest.raises(ValueError, match=r"--refiner-fraction 0\.0001: none of the 4 evaluations is within it"):
        dataclasses.replace(refined, models=models)("a fox", seeds=0)
