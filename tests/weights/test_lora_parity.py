"""LoRA files against diffusers: its pipeline makes of a file what our merged weights make, and loads what we write."""

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import parity_models as tiny
import parity_torch as theirs
import pytest
from safetensors.numpy import save_file

from sdxl_eqx.weights.lora import Layer, LoRA, merge, read_lora, write_kohya, write_peft
from sdxl_eqx.weights.lora_keys import kohya_name
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.read import clip_key
from sdxl_eqx.weights.tensors import Tensor

pytestmark = pytest.mark.parity

# As many layers in a block as SDXL has: diffusers counts blocks with this number.
UNET = dataclasses.replace(tiny.UNET, layers_per_block=2)
PARTS = ("unet", "text_encoder", "text_encoder_2")

DOWN, UP = "unet.down_blocks.1.attentions.1", "unet.up_blocks.0.attentions.2"
ATTENTION = {
    f"{DOWN}.transformer_blocks.0.attn1.to_q": 4,
    f"{DOWN}.transformer_blocks.0.attn1.to_out.0": 2,
    f"{DOWN}.transformer_blocks.0.attn2.to_v": 4,
    f"{UP}.transformer_blocks.1.attn2.to_k": 3,
    "unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q": 4,
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": 4,
    "text_encoder.text_model.encoder.layers.1.self_attn.out_proj": 2,
    "text_encoder_2.text_model.encoder.layers.1.self_attn.v_proj": 3,
    "text_encoder_2.text_model.encoder.layers.2.self_attn.out_proj": 4,
}
OTHERS = {
    f"{DOWN}.transformer_blocks.0.ff.net.0.proj": 4,
    f"{UP}.transformer_blocks.0.ff.net.2": 1,
    f"{UP}.proj_in": 4,
    "unet.mid_block.attentions.0.proj_out": 4,
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": 4,
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": 2,
}
CONVOLUTIONS = {
    "unet.conv_in": 2,
    "unet.conv_out": 4,
    "unet.time_embedding.linear_1": 4,
    "unet.down_blocks.0.resnets.1.conv1": 3,
    "unet.down_blocks.0.resnets.0.time_emb_proj": 4,
    "unet.down_blocks.1.resnets.0.conv_shortcut": 4,
    "unet.down_blocks.0.downsamplers.0.conv": 2,
    "unet.mid_block.resnets.1.conv2": 4,
    "unet.up_blocks.0.upsamplers.0.conv": 2,
    "unet.up_blocks.2.resnets.2.conv2": 4,
}
RANKS = ATTENTION | OTHERS | CONVOLUTIONS
"""Every kind of layer, of different ranks."""

Outputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """diffusers' and transformers' models without adapters."""
    return {
        "unet": theirs.their_unet(UNET),
        "text_encoder": theirs.their_text(tiny.TEXT),
        "text_encoder_2": theirs.their_text(tiny.TEXT_2),
    }


@pytest.fixture(scope="module")
def model(parts: Mapping[str, Any]) -> Model:
    """The same weights as ours."""
    found = {}
    for part, module in parts.items():
        name = clip_key if part == "text_encoder" else str
        state = {name(k): v for k, v in module.state_dict().items() if not k.endswith("position_ids")}
        found[part] = {key: Tensor.of(value.numpy()) for key, value in state.items()}
    return Model(found, {"unet": UNET.to_json()})


@pytest.fixture
def pipe(parts: Mapping[str, Any]) -> Iterator[Any]:
    """Their pipeline, which nothing has been loaded into, and which may not complain of what it loads."""
    with theirs.their_warnings_are_theirs():
        found = theirs.StableDiffusionXLPipeline(
            vae=None,
            tokenizer=None,
            tokenizer_2=None,
            scheduler=theirs.scheduler(theirs.EulerDiscreteScheduler),
            add_watermarker=False,
            **{part: copy.deepcopy(module) for part, module in parts.items()},
        )
        yield found


class Complaints(logging.Handler):
    """What diffusers and transformers log, which is where they say that keys are missing or unexpected."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.said.append(record.getMessage())


def load(pipe: Any, file: Path, name: str) -> None:
    """Load a file as an adapter; a complaint is a failure, but that a part has no layers is none."""
    complaints = Complaints()
    loggers = [logging.getLogger(package) for package in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(complaints)
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    finally:
        for logger in loggers:
            logger.removeHandler(complaints)
    # Of a second adapter transformers says that all the first one's keys are missing; those stay as they are.
    lines = [line for said in complaints.said for line in said.splitlines()]
    assert not [line for line in lines if "lora_" in line and f".{name}" in line]


def adapter(pipe: Any, name: str) -> dict[str, np.ndarray]:
    """Every tensor of an adapter that the pipeline holds, under the names of our layers."""
    found = {}
    for part in PARTS:
        for key, value in getattr(pipe, part).state_dict().items():
            if f".{name}" in key:
                full = clip_key(key) if part == "text_encoder" else key
                found[f"{part}.{full.replace(f'.{name}', '')}"] = value.numpy()
    return found


def outputs(parts: Mapping[str, Any]) -> Outputs:
    """What UNet and text encoders make of inputs."""
    inputs = tiny.unet_inputs(UNET, (8, 12))
    found = {"unet": theirs.their_output(parts["unet"], inputs)}
    for part, ids in zip(("text_encoder", "text_encoder_2"), tiny.prompt_ids(), strict=True):
        states, pooled = theirs.their_states(parts[part], ids)
        found |= {part: states, f"{part}, pooled": pooled}
    return found


def merged_outputs(parts: Mapping[str, Any], model: Model) -> Outputs:
    """The outputs of the same modules with our weights."""
    holding = {}
    for part, module in parts.items():
        holding[part] = copy.deepcopy(module)
        name = clip_key if part == "text_encoder" else str
        state = {k: theirs.torch.from_numpy(model.parts[part][name(k)].read().copy()) for k in module.state_dict()}
        holding[part].load_state_dict(state)
    return outputs(holding)


def lora_of(model: Model, ranks: Mapping[str, int], *, dora: bool = False, alpha: float | None = 3.0) -> LoRA:
    """Random layers that change a weight by about half its size."""
    layers = {}
    for module, rank in ranks.items():
        part, _, path = module.partition(".")
        weight = model.parts[part][f"{path}.weight"]
        rng = tiny.generator("lora", module, rank, len(ranks))
        inner = weight.shape[1:]
        down = (rng.standard_normal((rank, *inner)) / np.sqrt(np.prod(inner) * rank)).astype(np.float32)
        up = (0.5 * rng.standard_normal((weight.shape[0], rank, *(1,) * len(inner[1:])))).astype(np.float32)
        norm = np.linalg.norm(weight.read().reshape(len(up), -1), axis=1)
        magnitude = (norm * rng.uniform(0.8, 1.2, len(norm))).astype(np.float32)
        layers[module] = Layer(Tensor.of(down), Tensor.of(up), alpha, Tensor.of(magnitude) if dora else None)
    return LoRA(layers)


def assert_same(ours: Outputs, wanted: Outputs, plain: Outputs, changed: tuple[str, ...] = PARTS) -> None:
    """Equal to what float32 allows, and far from what the model makes without a LoRA."""
    for name, value in wanted.items():
        tiny.assert_close(ours[name], value, 1e-5)
    for part in changed:
        assert tiny.relative_change(plain[part], wanted[part]) > 0.05


def save(lora: LoRA, names: tuple[str, str, str], name: Callable[[str], str], file: Path, **metadata: str) -> Path:
    """A file with those endings of down, up and alpha."""
    arrays = {}
    for module, layer in lora.layers.items():
        values = (layer.down.read(), layer.up.read(), np.float32(layer.alpha or 0))
        arrays |= {f"{name(module)}{end}": np.asarray(x) for end, x in zip(names, values, strict=True) if end}
    save_file(arrays, file, {"format": "pt", **metadata})
    return file


KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")


def hyper(module: str) -> str:
    """kohya's name with diffusers' blocks."""
    part, _, path = module.partition(".")
    start = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
    return start + path.replace(".", "_")


@pytest.mark.parametrize("style", ["Stability AI's blocks", "diffusers' blocks"])
def test_kohyas_files_are_merged_as_diffusers_runs_them(
    style: str, parts: Mapping[str, Any], model: Model, pipe: Any, tmp_path: Path
):
    # One alpha for all: diffusers 0.42 looks up those of attention by names that no module has, and gives it the most
    # common one. It also takes only one of the two styles from a file that has both, and alpha 0 for no effect.
    lora = lora_of(model, RANKS)
    name = hyper if style == "diffusers' blocks" else (lambda module: kohya_name(module, UNET))
    file = save(lora, KOHYA, name, tmp_path / "lora.safetensors")
    load(pipe, file, "one")
    pipe.set_adapters("one", 0.7)
    found = read_lora(file, model)
    assert found.layers.keys() == lora.layers.keys()
    ours = merged_outputs(parts, merge(model, [(found, 0.7)]))
    assert_same(ours, outputs(pipe.components), outputs(parts))


OLD_LAYERS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def processor(module: str) -> str:
    """diffusers' first names: of a UNet's attention processor, and of a text encoder's attention after the UNet's."""
    parent, _, last = module.removesuffix(".to_out.0").rpartition(".")
    if module.endswith(".to_out.0"):
        return f"{module.removesuffix('.to_out.0')}.processor.to_out_lora"
    if last in OLD_LAYERS:
        return f"{parent}.{OLD_LAYERS[last]}_lora"
    if ".attn" in module:
        return f"{parent}.processor.{last}_lora"
    return f"{module}.lora" if module.startswith("unet") else f"{module}.lora_linear_layer"


def monkey_patched(module: str) -> str:
    """diffusers' next names, before PEFT."""
    return f"{module}.lora" if module.startswith("unet") else f"{module}.lora_linear_layer"


@pytest.mark.parametrize("name", [processor, monkey_patched])
def test_files_from_before_peft_are_merged_as_diffusers_runs_them(
    name: Callable[[str], str], parts: Mapping[str, Any], model: Model, pipe: Any, tmp_path: Path
):
    """They have no alpha."""
    lora = lora_of(model, RANKS, alpha=None)
    file = save(lora, (".down.weight", ".up.weight", ""), name, tmp_path / "lora.safetensors")
    load(pipe, file, "one")
    pipe.set_adapters("one", -0.6)
    ours = merged_outputs(parts, merge(model, [(read_lora(file, model), -0.6)]))
    assert_same(ours, outputs(pipe.components), outputs(parts))


def test_two_loras_of_other_ranks_and_formats_are_merged_with_their_scales(
    parts: Mapping[str, Any], model: Model, pipe: Any, tmp_path: Path
):
    first, second = lora_of(model, RANKS), lora_of(model, {module: 5 for module in [*RANKS][::2]}, alpha=None)
    files = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save(first, KOHYA, hyper, files[0])
    save(second, (".lora_A.weight", ".lora_B.weight", ""), str, files[1])
    load(pipe, files[0], "one")
    load(pipe, files[1], "two")
    pipe.set_adapters(["one", "two"], [0.8, 0.3])
    loras = [(read_lora(file, model), scale) for file, scale in zip(files, (0.8, 0.3), strict=True)]
    assert_same(merged_outputs(parts, merge(model, loras)), outputs(pipe.components), outputs(parts))


def with_alphas(lora: LoRA) -> LoRA:
    """The same with an alpha of its own for every layer."""
    layers = {name: dataclasses.replace(x, alpha=1 + i / 4) for i, (name, x) in enumerate(lora.layers.items())}
    return LoRA(layers)


def held(lora: LoRA) -> dict[str, np.ndarray]:
    """Every tensor of a LoRA under PEFT's names."""
    found = {}
    for name, x in lora.layers.items():
        found |= {f"{name}.lora_A.weight": x.down.read(), f"{name}.lora_B.weight": x.up.read()}
        if x.magnitude is not None:
            found[f"{name}.lora_magnitude_vector.weight"] = x.magnitude.read()
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_our_peft_file_whole_with_every_rank_and_alpha(
    dora: bool, parts: Mapping[str, Any], model: Model, pipe: Any, tmp_path: Path
):
    # Of a kohya file diffusers 0.42 overlooks this one's rank, so that only PEFT's can have it of another.
    lora = with_alphas(lora_of(model, RANKS | {"text_encoder_2.text_projection": 1}, dora=dora))
    file = tmp_path / "lora.safetensors"
    write_peft(lora, file)
    load(pipe, file, "one")
    theirs_hold = adapter(pipe, "one")
    wanted = held(lora)
    assert theirs_hold.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(theirs_hold[key].reshape(value.shape), value, err_msg=key)
    pipe.set_adapters("one", 0.7)
    ours = merged_outputs(parts, merge(model, [(lora, 0.7)]))
    assert_same(ours, outputs(pipe.components), outputs(parts))


def test_diffusers_loads_our_kohya_file_whole(parts: Mapping[str, Any], model: Model, pipe: Any, tmp_path: Path):
    lora = lora_of(model, RANKS)
    file = tmp_path / "lora.safetensors"
    write_kohya(lora, UNET, file)
    load(pipe, file, "one")
    theirs_hold, wanted = adapter(pipe, "one"), held(lora)
    assert theirs_hold.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(theirs_hold[key], value, err_msg=key)
    pipe.set_adapters("one", 1.0)
    assert_same(merged_outputs(parts, merge(model, [(lora, 1.0)])), outputs(pipe.components), outputs(parts))


@pytest.mark.parametrize("order", [("dora", "plain"), ("plain", "dora"), ("dora", "other")])
def test_a_dora_beside_another_lora_is_merged_as_diffusers_runs_them(
    order: tuple[str, str], parts: Mapping[str, Any], model: Model, pipe: Any, tmp_path: Path
):
    loras = {
        "dora": lora_of(model, RANKS, dora=True),
        "plain": lora_of(model, dict.fromkeys(RANKS, 2)),
        "other": lora_of(model, dict.fromkeys([*RANKS][::2], 3), dora=True),
    }
    for name in order:
        write_peft(loras[name], tmp_path / f"{name}.safetensors")
        load(pipe, tmp_path / f"{name}.safetensors", name)
    pipe.set_adapters([*order], [0.9, 0.4])
    ours = merged_outputs(parts, merge(model, list(zip([loras[name] for name in order], (0.9, 0.4), strict=True))))
    assert_same(ours, outputs(pipe.components), outputs(parts))


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_what_diffusers_saves_is_read_as_it_was_trained(
    changes: dict[str, Any], parts: Mapping[str, Any], model: Model, pipe: Any, tmp_path: Path
):
    """Its training script's way: PEFT's adapters and their configs, by diffusers' own writer."""
    with theirs.their_warnings_are_theirs():
        import peft

        states = {}
        for part in PARTS:
            unet = part == "unet"
            config = peft.LoraConfig(
                r=4,
                lora_alpha=9,
                init_lora_weights=False,
                target_modules=["to_q", "to_out.0", "conv1", "proj_in"] if unet else ["q_proj", "out_proj", "fc1"],
                rank_pattern={"to_q": 2, "^mid_block.attentions.0.proj_in": 3, "0.mlp.fc1": 5},
                alpha_pattern={r"attn\d.to_q": 9, "layers.1.self_attn.out_proj": 1},
                **changes,
            )
            module = getattr(pipe, part)
            theirs.torch.manual_seed(0)
            module.add_adapter(config, "default")
            states[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(module, adapter_name="default")
            states[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
            # PEFT's random layers are of size one.
            for key, value in module.state_dict().items():
                if "lora_B" in key:
                    value.mul_(0.1)
        pipe.save_lora_weights(tmp_path, **states)
    found = read_lora(tmp_path / "pytorch_lora_weights.safetensors", model)
    wanted, ours = adapter(pipe, "default"), held(found)
    assert ours.keys() == wanted.keys()
    assert {layer.rank for layer in found.layers.values()} == {2, 3, 4, 5}
    merged = merged_outputs(parts, merge(model, [(found, 1.0)]))
    assert_same(merged, outputs(pipe.components), outputs(parts))
