"""Every format to every other, and what is put in on the way: another UNet, another VAE, LoRAs, a run's weights."""

import dataclasses
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_run import UNET

from sdxl_eqx.config import DiffusionSchedulerConfig, ModelConfig, ParallelConfig, TrainConfig, flat
from sdxl_eqx.conversion import ConvertConfig, convert, whole_model
from sdxl_eqx.flags import merge
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.models.controlnet import ControlNet, ControlNetConfig
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.checkpoint import Checkpoints, Saved
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.optimizer import make_optimizer
from sdxl_eqx.training.state import TrainState, new_state
from sdxl_eqx.weights import ldm
from sdxl_eqx.weights.folder import write_folder
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.native import Item, write_native
from sdxl_eqx.weights.open import open_safetensors
from sdxl_eqx.weights.single_file import METADATA, write_single_file
from sdxl_eqx.weights.tensors import Tensor, Tensors
from sdxl_eqx.weights.write import file_tensors, write_model

NAMES = {"diffusers": "folder", "single-file": "one.safetensors", "native": "native"}
UNET_KEY = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight"
"""A slice of a stack."""


def sums(model: Model) -> dict[str, str]:
    """sha256 of dtype, shape and bytes of every tensor."""
    found = {}
    for part, tensors in model.parts.items():
        for key, tensor in tensors.items():
            x = np.ascontiguousarray(tensor.read())
            found[f"{part}.{key}"] = hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()
    return found


def opened(src: Path | str, **more: Any) -> Model:
    return whole_model(ConvertConfig(src=str(src), dst="", **more))


def converted(src: Path | str, dst: Path, **more: Any) -> Path:
    convert(ConvertConfig(src=str(src), dst=str(dst), **more))
    return dst


def changed(model: Path, to: Path, part: str, tensors: dict[str, np.ndarray]) -> Path:
    """A copy of a diffusers folder with other tensors in a part."""
    shutil.copytree(model, to)
    (file,) = (to / part).glob("*.safetensors")
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, file)
    return to


@pytest.fixture(scope="module")
def mixed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with each part in a dtype of its own, as people's files have them."""
    import ml_dtypes

    whole = opened(model)
    kinds = {"unet": np.float16, "vae": np.float32, "text_encoder": ml_dtypes.bfloat16, "text_encoder_2": np.float16}
    parts = {
        part: {key: tensor.cast(np.dtype(kinds[part])) for key, tensor in tensors.items()}
        for part, tensors in whole.parts.items()
    }
    folder = tmp_path_factory.mktemp("mixed") / "model"

    def save_tokenizers(to: Path) -> None:
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(model / name, to / name)

    write_folder(dataclasses.replace(whole, parts=parts), folder, save_tokenizers=save_tokenizers)
    return folder


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES, 2)))
def test_every_format_through_every_other_is_bit_equal(first: Any, second: Any, mixed: Path, tmp_path: Path):
    a = converted(mixed, tmp_path / "a" / NAMES[first], to=first)
    b = converted(a, tmp_path / "b" / NAMES[second], to=second)
    back = converted(b, tmp_path / "back")
    before, after = opened(mixed), opened(back)
    assert sums(before) == sums(after) == sums(opened(a)) == sums(opened(b))
    assert before.configs == after.configs
    assert (back / "tokenizer" / "merges.txt").read_bytes() == (mixed / "tokenizer" / "merges.txt").read_bytes()


def test_the_native_format_has_our_layout_and_says_what_it_is(model: Path, tmp_path: Path):
    folder = converted(model, tmp_path / "native", to="native")
    ours = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    item = Item(folder / "unet")
    np.testing.assert_array_equal(item.read("conv_in.weight"), ours["conv_in.weight"].transpose(2, 3, 1, 0))
    stack = item.read(UNET_KEY.replace(".1.attn2", ".attn2"))
    np.testing.assert_array_equal(stack[1], ours[UNET_KEY])
    file = folder / "sdxl_eqx.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        opened(folder)


def test_a_native_folder_that_lost_something_is_named(model: Path, tmp_path: Path):
    folder = converted(model, tmp_path / "native", to="native")
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="vae: has a config but no"):
        opened(folder)
    (folder / "vae").mkdir()
    with pytest.raises(ValueError, match="is no whole Orbax item"):
        opened(folder)


@pytest.mark.parametrize("to", ["diffusers", "single-file", "native"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(
    to: Any, value: float, model: Path, tmp_path: Path
):
    tensors = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    tensors[UNET_KEY][3, 5] = value
    bad = changed(model, tmp_path / "bad", "unet", tensors)
    with pytest.raises(ValueError, match=r"attn2\.to_k\.weight: holds NaN or infinity"):
        converted(bad, tmp_path / "to" / NAMES[to], to=to)
    assert not list((tmp_path / "to").iterdir())


def test_a_number_too_large_for_the_dtype_is_named(model: Path, tmp_path: Path):
    tensors = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_in.weight"][0, 0, 0, 0] = 1e5
    big = changed(model, tmp_path / "big", "vae", tensors)
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight: holds NaN or infinity in float16"):
        converted(big, tmp_path / "out", dtype="float16")
    converted(big, tmp_path / "out", dtype="bfloat16")


def test_a_stack_of_several_dtypes_is_refused_by_the_native_format_alone(model: Path, tmp_path: Path):
    tensors = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    tensors[UNET_KEY] = tensors[UNET_KEY].astype(np.float16)
    odd = changed(model, tmp_path / "odd", "unet", tensors)
    with pytest.raises(ValueError, match=r"its blocks have \['float16', 'float32'\]; give --dtype"):
        converted(odd, tmp_path / "native", to="native")
    assert opened(converted(odd, tmp_path / "x.safetensors", to="single-file")).parts["unet"][UNET_KEY].dtype == "f2"
    converted(odd, tmp_path / "native", to="native", dtype="float32")


def test_a_tensor_under_two_names_is_refused(model: Path, tmp_path: Path):
    one = load_file(converted(model, tmp_path / "one.safetensors", to="single-file"))
    one["model.diffusion_model.conv_in.weight"] = one["model.diffusion_model.input_blocks.0.0.weight"]
    save_file(one, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"conv_in\.weight is held twice"):
        opened(tmp_path / "two.safetensors", config_from=str(model))


def test_a_single_file_may_lack_the_prefix_of_its_first_text_encoder(model: Path, tmp_path: Path):
    """As diffusers' script makes it of what transformers 5 saves."""
    one = load_file(converted(model, tmp_path / "one.safetensors", to="single-file"))
    save_file(
        {key.replace(f"{ldm.TEXT}text_model.", ldm.TEXT): x for key, x in one.items()}, tmp_path / "bare.safetensors"
    )
    assert sums(opened(tmp_path / "bare.safetensors", config_from=str(model))) == sums(opened(model))


NAMED = st.sampled_from(
    ["unet", "vae", "block_out_channels", "attention_head_dim", "down_block_types", "layers_per_block"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMED, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=100)
@given(ANYTHING)
def test_configs_of_any_kind_in_a_files_metadata_never_end_in_a_traceback(stored: Any):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        x = np.zeros((4, 4, 3, 3), np.float32)
        keys = ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight")
        save_file(dict.fromkeys(keys, x), file, metadata={METADATA: json.dumps(stored)})
        with pytest.raises(ValueError):
            opened(file)


@pytest.mark.parametrize(
    "names", [["novel.txt"], ["config.json", "thesis.tex"], ["unet/config.json", "checkpoints/mine.safetensors"],
              ["unet/notes/mine.txt"]],
)  # fmt: skip
def test_only_a_model_is_replaced(names: list[str], model: Path, tmp_path: Path):
    mine = tmp_path / "mine"
    for name in names:
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("precious")
    with pytest.raises(ValueError, match="which no conversion wrote, so it is not replaced"):
        converted(model, mine, overwrite=True)
    assert all((mine / name).read_text() == "precious" for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_model_is_replaced_by_one_in_another_format_and_through_a_link(model: Path, tmp_path: Path):
    there = converted(model, tmp_path / "there", to="native")
    (tmp_path / "link").symlink_to(there)
    converted(model, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (there / "model_index.json").is_file() and not (there / "sdxl_eqx.json").exists()
    converted(there, there, overwrite=True, dtype="float16")
    assert opened(there).parts["unet"][UNET_KEY].dtype == np.float16
    assert {path.name for path in tmp_path.iterdir()} == {"link", "there"}


def test_a_folder_that_holds_what_is_read_is_not_replaced(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "hub")
    file = converted(model, tmp_path / "hub" / "one.safetensors", to="single-file")
    for more in ({}, {"unet": str(tmp_path / "hub" / "unet")}):
        source = file if not more else model
        with pytest.raises(ValueError, match="which is read, so it is not replaced"):
            converted(source, tmp_path / "hub", overwrite=True, **more)
    assert file.is_file()


def test_what_a_killed_conversion_left_is_cleared_and_what_it_was_replacing_comes_back(model: Path, tmp_path: Path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    pid = dead.stdout.strip()
    (tmp_path / f".out.{pid}.part").mkdir()
    (tmp_path / f".one.safetensors.{pid}.part").write_text("half")
    (tmp_path / f".other.{pid}.part").write_text("not ours")
    shutil.copytree(model, tmp_path / f".out.{pid}.old")
    with pytest.raises(ValueError, match="holds NaN"):
        bad = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
        bad["conv_in.bias"][0] = np.nan
        converted(changed(model, tmp_path / "bad", "unet", bad), tmp_path / "out", dtype="float16")
    assert sums(opened(tmp_path / "out")) == sums(opened(model))
    converted(model, tmp_path / "one.safetensors", to="single-file")
    assert {path.name for path in tmp_path.iterdir()} == {f".other.{pid}.part", "bad", "out", "one.safetensors"}


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_without_its_config_or_its_folder_is_missed(part: str, model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / part / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"{part}/config\.json: missing"):
        opened(tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / part)
    with pytest.raises(ValueError, match=rf"names {part}, and there is no {part}/"):
        opened(tmp_path / "m")


@pytest.mark.parametrize("to", list(NAMES))
def test_what_an_absent_negative_prompt_means_goes_through_every_format(to: Any, model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "m")
    file = tmp_path / "m" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "force_zeros_for_empty_prompt": False}))
    back = converted(converted(tmp_path / "m", tmp_path / NAMES[to], to=to), tmp_path / "back")
    assert json.loads((back / "model_index.json").read_text()) == json.loads(file.read_text())


@pytest.mark.parametrize("to", list(NAMES))
def test_both_markers_of_the_schedule_go_through_every_format(to: Any, model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    one = converted(tmp_path / "m", tmp_path / NAMES[to], to=to)
    assert opened(one).configs["scheduler"] == json.loads(file.read_text())
    if to == "single-file":
        foreign = tmp_path / "foreign.safetensors"
        save_file(load_file(one), foreign)
        assert {"v_pred", "ztsnr"} <= load_file(foreign).keys()
        assert opened(foreign, config_from=str(model)).configs["scheduler"]["prediction_type"] == "epsilon"
        parts = {k: v for k, v in opened(model).configs.items() if k != "scheduler"}
        found = open_safetensors(foreign, configs=parts)
        assert said.items() <= found.configs["scheduler"].items() and not found.left_out


def test_a_refiner_is_a_pipeline_of_its_own(model: Path, tmp_path: Path):
    whole = opened(model)
    parts = {part: tensors for part, tensors in whole.parts.items() if part != "text_encoder"}
    write_single_file(dataclasses.replace(whole, parts=parts, index=None), tmp_path / "refiner.safetensors")
    out = converted(tmp_path / "refiner.safetensors", tmp_path / "out")
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline" and index["requires_aesthetics_score"] is True
    assert index["text_encoder"] == index["tokenizer"] == [None, None] != index["tokenizer_2"]


def test_a_unet_that_says_what_it_predicts_takes_its_schedule_along(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tensors = {f"model.diffusion_model.{key}": x for key, x in sgm_unet(model).items()}
    save_file({**tensors, "v_pred": np.zeros(0, np.float16)}, tmp_path / "v.safetensors")
    save_file(tensors, tmp_path / "silent.safetensors")
    out = converted(model, tmp_path / "out", unet=str(tmp_path / "v.safetensors"))
    assert opened(out).configs["scheduler"]["prediction_type"] == "v_prediction"
    caplog.set_level("INFO", "sdxl_eqx")
    assert parts_of(model, unet_checkpoint=str(tmp_path / "v.safetensors")).schedule.prediction_type == "v_prediction"
    assert "a UNet of v_prediction (the model's: epsilon)" in caplog.text
    assert (
        parts_of(out, unet_checkpoint=str(tmp_path / "silent.safetensors")).schedule.prediction_type == "v_prediction"
    )


def sgm_unet(model: Path) -> dict[str, np.ndarray]:
    lazy = {key: Tensor.of(x) for key, x in another_unet(model).items()}
    return {key: t.read() for key, t in ldm.renamed(lazy, ldm.unet_rules(UNET), to_file=True).items()}


def test_a_vae_alone_goes_into_a_file_and_back(model: Path, tmp_path: Path):
    file = converted(model / "vae", tmp_path / "vae.safetensors", to="single-file")
    assert "encoder.mid.attn_1.q.weight" in load_file(file)
    back = opened(converted(file, tmp_path / "back"))
    assert sums(back) == {key: x for key, x in sums(opened(model)).items() if key.startswith("vae.")}


def test_a_lora_in_a_wider_dtype_is_rounded_once(model: Path, tmp_path: Path):
    save_file(lora_tensors(4), tmp_path / "a.safetensors")
    half = converted(model, tmp_path / "half", dtype="float16")
    lora = (str(tmp_path / "a.safetensors"),)
    wide = opened(half, lora=lora, dtype="float32")
    exact = opened(converted(half, tmp_path / "wide", dtype="float32"), lora=lora)
    assert sums(wide) == sums(exact)
    with pytest.raises(ValueError, match="--lora-scale: there is no --lora"):
        opened(model, lora_scale=(1.0,))


@pytest.mark.parametrize(
    ("src", "given"),
    [
        ("file", {"step": 1}), ("file", {"variant": "fp16"}), ("file", {"revision": "x"}), ("folder", {"ema": False}),
        ("folder", {"config_from": "x"}), ("native", {"from_pt": False}),
    ],
)  # fmt: skip
def test_a_flag_that_the_source_has_no_use_for_is_refused(src: str, given: Any, model: Path, tmp_path: Path):
    to = {"file": "single-file", "folder": "diffusers", "native": "native"}[src]
    source = model if src == "folder" else converted(model, tmp_path / NAMES[to], to=to)
    given = {key: str(model) if value == "x" and key == "config_from" else value for key, value in given.items()}
    with pytest.raises(ValueError, match=rf"--{next(iter(given)).replace('_', '-')} .*has no meaning for SRC"):
        opened(source, **given)


def test_weights_that_are_no_floating_point_numbers_are_named(model: Path, tmp_path: Path):
    tensors = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    tensors["conv_in.weight"] = tensors["conv_in.weight"].astype(np.int32)
    with pytest.raises(ValueError, match=r"conv_in\.weight has dtype int32"):
        opened(changed(model, tmp_path / "m", "unet", tensors))


@pytest.mark.parametrize(
    ("to", "name", "said"),
    [
        ("single-file", "folder", "is named *.safetensors"),
        ("diffusers", "x.safetensors", "give --to single-file"),
        ("native", "x.safetensors", "writes a folder"),
        ("peft", "folder", "is named *.safetensors"),
    ],
)
def test_a_destination_of_the_wrong_kind_is_refused(to: Any, name: str, said: str, model: Path, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        converted(model, tmp_path / name, to=to)
    assert said in str(error.value)


def another_unet(model: Path) -> dict[str, np.ndarray]:
    """The model's UNet with other numbers."""
    tensors = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    return {key: (x + 0.25).astype(np.float16) for key, x in tensors.items()}


@pytest.mark.parametrize("layout", ["diffusers", "stability"])
def test_a_lightning_unet_replaces_the_unet_and_keeps_the_rest(layout: str, model: Path, tmp_path: Path):
    """The file holds no config: it is of the model that it is put into."""
    tensors = another_unet(model)
    file = tmp_path / "lightning_4step_unet.safetensors"
    if layout == "stability":
        lazy = {key: Tensor.of(x) for key, x in tensors.items()}
        tensors = {key: t.read() for key, t in ldm.renamed(lazy, ldm.unet_rules(UNET), to_file=True).items()}
    save_file(tensors, file)
    found = opened(converted(model, tmp_path / "out", unet=str(file)))
    before = opened(model)
    want = {f"unet.{key}": hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()
            for key, x in another_unet(model).items()}  # fmt: skip
    assert sums(found) == {**sums(before), **want}
    assert found.configs == before.configs


def parts_of(name: Path | str, **more: Any) -> ModelParts:
    config = ModelConfig(pretrained_model_name_or_path=str(name), **more)
    return ModelParts.read(config, DiffusionSchedulerConfig(), token="")


def leaves(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def loaded(model: Path) -> list[bytes]:
    """Every array that training begins with from the folder."""
    config = ModelConfig(pretrained_model_name_or_path=str(model))
    layout = Layout(make_mesh(ParallelConfig(), jax.devices()[:1]))
    parts = parts_of(model)
    return leaves((parts.new_unet(config, layout, key=jr.key(0)), parts.encoders(config, layout, key=jr.key(0))))


@pytest.mark.parametrize("to", list(NAMES))
def test_training_begins_from_any_format_with_the_same_weights_on_any_mesh(
    to: Any, model: Path, loaded: list[bytes], tmp_path: Path
):
    name = converted(model, tmp_path / NAMES[to], to=to)
    parts = parts_of(name)
    assert parts.unet == UNET and parts.schedule == parts_of(model).schedule
    ids = parts.tokenize(["a cat!", ""])
    assert all(np.array_equal(a, b) for a, b in zip(ids, parts_of(model).tokenize(["a cat!", ""]), strict=True))
    config = ModelConfig(pretrained_model_name_or_path=str(name))
    layout = Layout(make_mesh(ParallelConfig(ici_fsdp_parallelism=4), jax.devices()))
    unet = parts.new_unet(config, layout, key=jr.key(0))
    assert leaves((unet, parts.encoders(config, layout, key=jr.key(0)))) == loaded
    assert {x.sharding.mesh.size for x in jax.tree.leaves(unet)} == {8}


def test_training_begins_from_another_unet(model: Path, tmp_path: Path):
    save_file(another_unet(model), tmp_path / "other.safetensors")
    config = ModelConfig(pretrained_model_name_or_path=str(model), unet_checkpoint=str(tmp_path / "other.safetensors"))
    parts = ModelParts.read(config, DiffusionSchedulerConfig(), token="")
    layout = Layout(make_mesh(ParallelConfig(), jax.devices()[:1]))
    unet = parts.new_unet(config, layout, key=jr.key(0))
    ours = {k: t.read() for k, t in file_tensors(unet, dtype=np.float32).items()}
    for key, x in another_unet(model).items():
        np.testing.assert_array_equal(ours[key], x.astype(np.float32))


def test_a_unet_checkpoint_without_a_unet_and_a_unet_as_a_model_are_refused(model: Path, tmp_path: Path):
    vae = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"--unet-checkpoint .*has no UNet but vae"):
        parts_of(model, unet_checkpoint=str(tmp_path / "vae.safetensors"))
    save_file(another_unet(model), tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="holds a UNet alone; name a whole model there, and this with --unet-check"):
        parts_of(tmp_path / "unet.safetensors")


def test_a_nan_in_a_model_that_training_loads_is_named(model: Path, tmp_path: Path):
    tensors = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    tensors["conv_in.bias"][0] = np.nan
    bad = changed(model, tmp_path / "bad", "unet", tensors)
    layout = Layout(make_mesh(ParallelConfig(), jax.devices()[:1]))
    with pytest.raises(ValueError, match=r"\(unet\): conv_in\.bias: holds NaN"):
        parts_of(bad).new_unet(ModelConfig(pretrained_model_name_or_path=str(bad)), layout, key=jr.key(0))


def test_a_single_file_without_a_vae_takes_the_one_that_is_put_in(model: Path, tmp_path: Path):
    whole = opened(model)
    without = dataclasses.replace(whole, parts={p: t for p, t in whole.parts.items() if p != "vae"})
    file = tmp_path / "no_vae.safetensors"
    write_single_file(without, file)
    bare = converted(file, tmp_path / "bare")
    assert json.loads((bare / "model_index.json").read_text())["vae"] == [None, None]
    with pytest.raises(ValueError, match=r"no_vae\.safetensors: has no vae; .*--vae"):
        parts_of(file)
    theirs = tmp_path / "vae_in_stability_ais_names.safetensors"  # no file of a VAE says how it is built
    one = load_file(converted(model, tmp_path / "one.safetensors", to="single-file"))
    save_file({k.removeprefix(ldm.VAE): x for k, x in one.items() if k.startswith(ldm.VAE)}, theirs)
    for vae in (theirs, model / "vae", model):
        shutil.rmtree(tmp_path / "whole", ignore_errors=True)
        found = opened(converted(file, tmp_path / "whole", vae=str(vae), config_from=str(model)))
        assert sums(found) == sums(whole)


def test_a_controlnet_goes_from_folder_to_file_and_back(tmp_path: Path):
    config = ControlNetConfig(UNET)
    shapes = eqx.filter_eval_shape(ControlNet, config, key=jr.key(0))
    rng = np.random.default_rng(0)
    net = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float16), shapes)
    folder = tmp_path / "controlnet"
    write_model(net, config.to_json(), folder / "diffusion_pytorch_model.safetensors", dtype=np.float16)
    file = converted(folder, tmp_path / "controlnet.safetensors", to="single-file")
    back = converted(file, tmp_path / "back")
    assert sums(opened(back)) == sums(opened(file)) == sums(opened(folder))
    assert json.loads((back / "config.json").read_text()) == config.to_json()
    ours = converted(folder, tmp_path / "native", to="native")
    assert sums(opened(ours)) == sums(opened(folder))


def lora_tensors(rank: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A LoRA of two layers under kohya's names."""
    rng = np.random.default_rng(seed)
    stem, conv = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q", "lora_unet_input_blocks_1_0_in_layers_2"
    return {
        f"{stem}.lora_down.weight": rng.standard_normal((rank, 16)).astype(np.float32),
        f"{stem}.lora_up.weight": rng.standard_normal((16, rank)).astype(np.float32),
        f"{stem}.alpha": np.asarray(rank / 2, np.float32),
        f"{conv}.lora_down.weight": rng.standard_normal((rank, 8, 3, 3)).astype(np.float32),
        f"{conv}.lora_up.weight": rng.standard_normal((8, rank, 1, 1)).astype(np.float32),
        f"{conv}.alpha": np.asarray(rank, np.float32),
    }


def test_loras_are_merged_each_with_its_scale(model: Path, tmp_path: Path):
    for name, rank in (("a", 4), ("b", 2)):
        save_file(lora_tensors(rank, rank), tmp_path / f"{name}.safetensors")
    files = tuple(str(tmp_path / f"{name}.safetensors") for name in "ab")
    out = converted(model, tmp_path / "out", lora=files, lora_scale=(0.5, -1.5))
    before, after = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (model, out))
    different = {key for key in before if before[key].tobytes() != after[key].tobytes()}
    q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert different == {q, "down_blocks.0.resnets.0.conv1.weight"}
    stem = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
    a, b = lora_tensors(4, 4), lora_tensors(2, 2)
    delta = sum(
        scale * 0.5 * x[f"{stem}.lora_up.weight"].astype(np.float64) @ x[f"{stem}.lora_down.weight"]
        for x, scale in ((a, 0.5), (b, -1.5))
    )
    np.testing.assert_allclose(after[q], before[q] + delta, atol=1e-6)
    with pytest.raises(ValueError, match="has 1 numbers for 2 files"):
        converted(model, tmp_path / "no", lora=files, lora_scale=(1.0,))


def test_a_lora_goes_from_kohya_to_peft_and_back(model: Path, tmp_path: Path):
    first = lora_tensors(4)
    save_file(first, tmp_path / "a.safetensors")
    peft = converted(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="peft", config_from=str(model))
    assert "unet.down_blocks.0.resnets.0.conv1.lora_A.weight" in load_file(peft)
    back = load_file(converted(peft, tmp_path / "c.safetensors", to="kohya", config_from=str(model)))
    assert back.keys() == first.keys()
    assert all(back[key].tobytes() == x.tobytes() for key, x in first.items())
    with pytest.raises(ValueError, match="--lora: is for models"):
        converted(peft, tmp_path / "d.safetensors", to="kohya", lora=("x",))
    with pytest.raises(ValueError, match=r"is a LoRA; .*MODEL OUT --lora"):
        converted(peft, tmp_path / "d")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """A run of two checkpoints whose average differs from its weights."""
    config = merge(
        TrainConfig(),
        {
            "pretrained_model_name_or_path": str(model), "train_data_dir": "x", "ema_decay": 0.9,
            "caption_dropout": 0.1, "diffusion_scheduler_config.prediction_type": "v_prediction",
        },
    )  # fmt: skip
    shapes = eqx.filter_eval_shape(lambda: whole_unet(0.0))
    unet = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), x.dtype), shapes)
    optimizer = make_optimizer(config.optim, lambda _: 1e-4)
    state = new_state(Networks(unet, None), optimizer=optimizer, ema=True, key=jr.key(0))
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    saved = Saved(UNET.to_json(), True, flat(config), {})
    checkpoints.save(1, state, saved)
    state = eqx.tree_at(lambda s: s.ema, state, jax.tree.map(lambda x: x * 2, state.trained))
    checkpoints.save(2, state, saved)
    checkpoints.close()
    return folder, state


def whole_unet(value: float) -> Any:
    from sdxl_eqx.models.unet import UNet

    return jax.tree.map(lambda x: jnp.full(x.shape, value), UNet(UNET, key=jr.key(0)))


def unet_sums(unet: Any) -> dict[str, str]:
    tensors: Tensors = file_tensors(unet, dtype=np.float32)
    return sums(Model({"unet": tensors}, {}))


def test_a_run_gives_its_average_or_its_weights_with_the_parts_it_began_from(
    run: tuple[Path, TrainState], model: Path, tmp_path: Path
):
    folder, state = run
    rest = {key: value for key, value in sums(opened(model)).items() if not key.startswith("unet.")}
    out = converted(folder, tmp_path / "out")
    assert sums(opened(out)) == {**rest, **unet_sums(state.best.unet)}
    assert opened(out).configs["scheduler"]["prediction_type"] == "v_prediction"
    assert json.loads((out / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is False
    one = converted(folder, tmp_path / "raw.safetensors", to="single-file", ema=False)
    assert sums(opened(one)) == {**rest, **unet_sums(state.trained.unet)}
    assert sums(opened(folder, step=1)) == {**rest, **unet_sums(state.trained.unet)}
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; it has \[1, 2\]"):
        opened(folder, step=7)
    assert leaves(parts_unet(model, folder)) == leaves(state.ema)


def parts_unet(model: Path, unet_checkpoint: Path) -> Any:
    config = ModelConfig(pretrained_model_name_or_path=str(model), unet_checkpoint=str(unet_checkpoint))
    layout = Layout(make_mesh(ParallelConfig(), jax.devices()[:1]))
    return ModelParts.read(config, DiffusionSchedulerConfig(), token="").new_unet(config, layout, key=jr.key(0))


def test_a_run_whose_model_has_no_encoders_takes_them_from_its_export(
    run: tuple[Path, TrainState], model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    hidden = model.with_name("hidden")
    model.rename(hidden)
    try:
        with pytest.raises(ValueError, match=r"no such file or folder.*has no export/"):
            opened(folder)
        shutil.copytree(hidden, folder / "export")
        caplog.set_level("INFO", "sdxl_eqx")
        found = opened(folder)
    finally:
        hidden.rename(model)
    assert "are those of" in caplog.text
    assert sums(found) == {**sums(opened(model)), **unet_sums(run[1].best.unet)}


def test_a_damaged_checkpoint_is_named(run: tuple[Path, TrainState], tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    file = folder / "checkpoints" / "2" / "ema" / "_METADATA"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoints/2/ema: is no whole Orbax item"):
        converted(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_into_the_native_format_that_dies_leaves_nothing(model: Path, tmp_path: Path):
    whole = opened(model)

    def fail() -> np.ndarray:
        raise OSError("disk full")

    last = list(whole.parts)[-1]
    key = list(whole.parts[last])[-1]
    tensors = whole.parts[last]
    broken = {**tensors, key: Tensor(tensors[key].shape, tensors[key].dtype, fail)}
    with pytest.raises(OSError, match="disk full"):
        write_native(
            dataclasses.replace(whole, parts={**whole.parts, last: broken}), tmp_path / "native",
            save_tokenizers=partial(lambda _: None),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
