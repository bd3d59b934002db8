"""LoRA files in every format people use: read to the same layers, merged, written, refused where they are none."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import parity_models as tiny
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.weights.lora import Layer, LoRA, merge, read_lora, write_kohya, write_peft
from sdxl_eqx.weights.lora_keys import ADAPTER_METADATA, kohya_name, module_names
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.tensors import Tensor, open_file

PARTS = {
    "unet": (UNet, tiny.UNET),
    "text_encoder": (CLIPText, tiny.TEXT),
    "text_encoder_2": (CLIPText, tiny.TEXT_2),
}
DOWN, UP = "down_blocks.1.attentions.0", "up_blocks.0.attentions.1"
RANKS = {
    f"unet.{DOWN}.transformer_blocks.0.attn1.to_q": 4,
    f"unet.{DOWN}.transformer_blocks.0.attn1.to_out.0": 2,
    f"unet.{UP}.transformer_blocks.1.attn2.to_k": 3,
    f"unet.{DOWN}.transformer_blocks.0.ff.net.0.proj": 4,
    f"unet.{DOWN}.proj_in": 1,
    "unet.mid_block.attentions.0.proj_out": 4,
    "unet.conv_in": 2,
    "unet.time_embedding.linear_1": 4,
    "unet.add_embedding.linear_2": 4,
    "unet.down_blocks.0.resnets.0.conv1": 3,
    "unet.down_blocks.0.resnets.0.time_emb_proj": 2,
    "unet.down_blocks.1.resnets.0.conv_shortcut": 4,
    "unet.down_blocks.0.downsamplers.0.conv": 2,
    "unet.up_blocks.0.upsamplers.0.conv": 2,
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": 4,
    "text_encoder.text_model.encoder.layers.1.mlp.fc1": 2,
    "text_encoder_2.text_model.encoder.layers.2.self_attn.out_proj": 3,
    "text_encoder_2.text_projection": 2,
}
"""Every kind of module, of different ranks."""

SGM = {
    f"unet.{DOWN}.transformer_blocks.0.attn1.to_q": "input_blocks.3.1.transformer_blocks.0.attn1.to_q",
    f"unet.{DOWN}.transformer_blocks.0.attn1.to_out.0": "input_blocks.3.1.transformer_blocks.0.attn1.to_out.0",
    f"unet.{UP}.transformer_blocks.1.attn2.to_k": "output_blocks.1.1.transformer_blocks.1.attn2.to_k",
    f"unet.{DOWN}.transformer_blocks.0.ff.net.0.proj": "input_blocks.3.1.transformer_blocks.0.ff.net.0.proj",
    f"unet.{DOWN}.proj_in": "input_blocks.3.1.proj_in",
    "unet.mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
    "unet.conv_in": "input_blocks.0.0",
    "unet.time_embedding.linear_1": "time_embed.0",
    "unet.add_embedding.linear_2": "label_emb.0.2",
    "unet.down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "unet.down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "unet.down_blocks.1.resnets.0.conv_shortcut": "input_blocks.3.0.skip_connection",
    "unet.down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "unet.up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
}
"""Their names in the UNet on which kohya's scripts train."""

QUERY = f"unet.{DOWN}.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"

Arrays = dict[str, np.ndarray]


def weight(part: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """A weight that is made when it is read."""
    return Tensor(shape, np.dtype(np.float32), lambda: tiny.tensor(f"{part}.{key}", shape))


@pytest.fixture(scope="module")
def model() -> Model:
    parts = {part: {k: weight(part, k, s) for k, s in tiny.shapes_of(*made).items()} for part, made in PARTS.items()}
    return Model(parts, {part: config.to_json() for part, (_, config) in PARTS.items()})


def lora_of(model: Model, *, ranks: Mapping[str, int] = RANKS, dora: bool = False, salt: int = 0) -> LoRA:
    """Random layers; every other has an alpha."""
    layers = {}
    for i, (module, rank) in enumerate(ranks.items()):
        part, _, path = module.partition(".")
        shape = model.parts[part][f"{path}.weight"].shape
        rng = tiny.generator("lora", module, salt)
        down = (rng.standard_normal((rank, *shape[1:])) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        up = rng.standard_normal((shape[0], rank, *(1,) * (len(shape) - 2))).astype(np.float32)
        magnitude = Tensor.of(rng.uniform(0.5, 2, shape[0]).astype(np.float32)) if dora else None
        layers[module] = Layer(Tensor.of(down), Tensor.of(up), None if i % 2 else 0.5 + i, magnitude)
    return LoRA(layers)


def only(lora: LoRA, start: str) -> LoRA:
    """The layers whose name starts so."""
    return LoRA({module: layer for module, layer in lora.layers.items() if module.startswith(start)})


def save(arrays: Mapping[str, Any], file: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file, by the format's own writer."""
    save_file(
        {key: np.array(value, order="C") for key, value in arrays.items()}, file, dict(metadata or {"format": "pt"})
    )
    return file


def digest(tensor: Tensor | None) -> str:
    """sha256 of dtype, shape and bytes."""
    if tensor is None:
        return ""
    x = tensor.read()
    assert (x.shape, x.dtype) == (tensor.shape, tensor.dtype)
    return hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()


def sums(lora: LoRA) -> dict[str, tuple[str, str, str, float]]:
    """What a LoRA does, exactly."""
    return {
        name: (digest(x.down), digest(x.up), digest(x.magnitude), x.rank if x.alpha is None else x.alpha)
        for name, x in lora.layers.items()
    }


KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
SUFFIXES = {"kohya": ("lora_down.weight", "lora_up.weight"), "peft": ("lora_A.weight", "lora_B.weight")}


def sgm(module: str) -> str:
    """kohya's name."""
    part, _, path = module.partition(".")
    return KOHYA[part] + SGM.get(module, path).replace(".", "_")


def hyper(module: str) -> str:
    """kohya's name with diffusers' blocks, as Hyper-SD has it."""
    part, _, path = module.partition(".")
    return KOHYA[part] + path.replace(".", "_")


def comfy(module: str) -> str:
    """ComfyUI's name."""
    part, _, path = module.partition(".")
    clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    return f"diffusion_model.{SGM[module]}" if part == "unet" else f"text_encoders.{clip[part]}.transformer.{path}"


def old(module: str) -> tuple[str, str]:
    """(module, joint before `down`) as diffusers had it before PEFT."""
    part, _, path = module.partition(".")
    parent, _, last = path.removesuffix(".0").rpartition(".")
    if part == "unet" and last in ("to_q", "to_k", "to_v", "to_out"):
        return f"unet.{parent}.processor.{last}", "_lora"
    if last in ("q_proj", "out_proj"):
        return f"{part}.{parent}.{'to_q' if last == 'q_proj' else 'to_out'}", "_lora"
    return module, ".lora" if part == "unet" or last == "text_projection" else ".lora_linear_layer"


def written(lora: LoRA, name: Callable[[str], str], style: str, *, alpha: bool = True) -> Arrays:
    """A file's arrays with kohya's or PEFT's suffixes."""
    down, up = SUFFIXES[style]
    found: Arrays = {}
    for module, layer in lora.layers.items():
        found[f"{name(module)}.{down}"] = layer.down.read()
        found[f"{name(module)}.{up}"] = layer.up.read()
        if alpha and layer.alpha is not None:
            found[f"{name(module)}.alpha"] = np.asarray(layer.alpha, np.float32)
    return found


def in_old_names(lora: LoRA, *, processor: bool) -> Arrays:
    """A file's arrays as diffusers wrote them before PEFT."""
    found: Arrays = {}
    for module, layer in lora.layers.items():
        stem, joint = old(module)
        stem = stem if processor else stem.replace(".processor", "")
        found[f"{stem}{joint}.down.weight"] = layer.down.read()
        found[f"{stem}{joint}.up.weight"] = layer.up.read()
        if layer.alpha is not None:
            found[f"{stem}{joint}.alpha"] = np.asarray(layer.alpha, np.float32)
    return found


FORMATS: dict[str, Callable[[LoRA], Arrays]] = {
    "kohya": lambda x: written(x, sgm, "kohya"),
    "kohya with diffusers' blocks": lambda x: written(x, hyper, "kohya"),
    "kohya of both": lambda x: written(x, lambda m: (sgm if "down" in m else hyper)(m), "kohya"),
    "dots with kohya's suffixes": lambda x: written(x, str, "kohya"),
    "ComfyUI": lambda x: written(x, comfy, "kohya"),
    "PEFT": lambda x: written(x, str, "peft"),
    "PEFT with the adapter's name": lambda x: {
        re.sub(r"(lora_[AB])", r"\1.default", k): v for k, v in written(x, str, "peft").items()
    },
    "PEFT without text_model": lambda x: written(x, lambda m: m.replace("text_model.", ""), "peft"),
    "PEFT without unet": lambda x: written(x, lambda m: m.removeprefix("unet."), "peft"),
    "PEFT wrapped": lambda x: written(x, lambda m: "base_model.model." + m.removeprefix("unet."), "peft"),
    "diffusers' processors": lambda x: in_old_names(x, processor=True),
    "diffusers' attention": lambda x: in_old_names(x, processor=False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_to_the_same_layers(name: str, model: Model, tmp_path: Path):
    lora = lora_of(model)
    arrays = FORMATS[name](lora)
    assert len({key.split(".alpha")[0] for key in arrays}) >= 2 * len(RANKS)
    found = read_lora(save(arrays, tmp_path / "lora.safetensors", {"ss_tag": "fox"}), model)
    assert sums(found) == sums(lora)
    assert found.metadata == {"ss_tag": "fox"}


def test_the_names_of_the_published_model_are_those_of_kohyas_files():
    base = UNetConfig.sdxl_base()
    names = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        ),
        "unet.up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2": (
            "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2"
        ),
        "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
        "unet.down_blocks.1.downsamplers.0.conv": "lora_unet_input_blocks_6_0_op",
        "unet.mid_block.attentions.0.proj_in": "lora_unet_middle_block_1_proj_in",
        "unet.mid_block.resnets.1.conv2": "lora_unet_middle_block_2_out_layers_3",
        "unet.conv_out": "lora_unet_out_2",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2": "lora_te2_text_model_encoder_layers_31_mlp_fc2",
    }
    for module, name in names.items():
        assert kohya_name(module, base) == name
    full = {part: tiny.FULL[part] for part in PARTS}
    parts = {part: {k: weight(part, k, s) for k, s in tiny.shapes_of(*made).items()} for part, made in full.items()}
    table = module_names(Model(parts, {"unet": base.to_json()}))
    assert all(table[name] == module for module, name in names.items())
    # The numbers that kohya's script prints: of linear layers in transformers, and of both text encoders'.
    modules = set(table.values())
    linear = [m for m in modules if m.startswith("unet.") and ".attentions." in m]
    assert len(linear) == 722
    assert len([m for m in modules if m.startswith("text") and "text_projection" not in m]) == 72 + 192


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64])
@pytest.mark.parametrize("value", [0, 2, None])
def test_alpha_may_be_of_any_dtype_and_zero_or_none_means_the_rank(
    dtype: Any, value: Any, model: Model, tmp_path: Path
):
    arrays = written(only(lora_of(model), QUERY), sgm, "kohya", alpha=False)
    if value is not None:
        arrays[f"{sgm(QUERY)}.alpha"] = np.full((1,) if value else (), value, dtype)
    layer = read_lora(save(arrays, tmp_path / "lora.safetensors"), model).layers[QUERY]
    assert (layer.alpha, layer.strength) == ((2, 0.5) if value else (None, 1.0))


def test_a_one_by_one_convolution_on_a_matrix_is_a_matrix_and_the_other_way_round(model: Model, tmp_path: Path):
    shortcut = "unet.down_blocks.1.resnets.0.conv_shortcut"
    lora = LoRA({k: v for k, v in lora_of(model).layers.items() if k in (QUERY, shortcut)})
    arrays = written(lora, sgm, "kohya")
    for key, x in arrays.items():
        if x.ndim:
            arrays[key] = x[:, :, None, None] if x.ndim == 2 else x[:, :, 0, 0]
    assert sums(read_lora(save(arrays, tmp_path / "lora.safetensors"), model)) == sums(lora)


ADAPTER = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}


def metadata_of(adapter: Mapping[str, Any], part: str = "unet.") -> dict[str, str]:
    """diffusers' metadata of one part."""
    return {ADAPTER_METADATA: json.dumps({part + key: value for key, value in adapter.items()})}


def test_alpha_is_in_the_metadata_by_patterns_of_the_ends_of_paths(model: Model, tmp_path: Path):
    lora = lora_of(model, ranks={k: v for k, v in RANKS.items() if k.startswith("unet")})
    patterns = {k.removeprefix("unet."): v for k, v in RANKS.items() if v != 4 and k.startswith("unet")}
    alphas = {"to_q": 1, r"attn\d\.to_k": 2.5, "^conv_in": 6, "in": 100, "linear_1$": 3, "onv1": 50}
    metadata = metadata_of({**ADAPTER, "rank_pattern": patterns, "alpha_pattern": alphas, "lora_dropout": 0.1})
    file = save(written(lora, str, "peft", alpha=False), tmp_path / "lora.safetensors", metadata)
    found = {name: layer.alpha for name, layer in read_lora(file, model).layers.items()}
    wanted = dict.fromkeys(found, 8) | {
        QUERY: 1,
        f"unet.{UP}.transformer_blocks.1.attn2.to_k": 2.5,
        "unet.conv_in": 6,
        "unet.time_embedding.linear_1": 3,
    }
    assert found == wanted


def test_patterns_of_text_encoders_fit_with_and_without_text_model(model: Model, tmp_path: Path):
    lora = only(lora_of(model), "text_encoder.")
    query, fc1 = (name.removeprefix("text_encoder.") for name in lora.layers)
    ranks = {"^" + query.removeprefix("text_model."): 4, f"^{fc1}": 2}
    metadata = metadata_of({"r": 1, "lora_alpha": 1, "rank_pattern": ranks}, "text_encoder.")
    file = save(written(lora, str, "peft", alpha=False), tmp_path / "lora.safetensors", metadata)
    assert {layer.strength for layer in read_lora(file, model).layers.values()} == {1 / 4, 1 / 2}


def test_rank_stabilised_alpha_is_divided_by_the_root_of_the_rank(model: Model, tmp_path: Path):
    arrays = written(only(lora_of(model), QUERY), str, "peft", alpha=False)
    file = save(arrays, tmp_path / "lora.safetensors", metadata_of({**ADAPTER, "use_rslora": True}))
    assert read_lora(file, model).layers[QUERY].strength == 8 / 4**0.5


def test_a_config_without_strength_has_that_of_peft(model: Model, tmp_path: Path):
    arrays = written(only(lora_of(model), QUERY), str, "peft", alpha=False)
    file = save(arrays, tmp_path / "lora.safetensors", metadata_of({"r": 4, "use_dora": False}))
    assert read_lora(file, model).layers[QUERY].strength == 8 / 4


def test_a_unet_saved_alone_has_its_config_without_prefix_or_beside_it(model: Model, tmp_path: Path):
    lora = only(lora_of(model), QUERY)
    bare = written(lora, lambda m: m.removeprefix("unet."), "peft", alpha=False)
    file = save(bare, tmp_path / "lora.safetensors", metadata_of(ADAPTER, ""))
    assert read_lora(file, model).layers[QUERY].strength == 2
    wrapped = save({f"base_model.model.{k}": v for k, v in bare.items()}, tmp_path / "adapter_model.safetensors")
    assert read_lora(wrapped, model).layers[QUERY].strength == 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert read_lora(wrapped, model).layers[QUERY].strength == 2


@pytest.mark.parametrize("module", [QUERY, CONV])
@pytest.mark.parametrize("form", ["flat", "column", "kohya", "peft"])
def test_a_magnitude_for_each_output_is_read_in_every_form(form: str, module: str, model: Model, tmp_path: Path):
    lora = only(lora_of(model, dora=True), module)
    layer = lora.layers[module]
    assert layer.magnitude is not None
    magnitude, ones = layer.magnitude.read(), (1,) * (len(layer.down.shape) - 1)
    key = "lora_magnitude_vector.default.weight" if form == "peft" else "dora_scale"
    name, style = (str, "peft") if form == "peft" else (sgm, "kohya")
    conv = (1, -1, *ones[1:]) if len(ones) > 1 else (-1,)
    shape = {"flat": (-1,), "column": (-1, 1), "kohya": (-1, *ones), "peft": conv}[form]
    arrays = {**written(lora, name, style), f"{name(module)}.{key}": magnitude.reshape(shape)}
    assert sums(read_lora(save(arrays, tmp_path / "lora.safetensors"), model)) == sums(lora)


@pytest.mark.parametrize("module", [QUERY, CONV, f"unet.{DOWN}.transformer_blocks.0.ff.net.0.proj"])
def test_a_magnitude_for_each_input_is_refused(module: str, model: Model, tmp_path: Path):
    """Even where the matrix is square: the shape is that of a row."""
    lora = only(lora_of(model), module)
    shape = (1, *lora.layers[module].down.shape[1:2], *(1,) * (len(lora.layers[module].down.shape) - 2))
    arrays = {**written(lora, sgm, "kohya"), f"{sgm(module)}.dora_scale": np.ones(shape, np.float32)}
    with pytest.raises(
        ValueError, match=r"dora_scale has shape \(1, .*a magnitude for each output .*wd_on_output=True"
    ):
        read_lora(save(arrays, tmp_path / "lora.safetensors"), model)


def reference(weight: np.ndarray, layers: list[tuple[Layer, float]]) -> np.ndarray:
    """The merged weight in float64."""
    own = total = weight.astype(np.float64)
    for layer, scale in layers:
        up, down = layer.up.read().astype(np.float64), layer.down.read().astype(np.float64)
        rank = down.shape[0]
        change = np.einsum("or,r...->o...", up.reshape(len(up), rank), down)
        change *= scale * (rank if layer.alpha is None else layer.alpha) / rank
        total = total + change
        if layer.magnitude is not None:
            norm = np.sqrt(np.square(own + change).reshape(len(up), -1).sum(1))
            total = np.einsum("o,o...->o...", layer.magnitude.read() / norm, total)
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dora", [(), (0,), (1,), (0, 1)])
def test_merged_weights_are_the_formulas(dora: tuple[int, ...], dtype: Any, model: Model):
    twice = {k: 5 for k in list(RANKS)[::2]}
    first, second = lora_of(model, dora=0 in dora), lora_of(model, ranks=twice, dora=1 in dora, salt=1)
    base = model.cast(np.dtype(dtype))
    merged = merge(base, [(first, 0.7), (second, -0.3)])
    for module, layer in first.layers.items():
        part, _, path = module.partition(".")
        key = f"{path}.weight"
        layers = [(layer, 0.7)] + ([(second.layers[module], -0.3)] if module in twice else [])
        before, found = base.parts[part][key].read(), merged.parts[part][key]
        wanted = reference(before, layers)
        assert (found.shape, found.dtype) == (wanted.shape, dtype)
        # One rounding: at most half a unit in the last place, and what float32 itself leaves.
        unit = 2e-6 + float(ml_dtypes.finfo(dtype).eps) / 2 * np.abs(wanted)
        assert (np.abs(found.read().astype(np.float64) - wanted) <= unit).all(), module
        assert tiny.relative_change(before.astype(np.float64), wanted) > 0.1


def test_what_no_layer_changes_stays_and_nothing_is_read_before_it_is_asked_for(model: Model):
    def forbidden() -> np.ndarray:
        raise AssertionError("was read")

    lora = only(lora_of(model), QUERY)
    down, up = (Tensor(t.shape, t.dtype, forbidden) for t in (lora.layers[QUERY].down, lora.layers[QUERY].up))
    closed = Layer(down, up)
    merged = merge(model, [(LoRA({QUERY: closed}), 1.0)])
    changed = {f"{p}.{k}" for p, ts in merged.parts.items() for k, t in ts.items() if t is not model.parts[p][k]}
    assert changed == {f"{QUERY}.weight"}
    with pytest.raises(AssertionError, match="was read"):
        merged.parts["unet"][f"{QUERY}.weight".removeprefix("unet.")].read()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["down", "up"])
def test_values_that_are_no_numbers_are_named_when_merged(value: float, which: str, model: Model, tmp_path: Path):
    arrays = written(only(lora_of(model), QUERY), sgm, "kohya")
    arrays[f"{sgm(QUERY)}.lora_{which}.weight"][1, 1] = value
    lora = read_lora(save(arrays, tmp_path / "lora.safetensors"), model)
    merged = merge(model, [(lora, 1.0)]).parts["unet"][f"{QUERY}.weight".removeprefix("unet.")]
    with pytest.raises(ValueError, match=rf"{QUERY}: the LoRA holds NaN or infinite values"):
        merged.read()


def test_what_does_not_fit_into_the_models_dtype_is_named_when_merged(model: Model):
    merged = merge(model.cast(np.dtype(np.float16)), [(only(lora_of(model), QUERY), 1e6)])
    with pytest.raises(ValueError, match=rf"{QUERY}: merged values overflow float16; give smaller scales"):
        merged.parts["unet"][f"{QUERY}.weight".removeprefix("unet.")].read()


def test_layers_that_do_not_fit_are_not_merged(model: Model):
    lora = only(lora_of(model), QUERY)
    with pytest.raises(ValueError, match=r"unet\.nothing: the model has no floating-point weight of it"):
        merge(model, [(LoRA({"unet.nothing": lora.layers[QUERY]}), 1.0)])
    with pytest.raises(
        ValueError, match=rf"{CONV}: the LoRA changes a weight \(48, 48\), the model's is \(32, 32, 3, 3\)"
    ):
        merge(model, [(LoRA({CONV: lora.layers[QUERY]}), 1.0)])
    with pytest.raises(ValueError, match="must be finite, is nan"):
        merge(model, [(lora, float("nan"))])


Q, C = sgm(QUERY), sgm(CONV)
BESIDE = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": r"a LoRA of Stable Diffusion 1 or 2 \(lora_te_\)",
    f"{Q}.hada_w1_a": f"a LoHa .* by its key {Q}.hada_w1_a; merge it",
    f"{Q}.lokr_w1": "a LoKr",
    f"{Q}.oft_blocks": "an OFT",
    f"{Q}.on_input": "IA3",
    f"{C}.lora_mid.weight": "lora_mid .*; train it without use_tucker",
    f"{C}.diff": r"whole weights beside it \(\.diff\)",
    f"{C}.diff_b": "whole weights beside it",
    "lllite_unet_input_blocks_4_1.down.0.weight": "a ControlNet-LLLite.*it is no LoRA",
    "lora_controlnet": "a Control-LoRA",
    f"{QUERY}.lora_B.bias": "a LoRA with biases",
    "bundle_emb.fox.clip_l": "a textual inversion",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "a LoRA of Flux",
    "transformer.x_embedder.lora_A.weight": "a LoRA of Flux",
    "lora_unet_joint_blocks_0_x_block.lora_down.weight": "Stable Diffusion 3",
    "fox": r"1 of its names \(fox\): no modules of this model; give a LoRA that was trained on it",
    "lora_te1_text_model_embeddings_token_embedding.lora_up.weight": "token_embedding.*no modules of this model",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": r"mlp_fc1\.alpha\): of modules that lack down or up",
    f"{hyper(QUERY)}.lora_up.weight": rf"{QUERY} is there twice, as lora_unet.*\.lora_up.* and as lora_unet.*\.lora_up",
}
"""A key that a good file has beside its own, and what is said of it."""

INSTEAD = {
    "fox": r"no key of a LoRA in it \(its first is fox\)",
    "model.diffusion_model.out.2.bias": r"no key of a LoRA in it \(a whole model\)",
    f"{Q}.lora_down.weight": r"lora_down.weight\): of modules that lack down or up; the file is incomplete",
    f"{Q}.alpha": "no key of a LoRA",
}

CHANGED: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "lora_up.weight, of another rank": (lambda x: x[:, 1:], r"down \(4, 48\) and up \(48, 3\) do not fit .*\(48, 48\)"),
    "lora_down.weight, narrower": (lambda x: x[:, 1:], r"down \(4, 47\) .* do not fit"),
    "lora_up.weight, shorter": (lambda x: x[1:], r"up \(47, 4\) do not fit"),
    "lora_down.weight, empty": (lambda x: x[:0], r"down \(0, 48\)"),
    "lora_down.weight, a number": (lambda x: x[0, 0], r"down \(\) and up"),
    "lora_down.weight, with a kernel": (lambda x: np.ones((4, 48, 3, 3)), r"down \(4, 48, 3, 3\)"),
    "lora_down.weight, integers": (lambda x: x.astype(np.int32), "is of int32, it must be floating-point"),
    "alpha, two": (lambda x: np.ones(2), r"alpha has shape \(2,\); one number is needed"),
    "alpha, not a number": (lambda x: np.asarray(np.nan), "alpha is nan; the file is damaged"),
}


OLDER = (
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight",
)


def refusal(arrays: Arrays, model: Model, folder: Path) -> str:
    """What is said of a file, after its name."""
    file = save(arrays, folder / "lora.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"{file}: ")) as caught:
        read_lora(file, model)
    return str(caught.value).removeprefix(f"{file}: ")


@pytest.mark.parametrize("key", BESIDE)
def test_a_key_that_is_no_loras_of_the_model_is_refused_by_name(key: str, model: Model, tmp_path: Path):
    arrays = written(only(lora_of(model), QUERY), sgm, "kohya")
    assert re.search(BESIDE[key], refusal(arrays | {key: np.ones((2, 2), np.float32)}, model, tmp_path))


@pytest.mark.parametrize("key", INSTEAD)
def test_a_file_that_has_no_layer_is_refused(key: str, model: Model, tmp_path: Path):
    assert re.search(INSTEAD[key], refusal({key: np.ones((2, 2), np.float32)}, model, tmp_path))
    assert "it is empty" in refusal({}, model, tmp_path)


@pytest.mark.parametrize("what", CHANGED)
def test_a_tensor_that_does_not_fit_is_refused(what: str, model: Model, tmp_path: Path):
    change, message = CHANGED[what]
    arrays = written(only(lora_of(model), QUERY), sgm, "kohya")
    key = f"{Q}.{what.split(',')[0]}"
    assert re.search(message, refusal(arrays | {key: change(arrays[key])}, model, tmp_path))


@pytest.mark.parametrize("key", OLDER)
def test_a_lora_of_an_older_stable_diffusion_is_known_by_its_width(key: str, model: Model, tmp_path: Path):
    for width, version in ((768, 1), (1024, 2)):
        said = refusal({key: np.ones((4, width))}, model, tmp_path)
        assert said.startswith(
            f"a LoRA of Stable Diffusion {version}: {key} reads text of width {width}, this model's is 80"
        )


def test_a_model_of_that_width_is_no_older_stable_diffusion(model: Model, tmp_path: Path):
    wide = Model(model.parts, {**model.configs, "unet": {**model.configs["unet"], "cross_attention_dim": 768}})
    arrays = {
        f"{hyper(QUERY.replace('attn1.to_q', 'attn2.to_k'))}.lora_{end}.weight": np.ones((4, 768))
        for end in ("down", "up")
    }
    assert "do not fit" in refusal(arrays, wide, tmp_path)


def test_a_pattern_that_is_written_fits_one_module_alone(model: Model, tmp_path: Path):
    write_peft(lora_of(model), tmp_path / "lora.safetensors")
    config = json.loads(open_file(tmp_path / "lora.safetensors")[1][ADAPTER_METADATA])
    for part in PARTS:
        paths = {m.removeprefix(f"{part}.") for m in module_names(model).values() if m.startswith(f"{part}.")}
        patterns = config[f"{part}.rank_pattern"] | config[f"{part}.alpha_pattern"]
        assert patterns
        for pattern in patterns:
            assert pattern.startswith("^") == (part == "unet")
            assert len([path for path in paths if re.match(rf"(.*\.)?({pattern})$", path)]) == 1


def test_of_many_unknown_modules_five_are_named(model: Model, tmp_path: Path):
    many = {f"lora_unet_fox_{i}.lora_{end}.weight": np.ones((2, 2)) for i in range(7) for end in ("down", "up")}
    assert re.search(
        r"^7 of its names \(lora_unet_fox_0, .*_4 and 2 more\): no modules", refusal(many, model, tmp_path)
    )


METADATA: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "is not JSON"),
    "no object": ("[1]", "must be a JSON object"),
    "another rank": (json.dumps({"unet.r": 3}), "rank 4, and the metadata say rank 3 and alpha 8"),
    "no strength": (json.dumps({"unet.r": 4, "unet.lora_alpha": 0}), "alpha 0"),
    "another alpha": (json.dumps({"unet.r": 4}), r"alpha is 0\.5, the metadata say 8; remove one"),
    "a word": (json.dumps({"unet.r": "four"}), "r must be a number, is four"),
    "no patterns": (json.dumps({"unet.rank_pattern": 3}), "rank_pattern must be numbers by pattern, is 3"),
    "a bad pattern": (json.dumps({"unet.rank_pattern": {"(": 3}}), r"pattern '\(' is no regular expression"),
    "PiSSA": (json.dumps({"unet.init_lora_weights": "pissa_niter_4"}), "has changed the model under the LoRA"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_cannot_be_followed_are_refused(name: str, model: Model, tmp_path: Path):
    raw, message = METADATA[name]
    arrays = written(only(lora_of(model), QUERY), str, "peft")
    file = save(arrays, tmp_path / "lora.safetensors", {ADAPTER_METADATA: raw})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: .*{message}"):
        read_lora(file, model)


@pytest.mark.parametrize("name", ["kohya", "PEFT"])
def test_text_layers_want_a_model_with_text_encoders(name: str, model: Model, tmp_path: Path):
    alone = Model({"unet": model.parts["unet"]}, model.configs)
    file = save(FORMATS[name](lora_of(model)), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"changes text_encoder .*the model has only unet; give the whole model"):
        read_lora(file, alone)


def in_dtype(lora: LoRA, dtype: Any) -> LoRA:
    """The layers in another dtype."""
    kind = np.dtype(dtype)

    def cast(x: Layer) -> Layer:
        return Layer(x.down.cast(kind), x.up.cast(kind), x.alpha, x.magnitude and x.magnitude.cast(kind))

    return LoRA({name: cast(layer) for name, layer in lora.layers.items()}, lora.metadata)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_files_there_and_back_are_bit_equal(dtype: Any, dora: bool, model: Model, tmp_path: Path):
    lora = in_dtype(lora_of(model, dora=dora), dtype)
    lora = (
        LoRA({**lora.layers, QUERY: Layer(lora.layers[QUERY].down, lora.layers[QUERY].up, 1 / 3)}) if not dora else lora
    )
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for file in files[::2]:
        write_kohya(lora, tiny.UNET, file)
        lora = read_lora(file, model)
        write_peft(lora, file.with_name(f"{int(file.stem) + 1}.safetensors"))
        lora = read_lora(file.with_name(f"{int(file.stem) + 1}.safetensors"), model)
    first, second = ([digest_file(file) for file in pair] for pair in (files[:2], files[2:]))
    assert first == second
    wanted = in_dtype(lora_of(model, dora=dora), dtype)
    found = sums(lora)
    assert found.keys() == wanted.layers.keys()
    for name, (down, up, magnitude, alpha) in sums(wanted).items():
        assert found[name][:3] == (down, up, magnitude)
        assert found[name][3] == (1 / 3 if name == QUERY and not dora else alpha)


def digest_file(file: Path) -> dict[str, str]:
    """What a file holds."""
    tensors, _ = open_file(file)
    return {key: digest(tensor) for key, tensor in tensors.items()}


def test_files_say_what_their_loaders_ask_for(model: Model, tmp_path: Path):
    lora = lora_of(model, ranks={k: 4 for k in RANKS})
    lora = LoRA(
        {k: Layer(x.down, x.up, 2.0) for k, x in lora.layers.items()}, {"ss_tag": "fox", "sshs_model_hash": "1"}
    )
    write_kohya(lora, tiny.UNET, tmp_path / "kohya.safetensors")
    tensors, metadata = open_file(tmp_path / "kohya.safetensors")
    assert metadata == {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_tag": "fox",
    }
    assert {k.split(".")[0] for k in tensors} == {sgm(module) for module in RANKS}
    assert len(tensors) == 3 * len(RANKS)
    write_peft(lora, tmp_path / "peft.safetensors")
    tensors, metadata = open_file(tmp_path / "peft.safetensors")
    assert tensors.keys() == {f"{module}.lora_{x}.weight" for module in RANKS for x in "AB"}
    config = json.loads(metadata.pop(ADAPTER_METADATA))
    assert metadata == {"format": "pt", "ss_tag": "fox"}
    assert {key: config[f"unet.{key}"] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")} == {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    assert config["text_encoder_2.target_modules"] == ["encoder.layers.2.self_attn.out_proj", "text_projection"]


def test_layers_of_which_only_some_are_dora_are_not_written_for_peft(model: Model, tmp_path: Path):
    mixed = {**lora_of(model).layers, QUERY: lora_of(model, dora=True).layers[QUERY]}
    with pytest.raises(ValueError, match="unet: some layers are DoRA and some not"):
        write_peft(LoRA(mixed), tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())
    write_kohya(LoRA(mixed), tiny.UNET, tmp_path / "lora.safetensors")
    assert sums(read_lora(tmp_path / "lora.safetensors", model)) == sums(LoRA(mixed))


WORDS = [
    *(
        "lora_unet_",
        "lora_te1_",
        "unet.",
        "text_encoder.",
        "base_model.model.",
        "text_model.",
        "x",
        ".",
        "_",
        "conv_in",
    ),
    *(".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", "_lora.down.weight", ".alpha"),
    *(
        ".dora_scale",
        ".lora_magnitude_vector",
        QUERY,
        sgm(QUERY),
        sgm(CONV),
        CONV,
        ".processor.",
        ".to_out",
        "attn2.to_k",
    ),
]
JUNK = st.dictionaries(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join),
    st.tuples(st.lists(st.sampled_from([0, 1, 4, 32, 48]), max_size=4), st.sampled_from(["f4", "f2", "i4", "?"])),
    max_size=6,
)
CONFIGS = st.dictionaries(
    st.sampled_from(["unet.r", "unet.lora_alpha", "unet.rank_pattern", "unet.alpha_pattern", "r", "unet.use_rslora"]),
    st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.dictionaries(st.text(max_size=3), st.integers()),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=JUNK, config=CONFIGS, whole=st.booleans())
def test_random_keys_shapes_and_configs_are_read_or_refused_and_nothing_else(
    junk: dict[str, tuple[list[int], str]], config: dict[str, Any], whole: bool, model: Model, tmp_path: Path
):
    arrays = {key: np.ones(shape, dtype) for key, (shape, dtype) in junk.items()}
    arrays |= written(only(lora_of(model), QUERY), str, "peft", alpha=False) if whole else {}
    file = save(arrays, tmp_path / "lora.safetensors", {ADAPTER_METADATA: json.dumps(config)})
    try:
        lora = read_lora(file, model)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        merge(model, [(lora, 1.0)])
