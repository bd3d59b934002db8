"""The command line: flags over YAML over defaults, and one message with a remedy for all that is wrong."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_eqx.config import DiffusionSchedulerConfig, FlashBlockSizes, TrainConfig, flat, groups, to_yaml
from sdxl_eqx.config.rules import plain
from sdxl_eqx.config.shared import AXIS_RULES, MESH_AXES, Axes, AxisRules
from sdxl_eqx.flags import NAMES, SWITCHES, FlagError, command_line, merge, parse, read, switches

DATA = ["--train-data-dir", "pictures"]


def data_beside(key: str) -> list[str]:
    """The flags of a data set with which a key goes."""
    if key in ("dataset_config_name", "hf_data_dir", "hf_train_files"):
        return ["--dataset-name", "someone/pictures"]
    if key == "class_data_dir":
        return [*DATA, "--class-prompt", "a dog"]
    return [] if key in ("train_data_dir", "dataset_name") else DATA


TOKEN = "hf_topsecret"

Refusal = Callable[[Sequence[str]], str]
Yaml = Callable[[str], str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The message that refuses a command line: exit code 2, one line on stderr, no traceback, nothing on stdout."""

    def refuse(argv: Sequence[str]) -> str:
        with pytest.raises(SystemExit) as exit_:
            parse(argv)
        out, err = capsys.readouterr()
        assert exit_.value.code == 2
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        return err

    return refuse


@pytest.fixture
def written(tmp_path: Path) -> Yaml:
    """Writes a YAML file and returns its path."""

    def write(text: str) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


def value(config: TrainConfig, key: str) -> Any:
    """The value of a published name."""
    return getattr(getattr(config, NAMES[key].group), NAMES[key].field)


# Flags


def test_flags_are_flat_and_take_dashes_and_underscores():
    dashes = parse([*DATA, "--max-train-steps", "7", "--learning-rate", "4e-7"])
    underscores = parse(["--train_data_dir", "pictures", "--max_train_steps=7", "--learning_rate=4e-7"])
    assert dashes == underscores
    assert dashes.optim.max_train_steps == 7
    assert dashes.optim.learning_rate == 4e-7


@pytest.mark.parametrize(
    "flag", ["--diffusion-scheduler-config.prediction-type", "--diffusion_scheduler_config.prediction_type"]
)
def test_the_keys_of_a_mapping_are_flags_with_a_dot(flag: str):
    scheduler = parse([*DATA, flag, "v_prediction"]).diffusion_scheduler_config
    assert (scheduler.prediction_type, scheduler.timestep_spacing) == ("v_prediction", "")


def test_with_any_argument_the_published_defaults_hold():
    assert parse(DATA) == merge(TrainConfig(), {"train_data_dir": "pictures"})


def example(key: str) -> Any:
    """A valid value of a name that is not its default."""
    kind, default = NAMES[key].type, value(TrainConfig(), key)
    named = {
        "diffusion_scheduler_config._class_name": "FlaxDDIMScheduler",
        "lr_step_rules": "1:10,0.1",
        "eval_split": "0.25",
        "hardware": "cpu",  # a file's tpu is mapped
        "lora_targets": ("to_q", "proj_in"),
    }
    if key in named:
        return named[key]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != default)
    if kind is bool:
        return not default
    if kind == AxisRules:
        return tuple((name, axes[:-1]) for name, axes in default)
    if kind == Axes:
        return default[::-1]
    return {str: "other", int: 16, float: 0.5, int | None: 16, bool | None: True}[kind]


def written_as(new: Any) -> str:
    """A value as it is written after a flag."""
    return json.dumps(new) if isinstance(new, tuple) else str(new)


def entry(key: str, new: Any) -> dict[str, Any]:
    """A key with its value as a file has it."""
    outer, _, inner = key.partition(".")
    return {outer: {inner: plain(new)} if inner else plain(new)}


@pytest.mark.parametrize("key", NAMES)
def test_every_published_name_is_a_flag_and_a_key(key: str, written: Yaml, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(switches, "SWITCHES", ())
    new = example(key)
    data = data_beside(key)
    assert value(parse([*data, f"{NAMES[key].flag}={written_as(new)}"]), key) == new
    file = written(yaml.safe_dump(entry(key, new)))
    assert value(parse(["--config", file, *data]), key) == new


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--center-crop"], True),
        (["--no-center-crop"], False),
        (["--no_center_crop"], False),
        (["--center-crop", "True"], True),
        (["--center-crop", "False"], False),
        (["--center_crop", "false"], False),
        (["--center-crop=True"], True),
        (["--center-crop=False"], False),
        (["--center-crop", "--no-center-crop"], False),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_booleans_take_every_form_over_either_default(words: list[str], expected: bool, before: bool, written: Yaml):
    file = written(f"center_crop: {before}\ntrain_data_dir: pictures\n")
    assert parse(["--config", file, *words]).data.center_crop is expected
    assert parse([*words, "--config", file, "--seed", "3"]).data.center_crop is expected


@pytest.mark.parametrize(
    "words",
    [["--center-crop", "maybe"], ["--center-crop=maybe"], ["--no-center-crop", "True"], ["--no-center-crop=True"]],
)
def test_a_boolean_with_another_value_is_refused_with_all_its_forms(words: list[str], refusal: Refusal):
    message = refusal([*DATA, *words])
    assert "--center-crop, --no-center-crop, --center-crop True and --center-crop False" in message


@pytest.mark.parametrize("text", ["-1", "-foo", "a=b", "", "--x", "two words", "'quoted'", "-h"])
def test_any_text_can_be_the_value_of_a_flag(text: str):
    assert parse([*DATA, f"--prompt={text}"]).sample.prompt == text
    if not text.startswith("--"):
        assert parse([*DATA, "--prompt", text]).sample.prompt == text


@settings(max_examples=25)
@given(text=st.text())
def test_texts_arrive_as_they_were_given(text: str):
    assert parse([*DATA, f"--prompt={text}"]).sample.prompt == text


@settings(max_examples=25)
@given(rate=st.floats(1e-300, 1e300), steps=st.integers(1, 10**12))
def test_numbers_arrive_as_they_were_given(rate: float, steps: int):
    optim = parse([*DATA, "--learning-rate", repr(rate), "--max-train-steps", str(steps)]).optim
    assert (optim.learning_rate, optim.max_train_steps) == (rate, steps)


def test_the_last_of_two_equal_flags_wins():
    assert parse([*DATA, "--seed", "1", "--seed", "2"]).run.seed == 2


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--seeed", "--seed"),
        ("--max-train-step", "--max-train-steps"),
        ("--max_train_step", "--max-train-steps"),
        ("--MAX-TRAIN-STEPS", "--max-train-steps"),
        ("--prediction-type", "--diffusion-scheduler-config.prediction-type"),
        ("--diffusion-scheduler-config.prediction-typ", "--diffusion-scheduler-config.prediction-type"),
        ("--confg", "--config"),
        ("--no-center-cropp", "--center-crop"),
        ("--no-seed", "--seed"),
        ("--run.seed", "--seed"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_name(flag: str, nearest: str, refusal: Refusal):
    assert f"error: {flag}: no such flag; did you mean {nearest}?" in refusal([*DATA, flag, "3"])


def test_an_unknown_flag_like_no_other_points_to_the_help(refusal: Refusal):
    assert "--xyzzy: no such flag; --help lists all" in refusal([*DATA, "--xyzzy", "3"])


@pytest.mark.parametrize("key", [key for key in NAMES if NAMES[key].type is not bool])
def test_one_letter_left_out_still_finds_the_name(key: str, refusal: Refusal):
    flag = NAMES[key].flag
    assert f"did you mean {flag}?" in refusal([flag[:-2] + flag[-1], "3"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--resolution", "abc"], ["--resolution 'abc'", "whole number"]),
        (["--resolution", "64.5"], ["--resolution '64.5'", "whole number"]),
        (["--resolution", "True"], ["--resolution 'True'", "whole number"]),
        (["--learning-rate", "fast"], ["--learning-rate 'fast'", "number"]),
        (["--lr-schedule", "step"], ["--lr-schedule 'step'", "constant, linear, cosine"]),
        (["--diffusion-scheduler-config.prediction-type", "v"], ["'v'", "'', epsilon, v_prediction"]),
        (["--flash-block-sizes.block-q", "big"], ["--flash-block-sizes.block-q 'big'", "a whole number or none"]),
        (["--flash-block-sizes.block-q", "0"], ["--flash-block-sizes.block-q 0", "above 0"]),
        (["--flash-block-sizes.use-fused-bwd-kernel", "2"], ["use-fused-bwd-kernel '2'", "true, false or none"]),
        (["--flash-block-sizes", "{}"], ["--flash-block-sizes: no such flag; did you mean --flash-block-sizes."]),
        (["--mesh-axes", "data"], ["--mesh-axes 'data'", "a list of axes, as [data, fsdp]"]),
        (["--mesh-axes", "[data"], ["--mesh-axes '[data'", "a list of axes"]),
        (["--mesh-axes", "[data, fsdp]"], ["--mesh-axes ['data', 'fsdp']", "data, fsdp, context, tensor"]),
        (["--data-sharding", "[[data], fsdp]"], ["--data-sharding '[[data], fsdp]'", "a list of axes"]),
        (["--data-sharding", ""], ["--data-sharding ''", "a list of axes"]),
        (["--logical-axis-rules", "[embed, fsdp]"], ["'[embed, fsdp]'", "[[embed, [data, fsdp]], [heads, null]]"]),
        (["--logical-axis-rules", "[[embed, [[fsdp]]]]"], ["'[[embed, [[fsdp]]]]'", "a list of [NAME, AXIS or"]),
        (["--logical-axis-rules", "{embed: fsdp}"], ["'{embed: fsdp}'", "a list of [NAME, AXIS or"]),
        (["--logical-axis-rules", ""], ["--logical-axis-rules ''", "a list of [NAME, AXIS or"]),
        (["--logical-axis-rules", "[[embd, fsdp]]"], ["[['embd', ['fsdp']]]", "names must be of batch,"]),
        (["--ici-fsdp-parallelism", "-1"], ["--ici-fsdp-parallelism -1", "by default --ici-data-parallelism"]),
        (["--resolution"], ["--resolution: a value must follow"]),
        (["--resolution", "--seed", "3"], ["--resolution: a value must follow"]),
        (["--prompt", "a", "house"], ["--prompt: more than one value", "quotes"]),
        (["--config"], ["--config: a value must follow"]),
        (["--config="], ["--config: give one YAML file"]),
        (["--config=a.yaml", "--config=b.yaml"], ["--config: give one YAML file"]),
        (["--resolution", "12"], ["--resolution 12", "multiple of 8"]),
        (["--seed=-1"], ["--seed -1", "2**32"]),
        (["--learning-rate", "nan"], ["--learning-rate nan", "finite"]),
    ],
)
def test_a_wrong_value_is_refused_with_the_flag_the_value_and_the_rule(
    words: list[str], parts: list[str], refusal: Refusal
):
    message = refusal([*DATA, *words])
    assert all(part in message for part in parts), message


def test_whole_numbers_may_be_written_as_1e3():
    assert parse([*DATA, "--max-train-steps", "1e3"]).optim.max_train_steps == 1000


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("run_name=foo", "run_name=foo: write --run-name foo"),
        ("diffusion_scheduler_config.prediction_type=epsilon", "--diffusion-scheduler-config.prediction-type epsilon"),
        ("run_nam=foo", "did you mean --run-name?"),
        ("base_xl.yml", "write --config base_xl.yml"),
    ],
)
def test_the_arguments_of_maxdiffusion_get_an_error_that_shows_the_flag(word: str, form: str, refusal: Refusal):
    assert form in refusal([word])
    assert form in refusal([*DATA, word])


def test_the_help_is_grouped_by_room_and_shows_the_docstrings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "100")
    for word in ("--help", "-h"):
        with pytest.raises(SystemExit) as exit_:
            parse([word])
        assert not exit_.value.code
        out = capsys.readouterr().out
        assert [line for line in out.splitlines() if len(line) > 100] == []
        for group in groups(TrainConfig()):
            assert re.search(rf"^\W*{group.replace('_', '-')} options\W*$", out, re.MULTILINE), group
        for name in NAMES.values():
            assert f"{name.flag} " in out or f"{name.flag}, " in out
        assert "Peak learning rate." in out
        assert "--config FILE" in out


# The YAML file


def test_nothing_given_runs_the_tiny_configuration(written: Yaml, monkeypatch: pytest.MonkeyPatch):
    assert Path(command_line.__file__).parents[2] / "configs" / "tiny.yaml" == command_line.TINY_FILE
    monkeypatch.setattr(command_line, "TINY_FILE", Path(written("train_data_dir: asset:emoji\nresolution: 64\n")))
    config = parse([])
    assert (config.data.train_data_dir, config.data.resolution) == ("asset:emoji", 64)


def test_nothing_given_without_a_checkout_says_so(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command_line, "TINY_FILE", tmp_path / "configs" / "tiny.yaml")
    message = refusal([])
    assert "configs/tiny.yaml" in message
    assert "not part of an installed package" in message
    assert "--config FILE" in message


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_flags_win_over_the_file_and_the_file_over_the_defaults(form: str, written: Yaml):
    file = written("train_data_dir: pictures\nseed: 1\nresolution: 512\n")
    config = parse(["--seed", "2", *form.format(file).split()])
    assert (config.run.seed, config.data.resolution, config.optim.max_train_steps) == (2, 512, 200)


def test_a_flag_equal_to_the_default_wins_over_the_file(written: Yaml):
    file = written("train_data_dir: pictures\nseed: 1\n")
    assert parse(["--config", file, "--seed", "0"]).run.seed == 0


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("learning_rate: 4e-7", "learning_rate", 4e-7),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("max_train_steps: 1e3", "max_train_steps", 1000),
        ("max_train_steps: 1000.0", "max_train_steps", 1000),
        ("max_train_steps: -1", "max_train_steps", -1),
        ("center_crop: True", "center_crop", True),
        ("center_crop: yes", "center_crop", True),
        ("center_crop: 'false'", "center_crop", False),
        ("run_name: 007", "run_name", "007"),
        ("run_name: 2024-01-01", "run_name", "2024-01-01"),
        ("run_name: null", "run_name", ""),
        ("run_name:", "run_name", ""),
        ("run_name: ~", "run_name", ""),
        ("run_name: 'null'", "run_name", "null"),
        ("remat_policy: none", "remat_policy", "none"),
        ("negative_prompt: yes", "negative_prompt", "yes"),
        ("diffusion_scheduler_config: {prediction_type: null}", "diffusion_scheduler_config.prediction_type", ""),
        ("diffusion_scheduler_config:", "diffusion_scheduler_config.prediction_type", ""),
        ("flash_block_sizes: {block_q: 512}", "flash_block_sizes.block_q", 512),
        ("flash_block_sizes: {block_q: '512'}", "flash_block_sizes.block_q", 512),
        ("flash_block_sizes: {block_q: null}", "flash_block_sizes.block_q", None),
        ("flash_block_sizes: {block_q: None}", "flash_block_sizes.block_q", None),
        ("flash_block_sizes: {}", "flash_block_sizes.block_q", None),
        ("flash_block_sizes:", "flash_block_sizes.block_q", None),
        ("flash_block_sizes: {use_fused_bwd_kernel: yes}", "flash_block_sizes.use_fused_bwd_kernel", True),
        ("flash_block_sizes: {use_fused_bwd_kernel: null}", "flash_block_sizes.use_fused_bwd_kernel", None),
        ("mesh_axes: ['fsdp', 'data', 'context', 'tensor']", "mesh_axes", ("fsdp", "data", "context", "tensor")),
        ("mesh_axes:\n- tensor\n- data\n- context\n- fsdp", "mesh_axes", ("tensor", "data", "context", "fsdp")),
        ("data_sharding: [['data', 'fsdp', 'tensor']]", "data_sharding", ("data", "fsdp", "tensor")),
        ("data_sharding:\n- - data\n  - fsdp", "data_sharding", ("data", "fsdp")),
        ("data_sharding: [data]", "data_sharding", ("data",)),
        ("data_sharding: '[data]'", "data_sharding", ("data",)),
    ],
)
def test_scalars_are_read_as_the_type_of_the_field(line: str, key: str, expected: Any, written: Yaml):
    got = value(parse(["--config", written(line), *DATA]), key)
    assert got == expected
    assert type(got) is type(expected)


def test_a_partial_mapping_merges_with_the_defaults_and_with_flags(written: Yaml):
    file = written("diffusion_scheduler_config:\n  timestep_spacing: trailing\n")
    scheduler = parse(["--config", file, *DATA]).diffusion_scheduler_config
    assert scheduler == DiffusionSchedulerConfig(timestep_spacing="trailing")
    both = parse(["--config", file, *DATA, "--diffusion-scheduler-config.prediction-type", "epsilon"])
    assert both.diffusion_scheduler_config == dataclasses.replace(scheduler, prediction_type="epsilon")


RULES = "[[embed, [data, fsdp]], [heads, null], [mlp, []], [conv_in, tensor], [conv_in, context]]"


@pytest.mark.parametrize("text", [f"logical_axis_rules: {RULES}", f"logical_axis_rules: '{RULES}'"])
def test_axis_rules_replace_the_default_of_their_names_and_flags_those_of_the_file(text: str, written: Yaml):
    expected = {"embed": ("data", "fsdp"), "heads": (), "mlp": (), "conv_in": ("context",)}
    assert dict(parse([*DATA, "--logical-axis-rules", RULES]).parallel.logical_axis_rules) == {
        **dict(AXIS_RULES),
        **expected,
    }
    both = parse([*DATA, "--config", written(text), "--logical-axis-rules", "[[heads, [tensor]], [out_channels, ~]]"])
    assert dict(both.parallel.logical_axis_rules) == {
        **dict(AXIS_RULES),
        **expected,
        "heads": ("tensor",),
        "out_channels": (),
    }


@pytest.mark.parametrize("none", ["", "none", "None", "null"])
def test_a_flag_may_say_none_over_the_file(none: str, written: Yaml):
    file = written("flash_block_sizes: {block_q: 512, use_fused_bwd_kernel: true}")
    words = [f"--flash-block-sizes.block-q={none}", f"--flash-block-sizes.use-fused-bwd-kernel={none}"]
    assert parse([*DATA, "--config", file, *words]).flash_block_sizes == FlashBlockSizes()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("resolution: abc", ["resolution", "abc", "whole number", "leave the key out"]),
        ("resolution: 64.5", ["resolution", "64.5", "whole number"]),
        ("resolution: true", ["resolution", "true", "whole number"]),
        ("resolution: null", ["resolution", "null", "whole number"]),
        ("mesh_axes: null", ["mesh_axes", "null", "a list of axes, as [data, fsdp]"]),
        ("mesh_axes: {data: 2}", ["mesh_axes", "{data: 2}", "a list of axes"]),
        ("mesh_axes:\n- data\n- [fsdp]", ["mesh_axes: [data, [fsdp]]: must be a list of axes"]),
        ("mesh_axes: &again [*again]", ["mesh_axes", "a list of axes"]),
        ("data_sharding: [rows]", ["--data-sharding ['rows']", "one or more of data, fsdp"]),
        ("logical_axis_rules: [[embed, fsdp, tensor]]", ["[[embed, fsdp, tensor]]", "[NAME, AXIS or [AXES]]"]),
        ("logical_axis_rules: [[embed, rows]]", ["--logical-axis-rules [['embed', ['rows']]]", "axes of data, fsdp"]),
        ("flash_block_sizes: 512", ["flash_block_sizes", "512", "must be a mapping"]),
        ("flash_block_sizes: {block_q: [512]}", ["flash_block_sizes.block_q", "a list", "single value"]),
        ("flash_block_sizes: {block_q: -1}", ["--flash-block-sizes.block-q -1", "above 0"]),
        ("flash_block_sizes: {block_k: 8}", ["flash_block_sizes.block_k", "did you mean flash_block_sizes.block_"]),
        ("resolution: [64, 64]", ["resolution", "a list", "single value"]),
        ("run_name: {a: b}", ["run_name", "a mapping", "single value"]),
        ("learning_rate: fast", ["learning_rate", "fast", "number"]),
        ("center_crop: 1", ["center_crop", "1", "true or false"]),
        ("center_crop: null", ["center_crop", "null", "true or false"]),
        ("lr_schedule: step", ["lr_schedule", "step", "constant, linear, cosine"]),
        ("lr_schedule: null", ["lr_schedule", "null", "constant, linear, cosine"]),
        ("weights_dtype: float64", ["weights_dtype", "float64", "float32, bfloat16"]),
        ("diffusion_scheduler_config: trailing", ["diffusion_scheduler_config", "trailing", "must be a mapping"]),
        (
            "diffusion_scheduler_config: {prediction_type: v}",
            ["diffusion_scheduler_config.prediction_type", "'', epsilon"],
        ),
        ("diffusion_scheduler_config: {prediction: v}", ["diffusion_scheduler_config.prediction", "did you mean"]),
        ("max_train_step: 3", ["max_train_step", "did you mean max_train_steps?"]),
        ("run-name: a", ["run-name", "did you mean run_name?"]),
        ("zzz: 3", ["zzz", "no such key", "--help"]),
        ("1: 3", ["1: no such key"]),
        ("[a]: 3", ["line 1", "a key must be a name"]),
        ("seed: 1\nseed: 2", ["seed", "line 2", "remove one"]),
        ("seed: [1", ["line 1", "column 9", "not valid YAML"]),
        ("seed: 1\n\tresolution: 3", ["line 2", "not valid YAML"]),
        ("seed: 1\n---\nseed: 2", ["not valid YAML"]),
        ("seed: *missing", ["not valid YAML"]),
        ("seed: \x00", ["not valid YAML"]),
        ("", ["must be a mapping", "empty"]),
        ("# nothing\n", ["must be a mapping", "empty"]),
        ("- seed", ["must be a mapping", "a list"]),
        ("seed 3", ["must be a mapping", "a single value"]),
        ("resolution: 12", ["--resolution 12", "multiple of 8"]),
    ],
)
def test_a_wrong_file_is_refused_with_file_key_value_rule_and_remedy(
    text: str, parts: list[str], written: Yaml, refusal: Refusal
):
    file = written(text)
    message = refusal(["--config", file, *DATA])
    assert all(part in message for part in [file, *parts]), message


def test_the_file_is_not_blamed_for_a_flag(written: Yaml, refusal: Refusal):
    file = written("resolution: 64\n")
    assert file not in refusal(["--config", file, *DATA, "--resolution", "12"])


@pytest.mark.parametrize("key", [key for key in NAMES if get_origin(NAMES[key].type) is Literal])
def test_a_wrong_choice_lists_all_choices(key: str, written: Yaml, refusal: Refusal):
    message = refusal(["--config", written(yaml.safe_dump(entry(key, "wrong")))])
    assert f"{key}: wrong" in message
    assert all((choice or "''") in message for choice in get_args(NAMES[key].type))


def test_a_file_that_is_not_there_a_folder_and_a_binary_are_refused(tmp_path: Path, refusal: Refusal):
    assert "nope.yaml" in refusal(["--config", str(tmp_path / "nope.yaml")])
    assert str(tmp_path) in refusal(["--config", str(tmp_path)])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    assert "UTF-8" in refusal(["--config", str(binary)])


def test_read_raises_and_does_not_exit(tmp_path: Path):
    with pytest.raises(FlagError, match=r"nope\.yaml"):
        read(tmp_path / "nope.yaml")


def valid() -> st.SearchStrategy[dict[str, Any]]:
    """Valid values of some keys of every kind."""
    text = st.text(st.characters(exclude_categories=["Cs"]))
    axes = st.lists(st.sampled_from(MESH_AXES), unique=True).map(tuple)
    fields = {
        "run_name": st.text("abc0._-", max_size=5).filter(lambda name: name not in (".", "..")),
        "seed": st.integers(0, 2**32 - 1),
        "learning_rate": st.floats(1e-12, 1.0),
        "max_train_steps": st.integers(1) | st.just(-1),
        "num_train_epochs": st.integers(1),
        "per_device_batch_size": st.sampled_from([0.25, 1.0, 2.0, 64.0]),
        "lr_schedule": st.sampled_from(["constant", "linear", "cosine"]),
        "center_crop": st.booleans(),
        "train_data_dir": text.filter(bool),
        "prompt": text,
        "diffusion_scheduler_config.prediction_type": st.sampled_from(["", "epsilon", "v_prediction"]),
        "flash_block_sizes.block_q": st.none() | st.integers(1),
        "flash_block_sizes.use_fused_bwd_kernel": st.none() | st.booleans(),
        "mesh_axes": st.permutations(MESH_AXES).map(tuple),
        "data_sharding": axes.filter(bool),
        "logical_axis_rules": st.dictionaries(st.sampled_from(list(dict(AXIS_RULES))), axes).map(
            lambda rules: tuple(rules.items())
        ),
    }
    return st.fixed_dictionaries({}, optional=fields)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=valid())
def test_a_written_config_reads_back_equal(values: dict[str, Any], written: Yaml):
    config = merge(TrainConfig(), {"train_data_dir": "pictures", "max_train_steps": 200} | values)
    assert parse(["--config", written(to_yaml(config))]) == config


# Epochs, switches, the token


def test_epochs_alone_mean_that_steps_come_from_epochs(written: Yaml):
    assert parse([*DATA, "--num-train-epochs", "3"]).optim.max_train_steps == -1
    file = written("train_data_dir: pictures\nmax_train_steps: 50\n")
    assert parse(["--config", file, "--num-train-epochs", "3"]).optim.max_train_steps == -1


def test_steps_win_over_epochs_with_a_log_line(caplog: pytest.LogCaptureFixture):
    config = parse([*DATA, "--num-train-epochs", "3", "--max-train-steps", "9"])
    assert (config.optim.max_train_steps, config.optim.num_train_epochs) == (9, 3)
    assert "--num-train-epochs has no effect" in caplog.text


def test_epochs_alone_in_a_file_mean_the_same_and_steps_win_there_too(written: Yaml):
    file = written("train_data_dir: pictures\nnum_train_epochs: 3\n")
    assert parse(["--config", file]).optim.max_train_steps == -1
    assert parse(["--config", file, "--max-train-steps", "9"]).optim.max_train_steps == 9
    file = written("train_data_dir: pictures\nnum_train_epochs: 3\nmax_train_steps: 50\n")
    assert parse(["--config", file]).optim.max_train_steps == 50


OFF = {
    "output_dir": ({"base_output_directory": "b"}, "--base-output-directory"),
    "flash_min_seq_length": ({"attention": "dot_product"}, "--attention flash or auto"),
    **{
        f"flash_block_sizes.{name}": ({"attention": "cudnn"}, "--attention flash or auto")
        for name in FlashBlockSizes.__annotations__
    },
    "mask_padding_tokens": ({"attention": "cudnn_flash_te"}, "--attention flash or auto"),
    "attention_sharding_uniform": ({}, "--ici-context-parallelism"),
    "compile_topology_num_slices": ({}, "--compile-topology"),
    "quantization_local_shard_count": ({"quantization": "int8_weights"}, "--quantization"),
    **{
        key: ({}, "--lora-rank")
        for key in ("lora_alpha", "lora_targets", "lora_init", "lora_dropout", "use_rslora", "use_dora", "int8_base")
    },
    "text_encoder_learning_rate": ({}, "--train-text-encoder"),
    "unet_checkpoint": ({"train_new_unet": True}, "--train-new-unet"),
    "revision": ({"pretrained_model_name_or_path": "asset:tiny-sdxl"}, "--pretrained-model-name-or-path"),
    "learning_rate_schedule_steps": ({}, "--lr-schedule"),
    "lr_num_cycles": ({}, "--lr-schedule cosine_with_restarts"),
    "lr_step_rules": ({}, "--lr-schedule piecewise"),
    "adam_b1": ({"optimizer": "adafactor"}, "--optimizer"),
    "adam_b2": ({"optimizer": "adafactor"}, "--optimizer"),
    "adam_eps": ({"optimizer": "lion"}, "--optimizer"),
    "moments_dtype": ({"optimizer": "adamw8bit"}, "--optimizer"),
    "huber_c": ({}, "--loss-type"),
    "huber_schedule": ({}, "--loss-type"),
    "timestep_bias.multiplier": ({}, "--timestep-bias.strategy"),
    "timestep_bias.begin": ({"timestep_bias": {"strategy": "later"}}, "--timestep-bias.strategy range"),
    "timestep_bias.end": ({"timestep_bias": {"strategy": "earlier"}}, "--timestep-bias.strategy range"),
    "timestep_bias.portion": ({"timestep_bias": {"strategy": "range"}}, "--timestep-bias.strategy earlier or later"),
    "eval_every": ({}, "--eval-split"),
    "timing_metrics_file": ({}, "--write-timing-metrics"),
    "skip_first_n_steps_for_profiler": ({}, "--enable-profiler"),
    "profiler_steps": ({}, "--enable-profiler"),
    "decay_all": ({"adam_weight_decay": 0.0}, "--adam-weight-decay"),
    "max_grad_value": ({}, "--opt-enable-grad-clipping"),
    "max_grad_norm": ({}, "--opt-enable-grad-global-norm-clipping"),
    "ema_every": ({}, "--ema-decay"),
    "dataset_save_location": (
        {"cache_latents_text_encoder_outputs": False},
        "--cache-latents-text-encoder-outputs",
    ),
    **{key: ({}, "--dataset-name") for key in ("dataset_config_name", "hf_data_dir", "hf_train_files", "train_split")},
    "train_data_dir": ({"dataset_type": "synthetic"}, "--dataset-type"),
    **{
        key: ({"dataset_type": "tfrecord"}, "--dataset-type")
        for key in (
            "aspect_ratio_buckets",
            "center_crop",
            "random_flip",
            "caption_shuffle",
            "caption_chunks",
            "image_column",
            "caption_column",
            "instance_prompt",
        )
    },
    **{key: ({}, "--train-controlnet") for key in ("conditioning_image_column", "controlnet_conditioning_dropout")},
    **{key: ({}, "--class-data-dir") for key in ("class_prompt", "prior_loss_weight", "num_class_images")},
    "bucket_count": ({}, "--aspect-ratio-buckets"),
    "bucket_upscale": ({}, "--aspect-ratio-buckets"),
    "keep_tokens": ({}, "--caption-shuffle"),
    "metrics_file": ({"write_metrics": False}, "--write-metrics"),
    "tracker": ({"write_metrics": False}, "--write-metrics"),
    "norm_num_groups": ({}, "--train-new-unet"),
    "gcs_metrics": ({}, "--base-output-directory"),
    "save_config_to_gcs": ({}, "--base-output-directory"),
    "guidance_scale": ({"do_classifier_free_guidance": False}, "--do-classifier-free-guidance"),
    "guidance_rescale": ({"do_classifier_free_guidance": False}, "--do-classifier-free-guidance"),
    "negative_prompt": ({"do_classifier_free_guidance": False}, "--do-classifier-free-guidance"),
    "prompt": ({"samples_per_grid": 0}, "--samples-per-grid"),
    "sample_every": ({"samples_per_grid": 0}, "--samples-per-grid"),
    "num_inference_steps": ({"samples_per_grid": 0}, "--caption-retrieval"),
    "do_classifier_free_guidance": ({"samples_per_grid": 0}, "--caption-retrieval"),
}
"""For each key with a switch: how the switch is off, and the flag that the remedy names."""

ON = {
    "attention_sharding_uniform": ["--ici-context-parallelism", "2"],
    "compile_topology_num_slices": ["--compile-topology", "v5e:2x2"],
    "quantization_local_shard_count": ["--use-qwix-quantization"],
    **{
        key: ["--lora-rank", "4"]
        for key in ("lora_alpha", "lora_targets", "lora_init", "lora_dropout", "use_rslora", "use_dora", "int8_base")
    },
    "text_encoder_learning_rate": ["--train-text-encoder"],
    "learning_rate_schedule_steps": ["--lr-schedule", "cosine"],
    "lr_num_cycles": ["--lr-schedule", "cosine_with_restarts"],
    "lr_step_rules": ["--lr-schedule", "piecewise"],
    "huber_c": ["--loss-type", "huber"],
    "huber_schedule": ["--loss-type", "smooth_l1"],
    "timestep_bias.multiplier": ["--timestep-bias.strategy", "later"],
    "timestep_bias.begin": ["--timestep-bias.strategy", "range"],
    "timestep_bias.end": ["--timestep-bias.strategy", "range"],
    "timestep_bias.portion": ["--timestep-bias.strategy", "earlier"],
    "eval_every": ["--eval-split", "0.1"],
    "timing_metrics_file": ["--write-timing-metrics"],
    "norm_num_groups": ["--train-new-unet"],
    "gcs_metrics": ["--base-output-directory", "gs://bucket/runs"],
    "save_config_to_gcs": ["--base-output-directory", "gs://bucket/runs"],
    "skip_first_n_steps_for_profiler": ["--enable-profiler"],
    "profiler_steps": ["--enable-profiler"],
    "max_grad_value": ["--opt-enable-grad-clipping"],
    "max_grad_norm": ["--opt-enable-grad-global-norm-clipping"],
    "ema_every": ["--ema-decay", "0.9"],
    "train_split": ["--dataset-type", "hf"],
    "bucket_count": ["--aspect-ratio-buckets"],
    "bucket_upscale": ["--aspect-ratio-buckets"],
    "keep_tokens": ["--caption-shuffle"],
    "conditioning_image_column": ["--train-controlnet"],
    "controlnet_conditioning_dropout": ["--train-controlnet"],
    "class_prompt": ["--class-data-dir", "dogs"],
    "prior_loss_weight": ["--class-data-dir", "dogs", "--class-prompt", "a dog"],
    "num_class_images": ["--class-data-dir", "dogs", "--class-prompt", "a dog"],
}
"""The flags that switch on what is off by default."""


def test_the_table_covers_every_switch():
    assert set(OFF) == {key for switch in SWITCHES for key in switch.keys}


@pytest.mark.parametrize("key", OFF)
def test_a_flag_whose_switch_is_off_is_refused_with_the_switch(key: str, written: Yaml, refusal: Refusal):
    off, remedy = OFF[key]
    file = written(yaml.safe_dump({"train_data_dir": "pictures", **off}))
    new = True if NAMES[key].type is bool else example(key)
    message = refusal(["--config", file, f"{NAMES[key].flag}={written_as(new)}"])
    assert f"{NAMES[key].flag} {new!r} has no effect here" in message
    assert remedy in message


@pytest.mark.parametrize("key", OFF)
def test_a_flag_whose_switch_is_on_is_taken(key: str, caplog: pytest.LogCaptureFixture):
    new = True if NAMES[key].type is bool else example(key)
    config = parse([*data_beside(key), *ON.get(key, []), f"{NAMES[key].flag}={written_as(new)}"])
    assert value(config, key) == new
    assert not caplog.records


@pytest.mark.parametrize("key", OFF)
def test_a_key_of_the_file_whose_switch_is_off_is_one_log_line(
    key: str, written: Yaml, caplog: pytest.LogCaptureFixture
):
    off, remedy = OFF[key]
    outer, _, inner = key.partition(".")
    values: dict[str, Any] = {"train_data_dir": "pictures", **off}
    if inner:
        values[outer] = {**values.get(outer, {}), **entry(key, example(key))[outer]}
    else:
        values |= entry(key, example(key))
    file = written(yaml.safe_dump(values))
    config = parse(["--config", file])
    assert value(config, key) == example(key)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("sdxl_eqx", logging.WARNING)
    assert all(part in record.getMessage() for part in (file, key, remedy))


def test_the_file_may_name_what_a_flag_switches_on(written: Yaml, caplog: pytest.LogCaptureFixture):
    file = written("train_data_dir: pictures\nmax_grad_norm: 0.5\n")
    config = parse(["--config", file, "--opt-enable-grad-global-norm-clipping"])
    assert config.optim.max_grad_norm == 0.5
    assert not caplog.records


def test_how_pictures_are_drawn_has_an_effect_where_a_class_is_to_be_drawn():
    words = ["--class-data-dir", "dogs", "--class-prompt", "a dog", "--samples-per-grid", "0"]
    assert parse([*DATA, *words, "--num-inference-steps", "7"]).sample.num_inference_steps == 7


def test_a_whole_file_of_defaults_logs_nothing(written: Yaml, caplog: pytest.LogCaptureFixture):
    parse(["--config", written(to_yaml(merge(TrainConfig(), {"train_data_dir": "pictures"})))])
    assert not caplog.records


def test_a_switch_turned_off_twice_is_no_error():
    assert not parse([*DATA, "--adam-weight-decay", "0", "--no-decay-all"]).optim.decay_all


def test_not_to_mask_padding_needs_flash_too(refusal: Refusal):
    assert "--mask-padding-tokens False has no effect" in refusal(
        [*DATA, "--attention", "cudnn", "--no-mask-padding-tokens"]
    )
    assert not parse([*DATA, "--attention", "flash", "--no-mask-padding-tokens"]).attention.mask_padding_tokens


def test_to_share_attention_by_heads_needs_context_too(refusal: Refusal):
    assert "--attention-sharding-uniform False has no effect" in refusal([*DATA, "--no-attention-sharding-uniform"])
    asked = [*DATA, "--no-attention-sharding-uniform", "--dcn-context-parallelism", "2"]
    assert not parse(asked).attention.attention_sharding_uniform


def test_the_token_is_taken_from_flag_and_file_and_the_flag_wins(written: Yaml):
    file = written(f"train_data_dir: pictures\nhf_access_token: {TOKEN}\n")
    assert parse(["--config", file]).data.hf_access_token == TOKEN
    assert parse(["--config", file, "--hf-access-token", "other"]).data.hf_access_token == "other"
    assert parse([*DATA, f"--hf_access_token={TOKEN}"]).data.hf_access_token == TOKEN


@pytest.mark.parametrize(
    "words",
    [
        ["--hf-access-token", TOKEN, "--seeed", "3"],
        ["--hf-access-token", TOKEN, "--resolution", "12"],
        ["--hf-access-token", TOKEN, "--max-grad-norm", "1"],
        ["--hf-access-token", "half", TOKEN],
        ["--hf-acess-token", TOKEN],
        [f"--hf-acess-token={TOKEN}"],
        [f"hf_access_token={TOKEN}"],
        [f"hf-access-token={TOKEN}"],
        [f"hf_acess_token={TOKEN}"],
        [TOKEN],
    ],
)
def test_no_error_repeats_the_token_of_a_flag(words: list[str], refusal: Refusal):
    assert TOKEN not in refusal([*DATA, *words])
    assert TOKEN not in refusal(words)


@pytest.mark.parametrize(
    "text",
    [
        f"hf_access_token: {TOKEN}\nresolution: 12",
        f"hf_access_token: {TOKEN}\nseeed: 3",
        f"hf_access_token: [{TOKEN}]",
        f"hf_access_token: {{a: {TOKEN}}}",
        f"hf_acess_token: {TOKEN}",
        f"hf_access_token: '{TOKEN}",
        f"hf_access_token: *{TOKEN}",
        f"hf_access_token: {TOKEN}: x",
        f"hf_access_token: &{TOKEN} a\nseed: &{TOKEN} 3\nresolution: [",
        f"hf_access_token: {TOKEN}\nhf_access_token: {TOKEN}",
        f"hf_access_token: !{TOKEN}! a",
    ],
)
def test_no_error_repeats_the_token_of_a_file(text: str, written: Yaml, refusal: Refusal):
    assert TOKEN not in refusal(["--config", written(text)])


def test_no_help_and_no_log_line_shows_the_token(
    written: Yaml, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    file = written(f"train_data_dir: pictures\nhf_access_token: {TOKEN}\nmax_grad_norm: 0.5\n")
    with pytest.raises(SystemExit):
        parse(["--config", file, "--help"])
    config = parse(["--config", file])
    shown = "".join(capsys.readouterr())
    assert all(TOKEN not in text for text in (shown, caplog.text, repr(config), to_yaml(config), str(flat(config))))
    assert caplog.records


def test_the_readme_lists_every_flag_and_no_other():
    readme = (command_line.REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Flags")[1].split("## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ") and "`" in row]
    listed = [word for row in rows for word in re.findall(r"`([^`]+)`", row)]
    assert sorted(listed) == sorted(NAMES)
