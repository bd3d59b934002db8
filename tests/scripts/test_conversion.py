"""Models from one file format to another and back."""

import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sdxl_eqx.conversion import ConvertConfig, convert, whole_model
from sdxl_eqx.weights.single_file import V_PRED, write_single_file
from sdxl_eqx.weights.tensors import Tensor, open_file, write_file

PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def sums(folder: Path) -> dict[str, str]:
    """sha256 of dtype, shape and bytes of every tensor of a diffusers folder."""
    found = {}
    for part, stem in PARTS.items():
        for key, x in load_file(folder / part / f"{stem}.safetensors").items():
            found[f"{part}.{key}"] = hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    convert(ConvertConfig(src=str(model), dst=str(file), to="single-file"))
    return file


def test_a_folder_into_one_file_and_back_is_bit_equal(model: Path, single: Path, tmp_path: Path):
    back = tmp_path / "back"
    convert(ConvertConfig(src=str(single), dst=str(back)))
    assert sums(back) == sums(model)
    for part in PARTS:
        assert json.loads((back / part / "config.json").read_text()) == json.loads(
            (model / part / "config.json").read_text()
        )


def test_one_file_through_a_folder_is_the_same_file(single: Path, tmp_path: Path):
    convert(ConvertConfig(src=str(single), dst=str(tmp_path / "folder")))
    again = tmp_path / "again.safetensors"
    convert(ConvertConfig(src=str(tmp_path / "folder"), dst=str(again), to="single-file"))
    assert again.read_bytes() == single.read_bytes()


def test_the_one_file_has_stability_ais_names_and_layout(model: Path, single: Path):
    theirs = load_file(single)
    ours = load_file(model / "text_encoder_2" / "model.safetensors")
    np.testing.assert_array_equal(
        theirs["conditioner.embedders.1.model.text_projection"], ours["text_projection.weight"].T
    )
    stem = "text_model.encoder.layers.1.self_attn."
    qkv = np.concatenate([ours[f"{stem}{p}_proj.weight"] for p in "qkv"])
    np.testing.assert_array_equal(
        theirs["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"], qkv
    )
    vae = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(
        theirs["first_stage_model.encoder.mid.attn_1.q.weight"][:, :, 0, 0],
        vae["encoder.mid_block.attentions.0.to_q.weight"],
    )
    np.testing.assert_array_equal(
        theirs["first_stage_model.decoder.up.0.block.0.conv1.weight"],
        vae["decoder.up_blocks.1.resnets.0.conv1.weight"],
        "the decoder's levels are numbered from the other end",
    )
    unet = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(
        theirs["model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"],
        unet["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"],
    )


def test_a_dtype_that_is_asked_for_is_that_of_every_tensor(model: Path, tmp_path: Path):
    file = tmp_path / "half.safetensors"
    convert(ConvertConfig(src=str(model), dst=str(file), to="single-file", dtype="float16"))
    tensors, _ = open_file(file)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}


def test_a_velocity_model_is_marked_and_known_again(model: Path, tmp_path: Path):
    opened = whole_model(ConvertConfig(src=str(model), dst=""))
    opened.configs["scheduler"]["prediction_type"] = "v_prediction"
    write_single_file(opened, tmp_path / "v.safetensors")
    tensors, metadata = open_file(tmp_path / "v.safetensors")
    assert tensors[V_PRED].shape == (0,)
    assert metadata["format"] == "pt"
    again = whole_model(ConvertConfig(src=str(tmp_path / "v.safetensors"), dst=""))
    assert again.configs["scheduler"]["prediction_type"] == "v_prediction"


def test_the_unet_alone_in_either_layout_is_read(model: Path, single: Path, tmp_path: Path):
    prefix = "model.diffusion_model."
    alone = {k.removeprefix(prefix): x for k, x in load_file(single).items() if k.startswith(prefix)}
    save_file(alone, tmp_path / "ldm.safetensors")
    ours = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(ours, tmp_path / "diffusers.safetensors")
    for name in ("ldm", "diffusers"):
        config = ConvertConfig(src=str(tmp_path / f"{name}.safetensors"), dst="", config_from=str(model))
        opened = whole_model(config)
        assert list(opened.parts) == ["unet"]
        assert opened.parts["unet"].keys() == ours.keys()
        for key, tensor in opened.parts["unet"].items():
            np.testing.assert_array_equal(tensor.read(), ours[key])


def test_the_refiner_has_its_one_text_encoder_in_the_first_place(model: Path, tmp_path: Path):
    whole = whole_model(ConvertConfig(src=str(model), dst=""))
    refiner = replace(whole, parts={part: t for part, t in whole.parts.items() if part != "text_encoder"})
    write_single_file(refiner, tmp_path / "refiner.safetensors")
    keys = open_file(tmp_path / "refiner.safetensors")[0]
    assert any(key.startswith("conditioner.embedders.0.model.") for key in keys)
    assert not any(key.startswith("conditioner.embedders.1.") for key in keys)
    again = whole_model(ConvertConfig(src=str(tmp_path / "refiner.safetensors"), dst=""))
    assert again.parts.keys() == refiner.parts.keys()
    for part, tensors in refiner.parts.items():
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(again.parts[part][key].read(), tensor.read())


def test_a_variant_is_read_by_its_name_whole_or_sharded(model: Path, tmp_path: Path):
    """Names as diffusers gives them: the variant stands before the last dot, and before an index's."""
    folder = tmp_path / "half"
    shutil.copytree(model, folder)
    for part, stem in PARTS.items():
        file = folder / part / f"{stem}.safetensors"
        half = {key: x.astype(np.float16) for key, x in load_file(file).items()}
        if part == "unet":
            names = {key: f"{stem}.fp16-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(sorted(half))}
            for name in set(names.values()):
                save_file({key: x for key, x in half.items() if names[key] == name}, folder / part / name)
            index = json.dumps({"metadata": {}, "weight_map": names})
            (folder / part / f"{stem}.safetensors.index.fp16.json").write_text(index)
        else:
            save_file(half, folder / part / f"{stem}.fp16.safetensors")
    convert(ConvertConfig(src=str(folder), dst=str(tmp_path / "out"), variant="fp16"))
    convert(ConvertConfig(src=str(model), dst=str(tmp_path / "cast"), dtype="float16"))
    assert sums(tmp_path / "out") == sums(tmp_path / "cast") != sums(model)
    with pytest.raises(ValueError, match="has no weights of variant bf16 but"):
        whole_model(ConvertConfig(src=str(folder), dst="", variant="bf16"))


def test_old_names_of_the_vaes_attention_are_known(model: Path, tmp_path: Path):
    folder = tmp_path / "old"
    shutil.copytree(model, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, x in load_file(file).items():
        for new, name in old.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        renamed[key] = x
    assert any("proj_attn" in key for key in renamed)
    save_file(renamed, file)
    convert(ConvertConfig(src=str(folder), dst=str(tmp_path / "out")))
    assert sums(tmp_path / "out") == sums(model)


def test_keys_that_no_model_has_are_left_out_and_said(single: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = load_file(single)
    tensors["conditioner.embedders.1.model.logit_scale"] = np.ones((), np.float32)
    tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
    with safe_open(single, framework="numpy") as file:
        save_file(tensors, tmp_path / "more.safetensors", metadata=file.metadata())
    caplog.set_level("INFO", "sdxl_eqx")
    convert(ConvertConfig(src=str(tmp_path / "more.safetensors"), dst=str(tmp_path / "out")))
    assert "logit_scale" in caplog.text and "position_ids" in caplog.text


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_key_that_is_missing_unknown_or_of_another_shape_is_named(change: str, single: Path, tmp_path: Path):
    tensors = load_file(single)
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    if change == "missing":
        del tensors[key]
    elif change == "unknown":
        tensors["model.diffusion_model.middle_block.1.extra.weight"] = tensors[key]
    else:
        tensors[key] = tensors[key][:-1]
    with safe_open(single, framework="numpy") as file:
        save_file(tensors, tmp_path / "bad.safetensors", metadata=file.metadata())
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0\.(proj_in|extra)\.weight"):
        convert(ConvertConfig(src=str(tmp_path / "bad.safetensors"), dst=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("cond_stage_model.transformer.text_model.x", "Stable Diffusion 1"),
        ("cond_stage_model.model.x", "Stable Diffusion 2"),
        ("other", "no label_emb"),
    ],
)
def test_another_family_of_models_is_named(key: str, said: str, tmp_path: Path):
    file = tmp_path / "other.safetensors"
    x = np.zeros((4, 4, 3, 3), np.float32)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": x, key: x}, file)
    with pytest.raises(ValueError, match=said):
        whole_model(ConvertConfig(src=str(file), dst=""))


def test_a_pickle_is_refused_with_the_command_that_turns_it_into_safetensors(tmp_path: Path):
    for name, raw in (("model.ckpt", b"PK\x03\x04"), ("model.safetensors", b"PK\x03\x04" + b"\0" * 100)):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=r"pickle.*never loaded"):
            whole_model(ConvertConfig(src=str(tmp_path / name), dst=""))


def test_a_destination_that_is_there_stays_unless_it_may_be_replaced(single: Path, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(model, out)
    before = (out / "model_index.json").stat().st_ino
    config = ConvertConfig(src=str(single), dst=str(out))
    with pytest.raises(ValueError, match="--overwrite"):
        convert(config)
    assert (out / "model_index.json").stat().st_ino == before
    convert(replace(config, overwrite=True))
    assert (out / "model_index.json").stat().st_ino != before and sums(out) == sums(model)


def test_a_conversion_that_dies_leaves_nothing_half_written(single: Path, tmp_path: Path):
    tensors, _ = open_file(single)
    key = sorted(tensors)[-1]

    def fail() -> np.ndarray:
        raise OSError("disk full")

    broken = {**tensors, key: Tensor(tensors[key].shape, tensors[key].dtype, fail)}
    with pytest.raises(OSError, match="disk full"):
        write_file(broken, tmp_path / "out.safetensors", metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "bool"])
def test_our_writer_and_the_librarys_reader_agree(dtype: str, tmp_path: Path):
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype) if hasattr(ml_dtypes, dtype) else dtype)
    arrays = {"a": np.arange(6).reshape(2, 3).astype(kind), "b": np.ones((), kind), "c": np.zeros((0, 4), kind)}
    write_file({k: Tensor.of(x) for k, x in arrays.items()}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors, metadata = open_file(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    for key, x in arrays.items():
        assert tensors[key].read().tobytes() == x.tobytes()
        assert tensors[key].shape == x.shape and tensors[key].dtype == kind
    if dtype != "float8_e4m3fn":  # of which the library's numpy reader knows nothing
        theirs = load_file(tmp_path / "x.safetensors")
        assert all((theirs[k] == x).all() and theirs[k].dtype == kind for k, x in arrays.items())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 3000))
def test_a_damaged_header_never_ends_in_a_traceback(at: int, value: int, cut: int, tmp_path: Path):
    write_file({"a": Tensor.of(np.ones((8, 8), np.float32))}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    raw = bytearray((tmp_path / "x.safetensors").read_bytes())
    if at < len(raw):
        raw[at] = value
    (tmp_path / "y.safetensors").write_bytes(raw[: max(len(raw) - cut, 0)] if cut % 2 else raw)
    try:
        tensors, _ = open_file(tmp_path / "y.safetensors")
    except ValueError as error:
        assert "y.safetensors" in str(error)
    else:
        assert all(t.read().nbytes == t.nbytes for t in tensors.values())


def test_a_header_length_beyond_the_file_is_said(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 10**6) + b"{}")
    with pytest.raises(ValueError, match="header says 1000000 bytes, the file has 10"):
        open_file(tmp_path / "x.safetensors")
