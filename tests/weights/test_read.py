"""Reading safetensors: what is right is exact, and what is wrong is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes
import numpy as np
import parity_models as tiny
import pytest
from safetensors.numpy import save_file

from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.sdxl import cast
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.weights.read import clip_key, read_json, read_model, weight_files
from sdxl_eqx.weights.write import write_model

SMALL_TEXT = dataclasses.replace(tiny.TEXT_2, vocab_size=60)
MODELS: dict[str, tuple[Any, Any]] = {
    "unet": (UNet, tiny.UNET),
    "vae": (VAE, tiny.VAE_CONFIG),
    "text": (CLIPText, SMALL_TEXT),
}


def skeleton(name: str) -> Any:
    make, config = MODELS[name]
    return eqx.filter_eval_shape(make, config, key=jr.key(0))


def bits(model: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)]


@pytest.fixture(scope="module")
def tensors() -> tiny.Tensors:
    return {key: np.ascontiguousarray(x) for key, x in tiny.file_tensors(tiny.filled(*MODELS["text"])).items()}


@pytest.fixture
def whole(tensors: tiny.Tensors, tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def read(*files: Path, rename: Any = str) -> Any:
    return read_model(skeleton("text"), files, dtype=np.float32, rename=rename)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_written_is_read_bit_for_bit(name: str, dtype: Any, tmp_path: Path):
    model = cast(tiny.filled(*MODELS[name]), dtype)
    file = tmp_path / "part" / "model.safetensors"
    write_model(model, model.config.to_json(), file, dtype=dtype)
    again = read_model(skeleton(name), weight_files(file.parent), dtype=dtype)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert bits(again) == bits(model)
    assert type(model.config).from_json(read_json(file.parent / "config.json"), **_projection(name)) == model.config


def _projection(name: str) -> dict[str, bool]:
    return {"projection": True} if name == "text" else {}


def test_a_file_in_half_precision_is_read_into_float32(tensors: tiny.Tensors, tmp_path: Path):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        save_file({key: x.astype(dtype) for key, x in tensors.items()}, tmp_path / "model.safetensors")
        ours = tiny.file_tensors(read(tmp_path / "model.safetensors"))
        for key, x in tensors.items():
            assert ours[key].dtype == np.float32
            np.testing.assert_array_equal(ours[key], x.astype(dtype).astype(np.float32))


def test_shards_are_found_by_their_index_and_read_as_one(tensors: tiny.Tensors, whole: Path):
    folder = whole.parent / "sharded"
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: x for key, x in tensors.items() if where[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    files = weight_files(folder)
    assert [file.name for file in files] == names
    assert bits(read(*files)) == bits(read(whole))
    (folder / names[1]).unlink()
    with pytest.raises(ValueError, match=rf"{names[1]}.*fetch"):
        weight_files(folder)


def test_an_index_that_names_nothing_is_refused(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: names shards that are not there"):
        weight_files(tmp_path)


def test_a_missing_key_is_named(tensors: tiny.Tensors, tmp_path: Path):
    key = "text_model.encoder.layers.1.mlp.fc1.bias"
    save_file({k: x for k, x in tensors.items() if k != key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: 1 keys missing: {key}\."):
        read(tmp_path / "model.safetensors")


def test_unknown_keys_are_named_and_many_are_counted(tensors: tiny.Tensors, tmp_path: Path):
    more = {f"stray.{i}": np.zeros(1, np.float32) for i in range(7)}
    save_file(tensors | more, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"7 keys unknown: stray\.0, .*stray\.4 and 2 more"):
        read(tmp_path / "model.safetensors")


def test_the_position_ids_of_old_files_are_passed_over(tensors: tiny.Tensors, tmp_path: Path):
    old = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    save_file(tensors | old, tmp_path / "model.safetensors")
    read(tmp_path / "model.safetensors")


def test_a_key_that_two_files_hold_is_named(tensors: tiny.Tensors, whole: Path, tmp_path: Path):
    key = "text_projection.weight"
    save_file({key: tensors[key]}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"1 keys held twice: {key}"):
        read(whole, tmp_path / "other.safetensors")


def test_a_wrong_shape_is_named_with_both_shapes(tensors: tiny.Tensors, tmp_path: Path):
    wrong = {"text_projection.weight": np.zeros((48, 40), np.float32)}
    save_file(tensors | wrong, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"text_projection\.weight has shape \(48, 40\).*\(40, 48\)"):
        read(tmp_path / "model.safetensors")


@pytest.mark.parametrize("part", [0.5, 0.001, 0])
def test_a_truncated_file_is_named_with_the_remedy(part: float, whole: Path):
    raw = whole.read_bytes()
    whole.write_bytes(raw[: int(part * len(raw))])
    with pytest.raises(
        ValueError, match=r"model\.safetensors: (not a whole|only \d bytes|truncated).*fetch or save it again"
    ):
        read(whole)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt"])
def test_a_folder_with_pickles_alone_is_refused_with_the_remedy(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=rf"{name}.*safe_serialization=True"):
        weight_files(tmp_path)


def test_an_empty_folder_has_no_weights(tmp_path: Path):
    assert weight_files(tmp_path) == []


def test_text_encoder_keys_are_read_with_and_without_their_prefix(tensors: tiny.Tensors, whole: Path):
    bare = {key.removeprefix("text_model."): x for key, x in tensors.items()}
    save_file(bare, whole.parent / "bare.safetensors")
    assert bits(read(whole.parent / "bare.safetensors", rename=clip_key)) == bits(read(whole, rename=clip_key))


def test_arrays_are_put_one_after_the_other_where_the_caller_says(whole: Path):
    seen: list[str] = []

    def put(place: Any, array: np.ndarray) -> jax.Array:
        seen.append(place.path)
        return jnp.asarray(array) + 1

    ours = read_model(skeleton("text"), [whole], dtype=np.float32, put=put)
    assert len(seen) == len(jax.tree.leaves(ours))
    np.testing.assert_array_equal(ours.text_projection.weight, read(whole).text_projection.weight + 1)


def test_json_that_is_missing_broken_or_no_object_is_named(tmp_path: Path):
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config\.json: missing"):
        read_json(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        read_json(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: must hold a JSON object"):
        read_json(file)
