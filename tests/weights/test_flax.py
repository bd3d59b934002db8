"""Flax files: what is in them is read as it is and when it is asked for; what is no such file is refused by name.

Files are written here as Flax writes them; the golden files hold what Flax itself wrote, and what its models compute.
"""

import hashlib
import json
import pickle
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import parity_models as tiny
import parity_published as published
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sdxl_eqx.models.clip import CLIPTextConfig
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.models.vae import VAEConfig
from sdxl_eqx.weights.flax import FLAX, flax_paths, open_flax, read_flax
from sdxl_eqx.weights.read import fill
from sdxl_eqx.weights.skeletons import skeleton
from sdxl_eqx.weights.tensors import Tensors

UNET = UNetConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 128),
    attention_levels=(False, True),
    layers_per_block=1,
    transformer_layers=(1, 2),
    heads=(2, 4),
    cross_attention_dim=40,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=72,
    norm_num_groups=32,
    norm_eps=1e-5,
)
"""Flax's UNet always has 32 groups and this eps."""

VAE = VAEConfig(3, 4, (16, 24), 1, 4, 0.13025, 32, True)
TEXT = CLIPTextConfig(60, 32, 64, 3, 4, 12, "quick_gelu", None, eos_token_id=2)
TEXT_2 = CLIPTextConfig(60, 40, 48, 3, 4, 12, "gelu", 24, eos_token_id=2)
TINY = {
    "unet": UNET.to_json(),
    "vae": VAE.to_json(),
    "text_encoder": TEXT.to_json(),
    "text_encoder_2": TEXT_2.to_json(),
}
FULL = {
    "unet": published.UNET,
    "vae": published.VAE,
    "text_encoder": published.TEXT,
    "text_encoder_2": published.TEXT_2,
}
SMALLEST = CLIPTextConfig(3, 2, 2, 2, 1, 2, "quick_gelu", None).to_json()
"""So small that names and headers are most of its file."""

KEYS = tiny.GOLDEN / "flax_keys.json"
OUTPUTS = tiny.GOLDEN / "flax.msgpack"

Arrays = Mapping[str, Any]


def array(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight at a path of a Flax file, of a size that keeps activations near one and every part of it telling."""
    draw = tiny.generator("flax", path).standard_normal(shape).astype(np.float32)
    if path.endswith("scale"):
        return 1 + 0.3 * draw
    if path.endswith("bias"):
        return 0.2 * draw
    return draw if path.endswith("embedding") else draw / np.sqrt(np.prod(shape[:-1]), dtype=np.float32)


def arrays_of(part: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    return {path: array(path, wanted.shape) for path, wanted in flax_paths(part, config).items()}


def tree(arrays: Arrays) -> dict[str, Any]:
    """Nested dicts in the order of the paths."""
    root: dict[str, Any] = {}
    for path in sorted(arrays):
        *modules, name = path.split("/")
        at = root
        for module in modules:
            at = at.setdefault(module, {})
        at[name] = arrays[path]
    return root


def packed(node: Any) -> bytes:
    """A tree as `flax.serialization` writes it."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, np.ndarray | np.generic):
            return x
        raw = msgpack.packb((x.shape, x.dtype.name, x.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1 if isinstance(x, np.ndarray) else 3, raw)

    whole = msgpack.packb(node, default=leaf, strict_types=True)
    assert whole is not None
    return whole


def in_pieces(x: np.ndarray, size: int) -> dict[str, Any]:
    """An array as Flax divides it where it is larger than one leaf may be."""
    pieces = [x.reshape(-1)[at : at + size] for at in range(0, x.size, size)]
    shape, chunks = ({str(i): value for i, value in enumerate(values)} for values in (x.shape, pieces))
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


def kinds() -> dict[str, np.ndarray | np.generic]:
    """Every kind of leaf that Flax writes for arrays; `pieces` is longer than 64 bytes."""
    draw = tiny.generator("kinds").standard_normal((3, 5))
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_)
    found: dict[str, np.ndarray | np.generic] = {np.dtype(dtype).name: (9 * draw).astype(dtype) for dtype in dtypes}
    return {
        **found,
        "nothing": np.zeros((0, 4), np.float32),
        "pieces": draw.astype(np.float64),
        "scalar": np.float32(3),
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(KEYS.read_text(encoding="utf-8"))


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def write(folder: Path, node: Any) -> Path:
    file = folder / "flax_model.msgpack"
    file.write_bytes(node if isinstance(node, bytes) else packed(node))
    return file


def in_torch_layout(path: str, x: np.ndarray) -> np.ndarray:
    if not path.endswith("kernel"):
        return x
    return np.moveaxis(x, (3, 2), (0, 1)) if x.ndim == 4 else x.T


@pytest.mark.parametrize("part", FLAX)
def test_the_paths_and_shapes_of_full_size_are_those_of_flax_itself(part: str, golden: dict[str, Any]):
    shapes = {path: wanted.shape for path, wanted in flax_paths(part, FULL[part]).items()}
    assert tiny.table(shapes) == golden["full"][part]


@pytest.mark.parametrize("part", FLAX)
def test_what_flax_writes_is_read_bit_for_bit_in_the_published_names_and_layout(
    part: str, golden: dict[str, Any], tmp_path: Path
):
    arrays = arrays_of(part, TINY[part])
    raw = packed(tree(arrays))
    assert sha256(raw) == golden["tiny"][part], "this is not the file that Flax writes of these arrays"
    ours, left_out = read_flax(write(tmp_path, raw), part, TINY[part])
    names = {wanted.key: path for path, wanted in flax_paths(part, TINY[part]).items()}
    assert ours.keys() == names.keys() and not left_out
    for key, path in names.items():
        theirs = in_torch_layout(path, arrays[path])
        assert (ours[key].shape, ours[key].dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_array_equal(ours[key].read(), theirs)


def test_names_are_the_published_ones():
    for part, path, key in (
        ("unet", "down_blocks_1/attentions_0/transformer_blocks_1/attn2/to_out_0/kernel",
         "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0.weight"),
        ("unet", "down_blocks_1/attentions_0/transformer_blocks_1/ff/net_0/proj/kernel",
         "down_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj.weight"),
        ("unet", "time_embedding/linear_1/kernel", "time_embedding.linear_1.weight"),
        ("unet", "conv_norm_out/scale", "conv_norm_out.weight"),
        ("vae", "encoder/mid_block/attentions_0/query/kernel", "encoder.mid_block.attentions.0.to_q.weight"),
        ("vae", "encoder/mid_block/attentions_0/proj_attn/bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
        ("text_encoder", "text_model/embeddings/token_embedding/embedding",
         "text_model.embeddings.token_embedding.weight"),
        ("text_encoder_2", "text_model/encoder/layers/2/mlp/fc1/kernel", "text_model.encoder.layers.2.mlp.fc1.weight"),
        ("text_encoder_2", "text_projection/kernel", "text_projection.weight"),
    ):  # fmt: skip
        assert flax_paths(part, TINY[part])[path].key == key


@pytest.fixture(scope="module", params=FLAX)
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    part = request.param
    tensors, _ = read_flax(write(tmp_path_factory.mktemp(part), tree(arrays_of(part, TINY[part]))), part, TINY[part])
    yield outputs(part, tensors)


def inputs(part: str) -> tiny.Tensors:
    """What the tiny models are run on."""
    if part == "unet":
        return tiny.unet_inputs(UNET, (6, 8))
    rng = tiny.generator("flax", part)
    if part == "vae":
        x, z = rng.uniform(-1, 1, (2, 8, 12, 3)), rng.standard_normal((2, 4, 6, 4))
        return {"x": x.astype(np.float32), "z": z.astype(np.float32)}
    return {"ids": rng.permutation(60)[:24].reshape(2, 12).astype(np.int32)}


def outputs(part: str, tensors: Tensors) -> tiny.Tensors:
    """What our tiny model computes with these weights."""
    model = fill(skeleton(part, TINY[part]), tensors, dtype=np.float32, source=part)
    given = inputs(part)
    if part == "unet":
        return {"unet": tiny.apply_unet(model, given)}
    if part == "vae":
        encoded = tiny.run_encode(model, jnp.asarray(given["x"]))
        decoded = tiny.run_decode(model, jnp.asarray(given["z"]))
        return {"vae.mean": encoded.mean, "vae.logvar": encoded.logvar, "vae.decoded": decoded}
    penultimate, pooled = tiny.run_text(model, jnp.asarray(given["ids"]))
    return {f"{part}.penultimate": penultimate, f"{part}.pooled": pooled}


def test_our_models_compute_with_these_weights_what_flax_computes(computed: tiny.Tensors):
    theirs = open_flax(OUTPUTS)
    for name, ours in computed.items():
        tiny.assert_close(ours, theirs[name].read(), 1e-4)


def test_every_kind_of_leaf_is_read_as_flax_writes_it(golden: dict[str, Any], tmp_path: Path):
    leaves = kinds()
    raw = packed({**leaves, "pieces": in_pieces(np.asarray(leaves["pieces"]), 8)})
    assert sha256(raw) == golden["kinds"]
    ours = open_flax(write(tmp_path, raw))
    assert list(ours) == list(leaves)
    for name, leaf in leaves.items():
        assert (ours[name].shape, ours[name].dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_array_equal(ours[name].read(), leaf)


def test_weights_in_half_precision_keep_it(tmp_path: Path):
    arrays = {path: x.astype(ml_dtypes.bfloat16) for path, x in arrays_of("text_encoder", SMALLEST).items()}
    ours, _ = read_flax(write(tmp_path, tree(arrays)), "text_encoder", SMALLEST)
    key = "text_model.encoder.layers.1.mlp.fc2.weight"
    np.testing.assert_array_equal(ours[key].read(), arrays["text_model/encoder/layers/1/mlp/fc2/kernel"].T)


def test_the_order_of_tensors_is_the_file_s_so_that_it_is_read_from_front_to_back(tmp_path: Path):
    arrays = dict(reversed(sorted(arrays_of("text_encoder", SMALLEST).items())))
    root: dict[str, Any] = {"text_model": {}}
    for path, x in arrays.items():
        at = root
        *modules, name = path.split("/")
        for module in modules:
            at = at.setdefault(module, {})
        at[name] = x
    ours, _ = read_flax(write(tmp_path, root), "text_encoder", SMALLEST)
    first, *_, last = ours
    assert first == "text_model.final_layer_norm.weight"
    assert last == "text_model.embeddings.position_embedding.weight"


def test_a_whole_tree_of_variables_is_read_like_the_weights_alone(tmp_path: Path):
    arrays = tree(arrays_of("text_encoder", SMALLEST))
    bare, _ = read_flax(write(tmp_path, arrays), "text_encoder", SMALLEST)
    bare = {key: tensor.read().copy() for key, tensor in bare.items()}
    wrapped, _ = read_flax(write(tmp_path, {"params": arrays}), "text_encoder", SMALLEST)
    jax.tree.map(np.testing.assert_array_equal, bare, {key: tensor.read() for key, tensor in wrapped.items()})


def test_position_ids_are_left_out_and_named(tmp_path: Path):
    arrays = arrays_of("text_encoder", SMALLEST)
    file = write(tmp_path, tree({**arrays, "text_model/embeddings/position_ids": np.arange(2)[None]}))
    ours, left_out = read_flax(file, "text_encoder", SMALLEST)
    assert left_out == ["text_model/embeddings/position_ids"] and len(ours) == len(arrays)


def test_an_array_is_read_when_it_is_asked_for_and_not_before(tmp_path: Path):
    arrays = arrays_of("text_encoder", SMALLEST)
    file = write(tmp_path, tree(arrays))
    ours, _ = read_flax(file, "text_encoder", SMALLEST)
    path, later = "text_model/final_layer_norm/scale", np.array([7, 8], np.float32)
    at = file.read_bytes().index(arrays[path].tobytes())
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(later.tobytes())
    np.testing.assert_array_equal(ours["text_model.final_layer_norm.weight"].read(), later)


def test_opening_a_file_of_gigabytes_takes_no_memory_to_speak_of(tmp_path: Path):
    rows = 2**18
    head = msgpack.packb(((rows, 2**11), "float32"), use_bin_type=True)
    assert head is not None
    inner = b"\x93" + head[1:] + b"\xc6" + (4 * rows * 2**11).to_bytes(4, "big")
    with (tmp_path / "large.msgpack").open("wb") as opened:
        size = len(inner) + 4 * rows * 2**11
        opened.write(b"\x81\xa6kernel\xc9" + size.to_bytes(4, "big") + b"\x01" + inner)
        opened.truncate(opened.tell() + 4 * rows * 2**11)  # a hole: it takes no room on the disk
    tracemalloc.start()
    try:
        tensor = open_flax(tmp_path / "large.msgpack")["kernel"]
        assert not tensor.read()[-1].any()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert tensor.nbytes == 2**31


def refused(file: Path, why: str, *, part: str = "text_encoder", config: dict[str, Any] = SMALLEST) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        read_flax(file, part, config)
    assert str(caught.value).startswith(f"{file}: ")


def test_missing_and_unknown_arrays_are_named_and_many_are_counted(tmp_path: Path):
    arrays = arrays_of("text_encoder", SMALLEST)
    less = {path: x for path, x in arrays.items() if "/0/" not in path}
    more = {**arrays, "text_projection/kernel": np.zeros((2, 2), np.float32)}
    refused(
        write(tmp_path, tree(less)), r"16 arrays missing: .*layers/0/layer_norm1/bias, .* and 11 more\. These weights"
    )
    refused(write(tmp_path, tree(more)), r"1 arrays unknown: text_projection/kernel\. .*text_encoder/config\.json")
    refused(write(tmp_path, {}), r"36 arrays missing")


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path):
    arrays = arrays_of("text_encoder", SMALLEST)
    path = "text_model/encoder/layers/0/mlp/fc1/kernel"
    file = write(tmp_path, tree({**arrays, path: np.zeros((2, 3), np.float32)}))
    refused(file, rf"{path} has shape \(2, 3\), the config says \(2, 2\)")


def test_an_array_that_is_held_twice_is_named(tmp_path: Path):
    one = packed({"kernel": np.zeros(2, np.float32)})
    refused(write(tmp_path, b"\x82" + 2 * one[1:]), r"kernel is held twice in the top; fetch")
    refused(write(tmp_path, {"a": {"b": np.zeros(2)}, "a/b": np.zeros(2)}), r"a/b is held twice; fetch")


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ({"a": {"b": 3}}, r"a/b holds int, where only arrays may be"),
        ({"a": None}, r"a holds NoneType"),
        ({"a": [1, 2]}, r"a holds list"),
        ({"a": b"123"}, r"a holds bytes"),
        ([1, 2], r"holds no map of names to arrays"),
        ({"a": {7: 1}}, r"a has the name 7, which is no text"),
        ({"a": msgpack.ExtType(2, b"\x92\x01\x02")}, r"a is a complex number"),
        ({"a": msgpack.ExtType(77, b"")}, r"a is of msgpack extension type 77"),
        ({"a": np.array(["text"])}, r"a has dtype str128, which no weights have"),
        ({"a": np.zeros(2, np.complex64)}, r"a has dtype complex64"),
    ],
    ids=str,
)
def test_what_is_no_array_is_named(node: Any, why: str, tmp_path: Path):
    refused(write(tmp_path, node), why)


def leaf(*fields: Any) -> bytes:
    """A file of one array made of these fields."""
    raw = msgpack.packb(fields, use_bin_type=True)
    assert raw is not None
    whole = msgpack.packb({"a": msgpack.ExtType(1, raw)})
    assert whole is not None
    return whole


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (leaf((1,), "object", b"\x80\x04N."), r"a has dtype object, which no weights have"),
        (leaf((2,), "float32", b"1234"), r"a has 4 bytes, which do not make float32 of shape \(2,\)"),
        (leaf((-1,), "float32", b"1234"), r"a is no array as Flax writes it"),
        (leaf((1,), b"float32", b"1234"), r"a is no array as Flax writes it"),
        (leaf((1,), "float32", b"1234", 5), r"a is no array as Flax writes it"),
        (leaf((1,), "float32", "1234"), r"is not msgpack as Flax writes it, or cut off, at byte \d+"),
        (
            leaf((1,), "float32", b"1234").replace(b"\xc7\x11", b"\xc7\x10"),
            r"a ends at byte 23, where its header says 22",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_array_that_is_not_as_flax_writes_it_is_named(raw: bytes, why: str, tmp_path: Path):
    refused(write(tmp_path, raw), why)


@pytest.mark.parametrize("change", ["shape", "chunks", "dtype", "number", "sum"])
def test_pieces_that_do_not_make_an_array_are_named(change: str, tmp_path: Path):
    pieces = in_pieces(np.arange(6, dtype=np.float32).reshape(2, 3), 4)
    if change in ("shape", "chunks"):
        del pieces[change]
    elif change == "dtype":
        pieces["chunks"]["1"] = pieces["chunks"]["1"].astype(np.float16)
    elif change == "number":
        pieces["chunks"]["7"] = pieces["chunks"].pop("1")
    else:
        pieces["shape"]["0"] = 3
    refused(write(tmp_path, {"a": pieces}), r"a is an array in pieces that do not make up its shape")


def test_maps_without_end_are_refused(tmp_path: Path):
    refused(write(tmp_path, b"\x81\xa1a" * 10_000), r"nested more than 32 deep")


def test_a_file_that_is_cut_off_is_named_wherever_it_is_cut(tmp_path: Path):
    whole = packed(tree(arrays_of("text_encoder", SMALLEST)))
    for at in range(0, len(whole), 7):
        refused(write(tmp_path, whole[:at]), r"cut off.*; fetch or save it again\.$")
    refused(write(tmp_path, whole + b"ab"), r"has 2 bytes after the end")


def test_files_of_other_kinds_are_named(tmp_path: Path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    for raw, what in (
        (pickle.dumps({"a": 1}, protocol=2), "a PyTorch pickle .* never loaded"),
        (b"PK\x03\x04" + bytes(99), "a PyTorch pickle .* never loaded"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        ((tmp_path / "a.safetensors").read_bytes(), "a safetensors file under another name"),
        (b"", "cut off at byte 0"),
    ):
        refused(write(tmp_path, raw), what)
    refused(tmp_path, "cannot be read")
    refused(tmp_path / "nowhere.msgpack", "cannot be read")


def test_a_pickle_is_not_run(tmp_path: Path):
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    for raw in (pickle.dumps(Touch()), leaf((1,), "object", pickle.dumps(Touch()))):
        refused(write(tmp_path, raw), "pickle|object")
    assert not (tmp_path / "touched").exists()


def test_a_part_without_flax_weights_is_refused(tmp_path: Path):
    refused(tmp_path / "x", r"no Flax weights of 'controlnet'.*unet, vae", part="controlnet")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("small"), tree(arrays_of("text_encoder", SMALLEST)))


@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
    end=st.none() | st.floats(0, 1),
)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(small: Path, flips: list[tuple[float, int]], end: Any):
    raw = bytearray(small.read_bytes())
    for at, bits in flips:
        raw[int(at * len(raw))] ^= bits
    damaged = small.with_name("damaged.msgpack")
    damaged.unlink(missing_ok=True)  # the file before may still be mapped
    damaged.write_bytes(raw if end is None else raw[: int(end * len(raw))])
    read_or_refused(damaged)


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x81\xa1a", b"\x81\xa1a\xc7", b"\xdf", b"\x81\xa1a\xc7\x20\x01"])
)
def test_any_bytes_are_read_or_refused_and_nothing_else(small: Path, raw: bytes, start: bytes):
    anything = small.with_name("anything.msgpack")
    anything.unlink(missing_ok=True)
    anything.write_bytes(start + raw)
    read_or_refused(anything)


def read_or_refused(file: Path) -> None:
    try:
        tensors, _ = read_flax(file, "text_encoder", SMALLEST)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ")
    else:
        for tensor in tensors.values():
            assert tensor.read().shape == tensor.shape
