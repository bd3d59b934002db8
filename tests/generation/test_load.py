"""What cannot be drawn with is refused by the real loader, with flag and reason; few-step files are known."""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import parity_models as tiny
import pytest
import small_models as small
from safetensors.numpy import load_file, save_file

from sdxl_eqx.config import GenerateConfig
from sdxl_eqx.flags import merge
from sdxl_eqx.generation import Pipeline
from sdxl_eqx.generation import pipeline as generation
from sdxl_eqx.generation.distilled import few_steps
from sdxl_eqx.generation.load import check_controlnet, lora_files, read_controlnets, read_parts
from sdxl_eqx.models.controlnet import ControlNet, ControlNetConfig
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.sampling.conditioning import Prompt
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.weights.folder import write_json
from sdxl_eqx.weights.write import write_model

SIZE = (32, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_base(tmp_path_factory.mktemp("models") / "base")


def config_of(folder: Path, **flags: Any) -> GenerateConfig:
    """Flags as the script has them."""
    return merge(GenerateConfig(), {"pretrained_model_name_or_path": str(folder), **flags})


def load(folder: Path, **flags: Any) -> Pipeline:
    """The pipeline on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "choose_hardware", lambda _: jax.devices()[:1])
        return Pipeline.load(str(folder), activations_dtype="float32", **flags)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return load(folder)


@pytest.fixture(scope="module")
def steered(pipeline: Pipeline) -> Pipeline:
    """With a ControlNet, of which the shapes do."""
    net = eqx.filter_eval_shape(ControlNet, small.CONTROLNET, key=jr.key(0))
    return dataclasses.replace(pipeline, controlnets=[net])


TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"

OTHER_FAMILIES = {
    "Stable Diffusion 1 or 2": {"lora_te_text_model_encoder_layers_0_mlp_fc1": (64, 32)},
    "reads text of width 768": {f"unet.{TO_Q}": (48, 768)},
    "transformer_blocks_7": {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_7_attn1_to_q": (48, 48)},
    "do not fit the model's weight": {f"unet.{TO_Q}": (96, 80)},
}


@pytest.mark.parametrize("said", OTHER_FAMILIES)
def test_a_lora_of_another_model_is_refused_by_its_keys(said: str, folder: Path, tmp_path: Path):
    shapes = OTHER_FAMILIES[said]
    file = tmp_path / "lora.safetensors"
    save_file(small.lora_tensors(shapes, (".lora_down.weight", ".lora_up.weight"), 2), file)
    with pytest.raises(ValueError) as refused:
        read_parts(config_of(folder, **{"lora_config.lora_model_name_or_path": (str(file),)}))
    (module,) = shapes
    assert said in str(refused.value) and module.removeprefix("unet.") in str(refused.value)
    assert str(file) in str(refused.value)


def test_a_folder_of_several_loras_wants_a_name(tmp_path: Path):
    for name in ("a", "b"):
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    config = merge(GenerateConfig(), {"lora_config.lora_model_name_or_path": (str(tmp_path),)}).lora_config
    with pytest.raises(ValueError, match=r"a\.safetensors, b\.safetensors"):
        lora_files(config)
    named = dataclasses.replace(config, weight_name=("b.safetensors",), scale=(0.5,))
    assert lora_files(named) == [(tmp_path / "b.safetensors", 0.5)]
    with pytest.raises(ValueError, match=r"has no file 'c\.safetensors'"):
        lora_files(dataclasses.replace(config, weight_name=("c.safetensors",)))


def other_widths(**changes: Any) -> ControlNetConfig:
    """A ControlNet of another UNet."""
    return dataclasses.replace(small.CONTROLNET, unet=dataclasses.replace(tiny.UNET, **changes))


@pytest.mark.parametrize(
    ("said", "net"),
    [
        ("in_channels 8", other_widths(in_channels=8)),
        ("channels of its residuals", other_widths(block_out_channels=(32, 64, 64))),
        ("channels of its residuals", other_widths(layers_per_block=2)),
        ("cross_attention_dim 64", other_widths(cross_attention_dim=64)),
        ("width of pooled text 48", other_widths(projection_class_embeddings_input_dim=96)),
        ("conditioning_channels 1", dataclasses.replace(small.CONTROLNET, conditioning_channels=1)),
    ],
)
def test_a_controlnet_of_another_model_is_refused(said: str, net: ControlNetConfig):
    with pytest.raises(ValueError, match=f"its name: {said}"):
        check_controlnet(net, tiny.UNET, "its name")
    check_controlnet(small.CONTROLNET, tiny.UNET, "its name")
    check_controlnet(small.CONTROLNET, small.INPAINTING, "its name")


def test_a_folder_that_is_no_controlnet_is_refused(folder: Path, pipeline: Pipeline):
    config = config_of(folder, controlnet_model_name_or_path=(str(folder / "unet"),))
    with pytest.raises(ValueError, match=r"--controlnet-model-name-or-path.*is no ControlNet"):
        read_controlnets(config, pipeline.parts, pipeline.layout)


def test_a_base_model_is_no_refiner(folder: Path):
    with pytest.raises(ValueError, match=r"--refiner-model-name-or-path.*context of 80 and 6 time ids.*\(48\) and 5"):
        load(folder, refiner_model_name_or_path=str(folder))


def test_a_vae_of_other_channels_is_refused(folder: Path, tmp_path: Path):
    config = dataclasses.replace(tiny.VAE_CONFIG, latent_channels=8)
    write_json(config.to_json(), tmp_path / "config.json")
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    write_model(tiny.filled(VAE, config), config.to_json(), weights, dtype=np.float32)
    with pytest.raises(ValueError, match=r"--vae-checkpoint.*has 8 latent channels, the model 4"):
        read_parts(config_of(folder, vae_checkpoint=str(tmp_path)))


@pytest.mark.parametrize("flags", [{"width": 60}, {"height": 1020}, {"height": -8}])
def test_sides_that_are_no_multiples_of_8_are_refused(flags: dict[str, Any], folder: Path, pipeline: Pipeline):
    (name,) = flags
    with pytest.raises(ValueError, match=rf"--{name} {flags[name]}: must be a multiple of 8"):
        load(folder, **flags)
    with pytest.raises(ValueError, match=rf"--{name} {flags[name]}: must be a multiple of 8"):
        pipeline("a cat", seeds=0, **flags)


def test_each_controlnet_wants_one_picture(pipeline: Pipeline, steered: Pipeline):
    seen = small.picture(SIZE)
    with pytest.raises(ValueError, match="1 pictures for 0 ControlNets"):
        pipeline("a cat", seeds=0, hints=[seen])
    for hints in ([], [seen, seen]):
        with pytest.raises(ValueError, match=f"{len(hints)} pictures for 1 ControlNets"):
            steered("a cat", seeds=0, hints=hints)


def test_a_mask_wants_the_picture_it_belongs_to(pipeline: Pipeline):
    with pytest.raises(ValueError, match="a mask needs the picture"):
        pipeline("a cat", seeds=0, mask=small.mask(SIZE))


def test_prompts_and_seeds_that_do_not_pair_are_refused(pipeline: Pipeline):
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        pipeline(["a cat", Prompt("a dog")], seeds=[1, 2, 3])
    with pytest.raises(TypeError, match="has no imagined"):
        load(Path("nowhere"), imagined=1)


def test_zero_terminal_snr_does_not_go_with_epsilon(folder: Path, pipeline: Pipeline):
    flags = {"_class_name": "DDIM", "rescale_zero_terminal_snr": True, "timestep_spacing": "trailing"}
    config = config_of(folder, **{f"diffusion_scheduler_config.{key}": value for key, value in flags.items()})
    scheduler = Scheduler.from_json(read_parts(config)[0].scheduler)
    changed = dataclasses.replace(pipeline, models=dataclasses.replace(pipeline.models, scheduler=scheduler))
    with pytest.raises(ValueError, match=r"DDIMScheduler.*pure noise.*prediction_type='v_prediction'"):
        changed("a cat", seeds=0, num_inference_steps=2, height=32, width=32)


def test_a_run_without_an_export_is_no_model(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="this run has no export/ yet; finish it, or name the model"):
        read_parts(config_of(tmp_path))


def test_a_few_step_file_is_taken_for_what_is_in_it(folder: Path, tmp_path: Path):
    unet, lora = tmp_path / "light_4step_unet.safetensors", tmp_path / "light_8step_lora.safetensors"
    base = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({name: 1 + value for name, value in base.items()}, unet)
    save_file(small.lora_tensors({f"unet.{TO_Q}": (48, 80)}, (".lora_A.weight", ".lora_B.weight"), 2), lora)
    flags = {"lightning_repo": str(tmp_path), "lightning_ckpt": unet.name}
    parts, few = read_parts(config_of(folder, **flags))
    assert few is not None and few.steps == 4
    assert parts.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert parts.scheduler["timestep_spacing"] == "trailing"
    other = {"_class_name": "DDIM", "timestep_spacing": "leading"}
    asked = read_parts(config_of(folder, **flags, **{f"diffusion_scheduler_config.{k}": v for k, v in other.items()}))[
        0
    ]
    assert [asked.scheduler[key] for key in other] == ["DDIMScheduler", "leading"]
    key = f"{TO_Q}.weight"
    np.testing.assert_array_equal(parts.model.parts["unet"][key].read(), 1 + base[key])
    parts, few = read_parts(config_of(folder, **{**flags, "lightning_ckpt": lora.name}))
    tensors = load_file(lora)
    change = tensors[f"unet.{TO_Q}.lora_B.weight"] @ tensors[f"unet.{TO_Q}.lora_A.weight"]
    assert few is not None and few.steps == 8
    np.testing.assert_allclose(parts.model.parts["unet"][key].read(), base[key] + change, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="leave one of them out"):
        read_parts(config_of(folder, **flags, unet_checkpoint=str(folder / "unet")))


@pytest.mark.parametrize(
    ("file", "steps", "scheduler", "timesteps"),
    [
        ("sdxl_lightning_4step_unet.safetensors", 4, "EulerDiscreteScheduler", ()),
        ("sdxl_lightning_8step_lora.safetensors", 8, "EulerDiscreteScheduler", ()),
        ("Hyper-SDXL-2steps-lora.safetensors", 2, "DDIMScheduler", ()),
        ("Hyper-SDXL-1step-lora.safetensors", 1, "LCMScheduler", (800,)),
    ],
)
def test_a_few_step_files_name_says_how_it_is_drawn_with(
    file: str, steps: int, scheduler: str, timesteps: tuple[int, ...]
):
    few = few_steps(file)
    assert few is not None
    assert (few.steps, few.scheduler["_class_name"], few.timesteps) == (steps, scheduler, timesteps)
    assert "prediction_type" not in few.scheduler


def test_lightnings_single_step_predicts_the_picture_and_other_names_say_nothing():
    few = few_steps("sdxl_lightning_1step_unet_x0.safetensors")
    assert few is not None and few.scheduler["prediction_type"] == "sample"
    assert few_steps("sdxl_vae.safetensors") is None
