"""`Pipeline`: one call draws any prompts and seeds, and a picture depends on nothing else that is drawn."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_folder import OWN, write_lora

from sdxl_eqx.config import GenerateConfig
from sdxl_eqx.flags import merge, parse_generate
from sdxl_eqx.generation import Pipeline
from sdxl_eqx.generation import pipeline as module
from sdxl_eqx.generation.memory import OutOfMemory
from sdxl_eqx.sampling.conditioning import Prompt

PROMPTS = ["a red fox", "a castle", "a fish"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Programs here run a few times, so that to compile them well costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def drawn(pipeline: Pipeline) -> np.ndarray:
    """One picture of each prompt, with seeds 0, 1 and 2."""
    return pipeline(PROMPTS, seeds=[0, 1, 2])


def furthest(pictures: np.ndarray, others: np.ndarray) -> int:
    """The largest difference of two pictures' values."""
    return int(np.abs(pictures.astype(int) - others.astype(int)).max())


def apart(pictures: np.ndarray, others: np.ndarray) -> float:
    """The mean difference of two pictures' values."""
    return float(np.abs(pictures.astype(int) - others.astype(int)).mean())


def test_pictures_are_of_the_models_own_size_and_not_flat(drawn: np.ndarray):
    assert (drawn.shape, drawn.dtype) == ((3, OWN, OWN, 3), np.uint8)
    assert min(picture.std() for picture in drawn) > 10


def test_a_picture_does_not_depend_on_its_batch(pipeline: Pipeline, drawn: np.ndarray):
    assert pipeline.drawing.shares == 8
    assert furthest(pipeline("a castle", seeds=1)[0], drawn[1]) <= 2
    eight = pipeline([*PROMPTS[::-1], *["a dog"] * 5], seeds=[2, 1, 0, *range(10, 15)])
    assert furthest(eight[:3], drawn[::-1]) <= 2


def test_a_picture_does_not_depend_on_the_number_of_devices(
    pipeline: Pipeline, drawn: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "choose_hardware", lambda hardware: jax.devices()[:1])
    alone = Pipeline.of(pipeline.config)
    assert (alone.layout.mesh.size, alone.drawing.shares) == (1, 1)
    assert furthest(alone("a castle", seeds=[1])[0], drawn[1]) <= 2


def test_prompts_and_seeds_each_change_the_picture_and_one_prompt_may_have_several_seeds(
    pipeline: Pipeline, drawn: np.ndarray
):
    same = pipeline("a red fox", seeds=[0, 1])
    assert furthest(same[0], drawn[0]) <= 2
    assert apart(same[1], drawn[1]) > 5  # another prompt, the same seed
    assert apart(same[1], same[0]) > 5  # another seed, the same prompt


def test_seeds_follow_from_the_config_where_none_are_given(pipeline: Pipeline, drawn: np.ndarray):
    first = dataclasses.replace(pipeline, config=merge(pipeline.config, {"seed": 1}))
    assert furthest(first(PROMPTS[1:]), drawn[1:]) <= 2


def test_a_prompt_object_and_changes_say_more_of_a_picture(pipeline: Pipeline, drawn: np.ndarray):
    assert apart(pipeline(Prompt("a red fox", negative_prompt="blurry"), seeds=0)[0], drawn[0]) > 1
    assert furthest(pipeline(Prompt("a red fox"), seeds=0)[0], drawn[0]) <= 2
    assert apart(pipeline("a red fox", seeds=0, guidance_scale=3.0)[0], drawn[0]) > 1
    assert pipeline.config.picture.guidance_scale == GenerateConfig().picture.guidance_scale
    assert apart(pipeline("a red fox", seeds=0, crops_coords_top_left=(300, 500))[0], drawn[0]) > 1


def test_loras_change_pictures_and_none_draws_as_before(pipeline: Pipeline, drawn: np.ndarray, tmp_path: Path):
    file = str(write_lora(tmp_path / "style.safetensors"))
    with_one = pipeline.with_loras({file: 1.0})
    assert with_one.config.lora_config.lora_model_name_or_path == (file,)
    strong = with_one("a red fox", seeds=0)[0]
    assert apart(strong, drawn[0]) > 5
    half = with_one.with_loras({file: 0.1})("a red fox", seeds=0)[0]  # of the model, not of what has one already
    assert 0 < apart(half, drawn[0]) < apart(strong, drawn[0])
    assert furthest(with_one.with_loras({})("a red fox", seeds=0)[0], drawn[0]) == 0
    assert furthest(pipeline("a red fox", seeds=0)[0], drawn[0]) == 0


def test_what_is_no_lora_of_the_model_is_refused(pipeline: Pipeline, tmp_path: Path):
    other = write_lora(tmp_path / "other.safetensors", key="unet.mid_block.attentions.7.proj_in")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        pipeline.with_loras({str(other): 1.0})
    with pytest.raises(ValueError, match=r"--lora-config\.lora-model-name-or-path"):
        pipeline.with_loras({str(tmp_path / "nowhere.safetensors"): 1.0})


def test_broken_weights_are_an_error_that_names_the_step(pipeline: Pipeline):
    unet = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, np.nan, x.dtype), x.sharding), pipeline.models.unet)
    broken = dataclasses.replace(pipeline, models=dataclasses.replace(pipeline.models, unet=unet))
    with pytest.raises(ValueError, match=r"not finite at step 1 \(timestep \d+\).*weights are broken"):
        broken("a red fox", seeds=0)


def test_a_broken_vae_is_an_error_too(pipeline: Pipeline):
    encoders = pipeline.models.encoders
    bias = jnp.full_like(encoders.vae.post_quant_conv.bias, jnp.nan)
    encoders = eqx.tree_at(lambda e: e.vae.post_quant_conv.bias, encoders, bias)
    models = dataclasses.replace(pipeline.models, encoders=encoders)
    with pytest.raises(ValueError, match="VAE gave pixels that are not finite in float32"):
        dataclasses.replace(pipeline, models=models)("a red fox", seeds=0)


def test_weights_that_overflow_in_float16_are_an_error_that_names_the_step_and_the_remedy(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    attend = jax.nn.dot_product_attention

    def in_float32(*qkv: jax.Array, **options: Any) -> jax.Array:  # the CPU has no float16 products of it
        return attend(*(x.astype(jnp.float32) for x in qkv), **options).astype(qkv[0].dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_float32)
    unet = pipeline.models.unet
    unet = eqx.tree_at(lambda unet: unet.conv_in.weight, unet, unet.conv_in.weight * 1e5)
    models = dataclasses.replace(pipeline.models, unet=unet)
    wide = dataclasses.replace(pipeline, models=models)
    half = dataclasses.replace(wide, drawing=dataclasses.replace(pipeline.drawing, dtype=jnp.dtype("float16")))
    assert wide("a red fox", seeds=0).std() > 1
    with pytest.raises(ValueError, match=r"not finite at step 1 \(timestep \d+\).*float16 overflowed: use bfloat16"):
        half("a red fox", seeds=0)
    assert dataclasses.replace(half, models=pipeline.models)("a red fox", seeds=0).std() > 1


def test_float16_is_refused_on_cpu_before_the_model_is_read(folder: Path):
    with pytest.raises(ValueError, match=r"--activations-dtype float16: .* on CPU; use float32 or bfloat16"):
        Pipeline.load(str(folder / "nowhere"), activations_dtype="float16")


@pytest.mark.parametrize(
    ("key", "word"), [("vae_dtype", "float16"), ("activations_dtype", "float64"), ("precision", "high")]
)
def test_a_word_that_a_flag_does_not_take_is_refused_with_those_that_it_takes(folder: Path, key: str, word: str):
    name = key.replace("_", "-")
    with pytest.raises(ValueError, match=rf"^--{name} '{word}': must be one of '\w+'"):
        Pipeline.load(str(folder), **{key: word})
    with pytest.raises(SystemExit):
        parse_generate([f"--{name}", word])


def test_fresh_noise_of_a_model_whose_own_sampler_has_none_is_refused(pipeline: Pipeline, drawn: np.ndarray):
    with pytest.raises(ValueError, match=r"--eta 0\.5: .* EulerDiscreteScheduler.*_class-name DDIM"):
        pipeline("a red fox", seeds=0, eta=0.5)
    # Of one that was named, the command line has said it.
    named = merge(pipeline.config, {"diffusion_scheduler_config._class_name": "Euler"})
    assert dataclasses.replace(pipeline, config=named).manner(merge(named, {"eta": 0.5})).eta == 0.5
    scheduler = dataclasses.replace(pipeline.models.scheduler, name="DDIMScheduler")
    ddim = dataclasses.replace(pipeline, models=dataclasses.replace(pipeline.models, scheduler=scheduler))
    assert ddim.manner(merge(pipeline.config, {"eta": 0.5})).eta == 0.5


# Memory

TOO_MUCH = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")


@pytest.mark.parametrize("error", [TOO_MUCH, MemoryError()])
def test_pictures_that_do_not_fit_are_an_error_that_says_what_would(
    error: Exception, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(module, "generate", full)
    with pytest.raises(OutOfMemory) as said:
        pipeline([*PROMPTS] * 3, seeds=list(range(9)), width=32)
    parts = ["16 pictures at once of 32x16 does not fit", "a smaller --batch-size", "--width and --height",
             "--vae-tile 512", "--activations-dtype bfloat16", "--ici-fsdp-parallelism"]  # fmt: skip
    assert all(part in str(said.value) for part in parts), str(said.value)
    assert "\n" not in str(said.value)
    with pytest.raises(OutOfMemory) as said:
        pipeline("a fox", seeds=0, width=2056, height=2048)
    assert "--batch-size" not in str(said.value) and "a smaller --vae-tile" in str(said.value)


def test_a_model_that_does_not_fit_is_one_too_and_another_error_stays_what_it_is(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    errors: list[Exception] = [TOO_MUCH, TOO_MUCH, jax.errors.JaxRuntimeError("INTERNAL: something else")]

    def full(*args: Any, **options: Any) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(module, "lay_out", full)
    config = merge(pipeline.config, {"activations_dtype": "bfloat16"})
    with pytest.raises(OutOfMemory, match=r"the model does not fit; use more devices with --ici-fsdp-parallelism \("):
        Pipeline.of(config)
    with pytest.raises(OutOfMemory, match="--activations-dtype bfloat16"):
        pipeline.with_loras({})
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        Pipeline.of(config)


@pytest.mark.parametrize(
    ("prompts", "seeds", "said"),
    [(["a", "b"], [1, 2, 3], "3 seeds for 2 prompts"), (["a", "b"], 1, "1 seeds for 2 prompts")],
)
def test_there_must_be_a_seed_for_each_prompt(
    pipeline: Pipeline, prompts: list[str], seeds: int | list[int], said: str
):
    with pytest.raises(ValueError, match=said):
        pipeline(prompts, seeds=seeds)


def test_hints_without_controlnets_and_a_mask_without_a_picture_are_refused(pipeline: Pipeline):
    grey = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="1 pictures for 0 ControlNets"):
        pipeline("a", hints=[grey])
    with pytest.raises(ValueError, match="a mask needs the picture"):
        pipeline("a", mask=grey[:, :, 0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 12}, "--width 12: must be a multiple of 8"),
        ({"guidance_scale": -1.0}, "--guidance-scale -1.0"),
        ({"num_inference_steps": 0}, "--num-inference-steps 0"),
    ],
)
def test_changes_keep_the_rules_of_the_flags(pipeline: Pipeline, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        pipeline("a", **changes)


def test_a_change_that_there_is_not_is_an_error(pipeline: Pipeline):
    with pytest.raises(TypeError, match="stepps"):
        pipeline("a", stepps=3)


def test_load_takes_flags_and_refuses_others(folder: Path):
    with pytest.raises(TypeError, match=r"Pipeline\.load has no learning_rate, widht; .*--help"):
        Pipeline.load(str(folder), widht=8, learning_rate=1.0)
    with pytest.raises(ValueError, match="--num-inference-steps 0"):
        Pipeline.load(str(folder), num_inference_steps=0)
    with pytest.raises(ValueError, match="nowhere"):
        Pipeline.load(str(folder / "nowhere"))
    with pytest.raises(ValueError, match="asset:nothing"):
        Pipeline.load("asset:nothing")


def test_the_size_is_what_was_asked_for_or_the_models_own(pipeline: Pipeline):
    assert pipeline.size == (OWN, OWN)
    assert dataclasses.replace(pipeline, config=merge(pipeline.config, {"width": 40})).size == (OWN, 40)
