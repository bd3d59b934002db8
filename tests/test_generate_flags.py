"""The command line that draws: its flags and YAML keys, the rules of their values, and the files of training runs."""

import ast
import dataclasses
import inspect
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_eqx.config import FlashBlockSizes, GenerateConfig, TrainConfig, flat, groups, is_flat, to_yaml
from sdxl_eqx.config import generate as generate_module
from sdxl_eqx.config import shared as shared_module
from sdxl_eqx.config.generate import Pair, Span, generate_rules
from sdxl_eqx.config.rules import plain
from sdxl_eqx.config.shared import AXIS_RULES, MESH_AXES, SCHEDULERS, Axes, AxisRules, Bools, Floats, Texts
from sdxl_eqx.flags import GENERATE_NAMES, GENERATE_SWITCHES, NAMES, command_line, merge, parse_generate, read, switches

TOKEN = "hf_topsecret"
DEFAULT = GenerateConfig()

Values = dict[str, Any]
Refusal = Callable[[Sequence[str]], str]
Yaml = Callable[[str], str]

NETS: Values = {"controlnet_model_name_or_path": ("canny", "depth"), "controlnet_image": ("a.png", "b.png")}
LORAS: Values = {"lora_config.lora_model_name_or_path": ("a", "b", "c")}
FRACTIONS: list[Any] = [(-0.1,), (1.1,), (math.nan,), (0.5, 2.0), (0.1, 0.2, 0.3)]

BAD: dict[str, list[Any]] = {
    "seed": [-1, 2**32],
    "flash_min_seq_length": [-1],
    **{f"flash_block_sizes.{name}": [0, -128] for name in FlashBlockSizes.__annotations__ if name.startswith("block_")},
    "diffusion_scheduler_config._class_name": ["Eulr", "KDPM2DiscreteScheduler"],
    "diffusion_scheduler_config.algorithm_type": ["sde-dpmsolver++", "dpmsolver++"],
    "guidance_scale": [-0.1, math.inf, math.nan],
    "guidance_rescale": [-0.1, 1.1, math.nan],
    "num_inference_steps": [0, 1001],
    "caption_chunks": [0, -1],
    "num_images_per_prompt": [0, -1],
    "width": [-8, 4, 1020],
    "height": [-8, 4, 1020],
    **{f"{kind}_size": [(0, 8), (8, -1)] for kind in ("original", "target", "negative_original", "negative_target")},
    "guidance_interval": [(0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0), (0.0, math.nan)],
    "eta": [-0.1, 1.1, math.nan],
    "strength": [-0.1, 1.1, math.nan],
    "mask_image": ["mask.png"],
    "refiner_fraction": [0.0, 1.0, math.nan],
    "aesthetic_score": [math.inf, math.nan],
    "negative_aesthetic_score": [-math.inf, math.nan],
    "control_guidance_start": FRACTIONS,
    "control_guidance_end": [*FRACTIONS, (0.0,), (0.5, 0.0)],
    "canny_low": [-1],
    "canny_high": [99],
    **{f"lora_config.{key}": [("x", "y")] for key in ("weight_name", "adapter_name")},
    "lora_config.scale": [(1.0, 2.0), (1.0, 2.0, 3.0, 4.0), (math.inf,), (1.0, math.nan, 1.0)],
    "lora_config.from_pt": [(True, False)],
    "lightning_ckpt": [""],
    "controlnet_conditioning_scale": [(0.1, 0.2, 0.3), (math.nan,), (0.5, math.inf)],
    "controlnet_image": [None, ("a.png", "b.png", "c.png")],
    "mesh_axes": [(), ("data", "fsdp", "context"), ("data", "fsdp", "context", "heads")],
    "dcn_data_parallelism": [0, -2],
    "ici_data_parallelism": [0, -2],
    **{  # -1 beside the -1 of data
        f"{kind}_{axis}_parallelism": [0, -2, -1] for kind in ("dcn", "ici") for axis in ("fsdp", "context", "tensor")
    },
    "logical_axis_rules": [(("embd", ("fsdp",)),), (("embed", ("fsdb",)),), (("embed", ("fsdp", "fsdp")),)],
    "batch_size": [-1],
    "vae_tile": [-64, 64, 192 + 32],
}
"""Values that each rule must refuse, by key."""

BESIDE: dict[str, Values] = {
    "diffusion_scheduler_config.algorithm_type": {"diffusion_scheduler_config._class_name": "DDIM"},
    **dict.fromkeys(("control_guidance_start", "control_guidance_end"), NETS),
    **dict.fromkeys(("controlnet_conditioning_scale", "controlnet_image"), NETS),
    **{f"lora_config.{key}": LORAS for key in ("weight_name", "adapter_name", "scale", "from_pt")},
    "lightning_ckpt": {"lightning_repo": "ByteDance/SDXL-Lightning"},
}
"""What else must be said for a rule to have something to refuse."""

GOOD: list[Values] = [
    {"seed": 2**32 - 1, "num_inference_steps": 1000, "guidance_scale": 0.0, "guidance_rescale": 1.0, "eta": 1.0},
    {"width": 8, "height": 1032, "original_size": (1, 1), "crops_coords_top_left": (-8, 0), "vae_tile": 128},
    {"guidance_interval": (0.5, 0.5), "canny_low": 200, "image": "a.png", "mask_image": "m.png", "strength": 1.0},
    {"prompts_file": "p.txt", "mask_image": "m.png"},
    {"diffusion_scheduler_config.algorithm_type": "sde-dpmsolver++"},
    {**NETS, "controlnet_conditioning_scale": (0.5,), "control_guidance_start": (0.0, 0.999)},
    {**NETS, "control_guidance_start": (0.25, 0.75), "control_guidance_end": (0.5, 1.0)},
    {"control_guidance_start": (1.0,)},
    {**NETS, "controlnet_image": ("a.png",), "controlnet_conditioning_scale": (0.5, -1.0)},
    {**LORAS, "lora_config.scale": (1.0, -2.0, 0.0), "lora_config.from_pt": (True,)},
    {"lightning_repo": "folder", "lightning_ckpt": "a.safetensors"},
    {"ici_data_parallelism": 1, "ici_tensor_parallelism": -1, "logical_axis_rules": (("embed", ()),)},
]
"""Values at the edge of a rule."""


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The message that refuses a command line: exit code 2, one line on stderr, no traceback, nothing on stdout."""

    def refuse(argv: Sequence[str]) -> str:
        with pytest.raises(SystemExit) as exit_:
            parse_generate(argv)
        out, err = capsys.readouterr()
        assert exit_.value.code == 2
        assert out == ""
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        return err

    return refuse


@pytest.fixture
def written(tmp_path: Path) -> Yaml:
    """Writes a YAML file and returns its path."""

    def write(text: str) -> str:
        file = tmp_path / "draw.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


def value(config: GenerateConfig, key: str) -> Any:
    """The value of a published name."""
    return getattr(getattr(config, GENERATE_NAMES[key].group), GENERATE_NAMES[key].field)


def example(key: str) -> Any:
    """A valid value of a name that is not its default."""
    kind, default = GENERATE_NAMES[key].type, value(DEFAULT, key)
    if key == "diffusion_scheduler_config._class_name":
        return "FlaxDDIMScheduler"
    if key == "canny_low":
        return 16  # not above canny_high
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice not in (default, ""))
    if kind is bool:
        return not default
    if kind == Axes:
        return default[::-1]
    by_type: dict[Any, Any] = {
        str: "other", int: 256, float: 0.5, int | None: 16, bool | None: True, Texts: ("one",), Floats: (0.25,),
        Bools: (False,), Pair: (1024, 768), Span: (0.25, 0.5), AxisRules: (("heads", ()),),
    }  # fmt: skip
    return by_type[kind]


def shown(key: str, config: GenerateConfig) -> Any:
    """A value as it was given: of logical_axis_rules, those that are not the default."""
    found = value(config, key)
    return tuple(rule for rule in found if rule not in AXIS_RULES) if key == "logical_axis_rules" else found


def written_as(new: Any) -> str:
    """A value as it is written after a flag."""
    return yaml.safe_dump(plain(new), default_flow_style=True).strip() if isinstance(new, tuple) else str(new)


def entries(values: Values) -> Values:
    """Keys with their values as a file has them."""
    found: Values = {}
    for key, new in values.items():
        outer, _, inner = key.partition(".")
        if inner:
            found.setdefault(outer, {})[inner] = plain(new)
        else:
            found[outer] = plain(new)
    return found


# Rules


def test_the_table_of_bad_values_covers_every_rule():
    assert set(BAD) == {name for name, _, _ in generate_rules(DEFAULT)}


@pytest.mark.parametrize(("key", "new"), [(key, new) for key, values in BAD.items() for new in values])
def test_a_rule_refuses_a_bad_value_and_names_its_flag_the_value_and_the_rule(key: str, new: Any):
    before = merge(DEFAULT, BESIDE.get(key, {}))
    with pytest.raises(ValueError, match=r"^--") as error:
        merge(before, {key: new}).check()
    said = f"{GENERATE_NAMES[key].flag} {plain(new)!r}: "
    rules = [said + rule for name, rule, _ in generate_rules(before) if name == key]
    assert str(error.value) in rules


@pytest.mark.parametrize("key", ["width", "guidance_interval", "lora_config.scale", "controlnet_image", "mesh_axes"])
def test_a_rules_refusal_is_one_line_of_the_command_line(key: str, refusal: Refusal, written: Yaml):
    file = written(yaml.safe_dump(entries(BESIDE.get(key, {})) or {"seed": 0}))
    new = "none" if BAD[key][0] is None else written_as(BAD[key][0])
    message = refusal(["--config", file, f"{GENERATE_NAMES[key].flag}={new}"])
    assert message.startswith(f"error: {GENERATE_NAMES[key].flag} {plain(BAD[key][0])!r}: ")


@pytest.mark.parametrize("values", [{}, *GOOD])
def test_values_at_the_edge_of_a_rule_are_taken(values: Values):
    merge(DEFAULT, values).check()


def test_a_picture_for_no_controlnet_is_refused_with_what_is_missing(refusal: Refusal):
    message = refusal(["--controlnet-image", "a.png"])
    assert "--controlnet-image ['a.png']: name a --controlnet-model-name-or-path" in message


# Names


@pytest.mark.parametrize("key", GENERATE_NAMES)
def test_every_published_name_is_a_flag_and_a_key(key: str, written: Yaml, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(switches, "GENERATE_SWITCHES", ())
    monkeypatch.setattr(GenerateConfig, "check", lambda self: None)
    new = example(key)
    assert new != value(DEFAULT, key)
    assert shown(key, parse_generate([f"{GENERATE_NAMES[key].flag}={written_as(new)}"])) == new
    assert read(written(yaml.safe_dump(entries({key: new}))), GENERATE_NAMES) == {key: new}


def test_nothing_given_draws_the_default():
    assert parse_generate([]) == DEFAULT


def test_no_name_is_in_two_groups():
    parts = groups(DEFAULT)
    fields = [f.name for name, part in parts.items() if is_flat(name) for f in dataclasses.fields(part)]
    assert len(fields) == len(set(fields))
    assert not set(fields) & {name for name in parts if not is_flat(name)}


def undescribed(module: ModuleType) -> list[str]:
    """The fields of a module's classes with no text below them."""
    found = []
    for node in ast.parse(inspect.getsource(module)).body:
        for i, field in enumerate(node.body if isinstance(node, ast.ClassDef) else []):
            if isinstance(node, ast.ClassDef) and isinstance(field, ast.AnnAssign):
                after = node.body[i + 1] if i + 1 < len(node.body) else None
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                if not isinstance(text, str) or len(text) <= 10:
                    found.append(f"{node.name}.{ast.unparse(field.target)}")
    return found


@pytest.mark.parametrize("module", [shared_module, generate_module])
def test_every_field_says_what_it_means(module: ModuleType):
    parts = {f"GenerateConfig.{name}" for name in groups(DEFAULT)}  # a group's class says what it is
    assert not set(undescribed(module)) - parts


def test_the_help_shows_every_flag_and_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        parse_generate(["--help"])
    assert not exit_.value.code
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 100] == []
    for name in GENERATE_NAMES.values():
        assert f"{name.flag} " in out or f"{name.flag}, " in out, name.flag
    assert "What is to be seen." in out and "first captions of the data set" not in out
    assert "--config FILE" in out


def test_an_unknown_flag_is_refused_with_the_nearest_name(refusal: Refusal):
    assert "--num-inference-step: no such flag; did you mean --num-inference-steps?" in refusal(
        ["--num-inference-step", "3"]
    )
    assert "did you mean --lora-config.scale?" in refusal(["--lora-config.scal", "3"])
    # A flag of training is none here.
    assert "--max-train-steps: no such flag" in refusal(["--max-train-steps", "3"])


# Lists


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (["--lora-config.from-pt", "True", "False"], "lora_config.from_pt", (True, False)),
        (["--lora-config.from-pt", "true"], "lora_config.from_pt", (True,)),
        (["--lora-config.from-pt", "[True, no]"], "lora_config.from_pt", (True, False)),
        (["--lora_config.scale", "0.8", "5e-1", "-1"], "lora_config.scale", (0.8, 0.5, -1.0)),
        (["--lora-config.scale=[0.8, 0.5]"], "lora_config.scale", (0.8, 0.5)),
        (["--lora-config.scale", "none"], "lora_config.scale", None),
        (["--lora-config.scale", "[]"], "lora_config.scale", None),
        (["--lora-config.adapter-name", "a b", "c"], "lora_config.adapter_name", ("a b", "c")),
        (["--lora-config.adapter-name", "a, b"], "lora_config.adapter_name", ("a, b",)),
        (["--lora-config.adapter-name", "a, b", "c: d", "#e"], "lora_config.adapter_name", ("a, b", "c: d", "#e")),
        (
            ["--lora-config.adapter-name", "é", "🐱", 'q"', "C:\\x"],
            "lora_config.adapter_name",
            ("é", "🐱", 'q"', "C:\\x"),
        ),
        (["--lora-config.adapter-name", "null", "1e3"], "lora_config.adapter_name", ("null", "1e3")),
        (["--lora-config.weight-name", "", "b"], "lora_config.weight_name", ("", "b")),
        (["--controlnet-image", "https://a.b/c.png?d=e&f", "x"], "controlnet_image", ("https://a.b/c.png?d=e&f", "x")),
        (["--original-size", "1024", "768"], "original_size", (1024, 768)),
        (["--original-size", "1024x768"], "original_size", (1024, 768)),
        (["--original-size=[1024, 7.68e2]"], "original_size", (1024, 768)),
        (["--original-size", "none"], "original_size", None),
        (["--crops-coords-top-left", "-8", "0"], "crops_coords_top_left", (-8, 0)),
        (["--guidance-interval", "0.2", "0.8"], "guidance_interval", (0.2, 0.8)),
        (["--guidance-interval", "[0, 0.8]"], "guidance_interval", (0.0, 0.8)),
        (["--mesh-axes", "tensor", "data", "context", "fsdp"], "mesh_axes", ("tensor", "data", "context", "fsdp")),
    ],
)
def test_a_list_is_several_words_a_list_of_yaml_or_one_value(
    words: list[str], key: str, expected: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(switches, "GENERATE_SWITCHES", ())
    monkeypatch.setattr(GenerateConfig, "check", lambda self: None)
    config = parse_generate([*words, "--seed", "1"])
    assert (value(config, key), config.machine.seed) == (expected, 1)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--lora-config.from-pt", "True", "maybe"], ["--lora-config.from-pt", "maybe", "true or false, or a list"]),
        (["--lora-config.scale", "0.8", "strong"], ["--lora-config.scale", "strong", "a number, or a list"]),
        (["--lora-config.scale", "[[1]]"], ["--lora-config.scale '[[1]]'", "a number, or a list"]),
        (["--lora-config.adapter-name", "[a"], ["--lora-config.adapter-name '[a'", "a text, or a list"]),
        (["--original-size", "64"], ["--original-size '64'", "two whole numbers, as [1024, 768] or 1024x768"]),
        (["--original-size", "1", "2", "3"], ["--original-size", "two whole numbers"]),
        (["--original-size", "1024x"], ["--original-size '1024x'", "two whole numbers"]),
        (["--original-size", "1024x768x3"], ["--original-size '1024x768x3'", "two whole numbers"]),
        (["--original-size", "1.5x2"], ["--original-size '1.5x2'", "two whole numbers"]),
        (["--original-size", "{a: 1, b: 2}"], ["--original-size '{a: 1, b: 2}'", "two whole numbers"]),
        (["--guidance-interval", "0.5"], ["--guidance-interval '0.5'", "two numbers, as [0, 0.8]"]),
        (["--guidance-interval", "none"], ["--guidance-interval 'none'", "two numbers"]),
        (["--guidance-interval", "0.6", "0.4"], ["--guidance-interval [0.6, 0.4]", "the second not less"]),
        (["--lora-config.scale"], ["--lora-config.scale: a value must follow"]),
        (["--prompt", "a", "house"], ["--prompt: more than one value", "quotes"]),
    ],
)
def test_a_wrong_list_is_refused_with_flag_value_and_rule(words: list[str], parts: list[str], refusal: Refusal):
    message = refusal(words)
    assert all(part in message for part in parts), message


# The YAML file


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("lora_config: {scale: 0.5}", "lora_config.scale", (0.5,)),
        ("lora_config:\n  scale:\n  - 5e-1\n  - 1", "lora_config.scale", (0.5, 1.0)),
        ("lora_config: {from_pt: [true, no]}", "lora_config.from_pt", (True, False)),
        ("lora_config: {weight_name: ['', 007]}", "lora_config.weight_name", ("", "007")),
        ("lora_config: {adapter_name: [null, 'a, b']}", "lora_config.adapter_name", ("null", "a, b")),
        ("lora_config:", "lora_config.scale", None),
        ("original_size: [1024, 768]", "original_size", (1024, 768)),
        ("original_size: 1024x768", "original_size", (1024, 768)),
        ("original_size:", "original_size", None),
        ("guidance_interval: [0, 0.5]", "guidance_interval", (0.0, 0.5)),
        ("prompt: yes", "prompt", "yes"),
    ],
)
def test_values_of_a_file_are_read_as_the_type_of_the_field(text: str, key: str, expected: Any, written: Yaml):
    got = read(written(text), GENERATE_NAMES).get(key)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora_config: {scal: 1}", ["lora_config.scal: no such key; did you mean lora_config.scale?"]),
        ("lora_config: {scale: 1, strength: 2}", ["lora_config.strength: no such key"]),
        ("lora_config: [a]", ["lora_config", "must be a mapping"]),
        ("diffusion_scheduler_config: {prediction: v}", ["diffusion_scheduler_config.prediction: no such key"]),
        ("num_inference_step: 3", ["num_inference_step: no such key; did you mean num_inference_steps?"]),
        ("max_train_step: 3", ["max_train_step: no such key"]),
        ("original_size: [1, 2, 3]", ["original_size", "[1, 2, 3]", "two whole numbers"]),
        ("original_size: {a: 1}", ["original_size", "{a: 1}", "two whole numbers"]),
        ("guidance_interval: [[0, 1]]", ["guidance_interval", "two numbers"]),
        ("guidance_interval:", ["guidance_interval", "two numbers"]),
        ("lora_config: {from_pt: [1, 2]}", ["lora_config.from_pt", "[1, 2]", "true or false"]),
        ("prompt: [a]", ["prompt", "a list", "single value"]),
        ("width: 12", ["--width 12", "a multiple of 8"]),
    ],
)
def test_a_wrong_file_is_refused_with_file_key_value_and_rule(
    text: str, parts: list[str], written: Yaml, refusal: Refusal
):
    file = written(text)
    message = refusal(["--config", file])
    assert all(part in message for part in [file, *parts]), message


def test_the_file_of_a_training_run_is_taken_and_what_has_no_meaning_is_one_log_line(
    written: Yaml, caplog: pytest.LogCaptureFixture
):
    shared = {
        "prompt": "a fox", "seed": 7, "negative_prompt": "blurry", "num_inference_steps": 5, "caption_chunks": 2,
        "activations_dtype": "float32", "diffusion_scheduler_config.prediction_type": "v_prediction",
        "ici_fsdp_parallelism": 2, "pretrained_model_name_or_path": "models/mine", "from_pt": False,
        "jax_cache_dir": "none", "logical_axis_rules": (("heads", ()),), "flash_block_sizes.block_q": 512,
    }  # fmt: skip
    trained = merge(TrainConfig(), {**shared, "train_data_dir": "pictures", "hf_access_token": TOKEN})
    file = written(to_yaml(trained))
    caplog.set_level(logging.INFO, "sdxl_eqx")
    config = parse_generate(["--config", file, "--seed", "8"])
    for key in NAMES.keys() & GENERATE_NAMES.keys() - {"seed", "hf_access_token"}:
        assert value(config, key) == getattr(getattr(trained, NAMES[key].group), NAMES[key].field), key
    assert {key: shown(key, config) for key in shared} == {**shared, "seed": 8}
    (record,) = caplog.records
    start, _, listed = record.getMessage().partition(": of no meaning here: ")
    assert (record.levelno, start) == (logging.INFO, file)
    heads = {key.partition(".")[0] for key in NAMES} - {key.partition(".")[0] for key in GENERATE_NAMES}
    assert sorted(listed.split(", ")) == sorted(heads)


def test_a_mapping_that_only_training_knows_is_passed_over(written: Yaml, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "sdxl_eqx")
    names = {key: name for key, name in GENERATE_NAMES.items() if not key.startswith("flash_block_sizes.")}
    values = read(written("seed: 3\nflash_block_sizes: {block_q: 8}"), names, elsewhere=NAMES)
    assert values == {"seed": 3}
    (record,) = caplog.records
    assert record.getMessage().endswith("of no meaning here: flash_block_sizes")


def test_flags_win_over_the_lists_of_a_file(written: Yaml):
    file = written("original_size: [1024, 768]\nguidance_interval: [0.1, 0.2]\nlora_config: {scale: [1, 2]}")
    words = ["--original-size", "none", "--guidance-interval", "0", "1", "--lora-config.scale", "none"]
    assert parse_generate(["--config", file, *words]) == DEFAULT


def test_training_takes_no_file_of_drawing(written: Yaml, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command_line.parse(["--config", written(to_yaml(DEFAULT))])
    assert "no such key" in capsys.readouterr().err


def valid() -> st.SearchStrategy[Values]:
    """Valid values of some keys of every kind."""
    text = st.text(st.characters(exclude_categories=["Cs"]))
    side = st.integers(1, 4096)
    fields: dict[str, st.SearchStrategy[Any]] = {
        "seed": st.integers(0, 2**32 - 1),
        "prompt": text,
        "negative_prompt_2": text,
        "width": st.integers(0, 512).map(lambda n: 8 * n),
        "original_size": st.none() | st.tuples(side, side),
        "crops_coords_top_left": st.none() | st.tuples(st.integers(), st.integers()),
        "guidance_interval": st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
        "eta": st.floats(0, 1),
        "grid": st.booleans(),
        "vae_dtype": st.sampled_from(["float32", "bfloat16"]),
        "lora_config.lora_model_name_or_path": st.tuples(text, text),
        "lora_config.adapter_name": st.none() | st.tuples(text.filter(bool)) | st.tuples(text, text),
        "lora_config.scale": st.none() | st.tuples(st.floats(-2, 2)) | st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
        "lora_config.from_pt": st.none() | st.tuples(st.booleans()),
        "flash_block_sizes.block_q": st.none() | st.integers(1),
        "mesh_axes": st.permutations(MESH_AXES).map(tuple),
    }
    both = st.just({"lora_config.lora_model_name_or_path": ("a", "b")})
    return st.builds(lambda some, loras: {**loras, **some}, st.fixed_dictionaries({}, optional=fields), both)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=valid())
def test_a_written_config_reads_back_equal(values: Values, written: Yaml):
    config = merge(DEFAULT, values)
    config.check()
    assert parse_generate(["--config", written(to_yaml(config))]) == config


@settings(max_examples=20)
@given(words=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2))
def test_words_of_a_list_arrive_as_they_were_given(words: list[str]):
    flag = "--lora-config.lora-model-name-or-path"
    if words[0].lstrip().startswith("[") or any(word.startswith("--") for word in words):
        return
    assert parse_generate([flag, *words]).lora_config.lora_model_name_or_path == tuple(words)


# Switches

GUIDED = "--do-classifier-free-guidance"
UNGUIDED: Values = {"do_classifier_free_guidance": False}
FLASH = "--attention flash or auto"
NET: Values = {"controlnet_model_name_or_path": ("canny",), "controlnet_image": ("a.png",)}
REFINER: Values = {"refiner_model_name_or_path": "refiner"}
LIGHTNING: Values = {"lightning_repo": "folder", "lightning_ckpt": "a.safetensors"}
LORA: Values = {"lora_config.lora_model_name_or_path": ("a",)}

OFF_ON: dict[str, list[tuple[Values, Values, str]]] = {
    "revision": [({"pretrained_model_name_or_path": "asset:tiny-sdxl"}, {}, "--pretrained-model-name-or-path")],
    "flash_min_seq_length": [({"attention": "dot_product"}, {}, FLASH)],
    **{
        f"flash_block_sizes.{name}": [({"attention": "cudnn"}, {}, FLASH)] for name in FlashBlockSizes.__annotations__
    },
    "mask_padding_tokens": [({"attention": "cudnn_flash_te"}, {}, FLASH)],
    "attention_sharding_uniform": [({}, {"ici_context_parallelism": 2}, "--ici-context-parallelism")],
    **{
        key: [(UNGUIDED, {}, GUIDED)]
        for key in ("guidance_scale", "guidance_rescale", "guidance_interval", "negative_prompt", "negative_prompt_2",
                    "negative_original_size", "negative_crops_coords_top_left", "negative_target_size")
    },
    "negative_aesthetic_score": [
        ({**UNGUIDED, **REFINER}, REFINER, GUIDED),
        ({}, REFINER, "--refiner-model-name-or-path"),
    ],
    "prompt": [({"prompts_file": "p.txt"}, {}, "--prompts-file")],
    "eta": [
        (
            {"diffusion_scheduler_config._class_name": "LCM"},
            {"diffusion_scheduler_config._class_name": "FlaxDDIM"},
            "--diffusion-scheduler-config._class-name DDIM",
        )
    ],
    "strength": [({}, {"image": "a.png"}, "--image")],
    "refiner_fraction": [({}, REFINER, "--refiner-model-name-or-path")],
    "aesthetic_score": [({}, REFINER, "--refiner-model-name-or-path")],
    **{
        key: [({}, NET, "--controlnet-model-name-or-path")]
        for key in ("controlnet_from_pt", "controlnet_conditioning_scale", "control_guidance_start",
                    "control_guidance_end", "controlnet_canny")
    },
    **{
        key: [(NET, {**NET, "controlnet_canny": True}, "--controlnet-canny")] for key in ("canny_low", "canny_high")
    },
    "lightning_ckpt": [({}, {"lightning_repo": "folder"}, "--lightning-repo")],
    "lightning_from_pt": [({}, LIGHTNING, "--lightning-repo")],
    **{
        f"lora_config.{key}": [({}, LORA, "--lora-config.lora-model-name-or-path")]
        for key in ("weight_name", "adapter_name", "scale", "from_pt")
    },
}  # fmt: skip
"""For each key with switches: what has one off, what has all on, and the flag that the remedy names."""

CASES = [(key, *case) for key, cases in OFF_ON.items() for case in cases]


def given_after(key: str) -> tuple[Any, str]:
    """(a value that asks for something, as a flag gives it)."""
    new = True if GENERATE_NAMES[key].type is bool else example(key)
    return new, written_as(new)


def test_the_table_covers_every_switch():
    in_code = sorted(key for switch in GENERATE_SWITCHES for key in switch.keys)
    assert sorted(key for key, *_ in CASES) == in_code


@pytest.mark.parametrize(("key", "off", "on", "remedy"), CASES)
def test_a_flag_whose_switch_is_off_is_refused_with_the_switch(
    key: str, off: Values, on: Values, remedy: str, written: Yaml, refusal: Refusal
):
    new, text = given_after(key)
    message = refusal(["--config", written(yaml.safe_dump({"seed": 0, **entries(off)})), f"{flag_of(key)}={text}"])
    assert f"{flag_of(key)} {new!r} has no effect here" in message
    assert remedy in message


@pytest.mark.parametrize(("key", "off", "on", "remedy"), CASES)
def test_a_flag_whose_switch_is_on_is_taken(
    key: str, off: Values, on: Values, remedy: str, written: Yaml, caplog: pytest.LogCaptureFixture
):
    new, text = given_after(key)
    file = written(yaml.safe_dump({"seed": 0, **entries(on)}))
    assert value(parse_generate(["--config", file, f"{flag_of(key)}={text}"]), key) == new
    assert not caplog.records


@pytest.mark.parametrize(("key", "off", "on", "remedy"), CASES)
def test_a_key_of_the_file_whose_switch_is_off_is_one_log_line(
    key: str, off: Values, on: Values, remedy: str, written: Yaml, caplog: pytest.LogCaptureFixture
):
    file = written(yaml.safe_dump({"seed": 0, **entries({**off, key: example(key)})}))
    assert value(parse_generate(["--config", file]), key) == example(key)
    lines = [record.getMessage() for record in caplog.records if f" {key}: " in record.getMessage()]
    assert len(lines) == len(caplog.records) == 1
    assert file in lines[0] and remedy in lines[0]


def flag_of(key: str) -> str:
    """A name as a flag."""
    return GENERATE_NAMES[key].flag


def test_a_strength_may_be_of_the_pictures_that_a_file_of_prompts_names():
    assert parse_generate(["--prompts-file", "p.txt", "--strength", "0.5"]).picture.strength == 0.5


@pytest.mark.parametrize("sampler", [name for name in SCHEDULERS if name != "DDIMScheduler"])
def test_fresh_noise_is_refused_of_every_sampler_but_ddim_and_the_models_own(sampler: str, refusal: Refusal):
    words = ["--eta", "0.5", "--diffusion-scheduler-config._class-name"]
    assert "--eta 0.5 has no effect here" in refusal([*words, sampler])
    for name in ("DDIM", ""):
        assert parse_generate([*words, name]).picture.eta == 0.5


def test_a_whole_file_of_defaults_logs_nothing(written: Yaml, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "sdxl_eqx")
    assert parse_generate(["--config", written(to_yaml(DEFAULT))]) == DEFAULT
    assert not caplog.records


# The token


@pytest.mark.parametrize(
    "words",
    [
        ["--hf-access-token", TOKEN, "--seeed", "3"],
        ["--hf-access-token", TOKEN, "--width", "12"],
        ["--hf-access-token", TOKEN, "--strength", "0.5"],
        ["--hf-access-token", "half", TOKEN],
        ["--hf-acess-token", TOKEN],
        [f"hf_access_token={TOKEN}"],
        [TOKEN],
    ],
)
def test_no_error_repeats_the_token_of_a_flag(words: list[str], refusal: Refusal):
    assert TOKEN not in refusal(words)


@pytest.mark.parametrize(
    "text",
    [
        f"hf_access_token: {TOKEN}\nwidth: 12",
        f"hf_access_token: {TOKEN}\nseeed: 3",
        f"hf_access_token: [{TOKEN}]",
        f"hf_access_token: {{a: {TOKEN}}}",
        f"hf_acess_token: {TOKEN}",
        f"hf_access_token: {TOKEN}\nhf_access_token: {TOKEN}",
    ],
)
def test_no_error_repeats_the_token_of_a_file(text: str, written: Yaml, refusal: Refusal):
    assert TOKEN not in refusal(["--config", written(text)])


def test_no_help_no_log_line_and_no_written_form_shows_the_token(
    written: Yaml, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    file = written(f"hf_access_token: {TOKEN}\nstrength: 0.5\n")
    with pytest.raises(SystemExit):
        parse_generate(["--config", file, "--help"])
    config = parse_generate(["--config", file])
    assert config.model.hf_access_token == TOKEN
    assert parse_generate(["--config", file, "--hf-access-token", "other"]).model.hf_access_token == "other"
    printed = "".join(capsys.readouterr())
    assert all(TOKEN not in text for text in (printed, caplog.text, repr(config), to_yaml(config), str(flat(config))))
    assert caplog.records


# The README


def test_the_readme_lists_every_flag_of_drawing_and_no_other():
    readme = (command_line.REPOSITORY / "README.md").read_text(encoding="utf-8")
    if "\n## Generate\n" not in readme:
        pytest.skip("README.md has no section `## Generate` yet")
    section = readme.split("\n## Generate\n")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ") and "`" in row]
    listed = [word for row in rows for word in re.findall(r"`([^`]+)`", row)]
    assert sorted(listed) == sorted(GENERATE_NAMES)
