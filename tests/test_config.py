"""The config: its defaults are the published ones, every rule of its check is needed, and YAML keeps it."""

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sdxl_eqx.config import FlashBlockSizes, TrainConfig, flat, groups, is_flat, to_yaml
from sdxl_eqx.config.rules import plain
from sdxl_eqx.config.shared import AXIS_RULES
from sdxl_eqx.config.train import rules
from sdxl_eqx.flags import NAMES, merge

VALID = merge(TrainConfig(), {"train_data_dir": "pictures"})

BAD: dict[str, list[Any]] = {
    "run_name": ["a/b", "..", ".", "a b", "a\\b"],
    "base_output_directory": ["s3://bucket/runs", "gs://", "gs:///runs"],
    "output_dir": ["s3://bucket/runs", "gs://", "gs:///runs"],
    "seed": [-1, 2**32],
    "flash_min_seq_length": [-1],
    "scan_unroll": [0, -1],
    "quantization_local_shard_count": [-2],
    **{f"flash_block_sizes.{name}": [0, -128] for name in FlashBlockSizes.__annotations__ if name.startswith("block_")},
    "learning_rate": [0.0, -1.0, math.inf, math.nan],
    "max_train_steps": [0, -2],
    "num_train_epochs": [0, -1],
    "per_device_batch_size": [0.0, -0.5, math.inf, math.nan],
    "warmup_steps_fraction": [-0.1, 1.1, math.nan],
    "learning_rate_schedule_steps": [0, -2],
    "adam_b1": [-0.1, 1.0, math.nan],
    "adam_b2": [-0.1, 1.0, math.nan],
    "adam_eps": [0.0, -1e-8, math.inf, math.nan],
    "adam_weight_decay": [-0.1, math.inf, math.nan],
    "max_grad_value": [0.0, math.inf, math.nan],
    "max_grad_norm": [0.0, math.inf, math.nan],
    "ema_decay": [-0.1, 1.0, math.nan],
    "ema_every": [0],
    "max_nonfinite_steps": [-1],
    "gradient_accumulation_steps": [0, -1],
    "lr_num_cycles": [0],
    "lr_step_rules": [
        "",
        "0.1:10",
        "1:10,0.1:20",
        "1:20,0.1:10,0.01",
        "1:10,0.1:10,0.01",
        "1:0,0.1",
        "-1:10,0.1",
        "1:10,inf",
        "1:10,nan",
        "1:1.5,0.1",
        "a",
        "1:b,0.1",
        "1:10,,0.1",
        "1:10:20,0.1",
    ],
    "lora_rank": [-1],
    "lora_alpha": [-0.1, math.inf, math.nan],
    "int8_base": [True],
    "lora_targets": [()],
    "lora_dropout": [-0.1, 1.0, math.nan],
    "train_text_encoder": [True],  # beside BESIDE's ControlNet
    "text_encoder_learning_rate": [0.0, -1.0, math.inf, math.nan],
    "snr_gamma": [0.0, -2.0, math.inf, math.nan],
    "huber_c": [0.0, 1.1, math.nan],
    "noise_offset": [-0.1, math.inf, math.nan],
    "input_perturbation": [-0.1, math.inf, math.nan],
    "timestep_bias.multiplier": [0.0, -1.0, math.inf, math.nan],
    "timestep_bias.begin": [-1, 1000],
    "timestep_bias.end": [1001],
    "timestep_bias.portion": [0.0, 1.1, math.nan],
    "dataset_name": ["someone/pictures"],  # beside VALID's folder
    "train_data_dir": [""],
    "compile_topology_num_slices": [0, -2],
    "resolution": [0, 4, -8, 12],
    "max_train_samples": [0, -2],
    "transform_images_num_proc": [0],
    "bucket_count": [0],
    "keep_tokens": [-1],
    "caption_chunks": [0],
    "caption_dropout": [-0.1, 1.1, math.nan],
    "max_bad_fraction": [-0.1, 1.1, math.nan],
    "train_controlnet": [True],  # beside BESIDE's TFRecords
    "controlnet_conditioning_dropout": [-0.1, 1.1, math.nan],
    "class_data_dir": ["dogs"],  # as above
    "class_prompt": ["", " "],
    "prior_loss_weight": [-0.1, math.inf, math.nan],
    "num_class_images": [0, -1],
    "mesh_axes": [
        (),
        ("data", "fsdp", "context"),
        ("data", "fsdp", "context", "context"),
        ("data", "fsdp", "context", "heads"),
        ("data", "fsdp", "context", "tensor", "tensor"),
    ],
    "dcn_data_parallelism": [0, -2],
    "ici_data_parallelism": [0, -2],
    **{  # -1 beside the -1 of data
        f"{kind}_{axis}_parallelism": [0, -2, -1] for kind in ("dcn", "ici") for axis in ("fsdp", "context", "tensor")
    },
    "logical_axis_rules": [
        (("embd", ("fsdp",)),),
        (("embed", ("fsdb",)),),
        (("embed", ("fsdp", "fsdp")),),
    ],
    "data_sharding": [(), ("rows",), ("data", "fsdp", "data")],
    "checkpoint_every": [0, -2],
    "checkpoints_to_keep": [0],
    "norm_num_groups": [0, -2],
    "log_period": [0],
    "skip_first_n_steps_for_profiler": [-1],
    "profiler_steps": [0],
    "guidance_scale": [-0.1, math.inf, math.nan],
    "guidance_rescale": [-0.1, 1.1, math.nan],
    "diffusion_scheduler_config._class_name": ["Eulr", "KDPM2DiscreteScheduler"],
    "diffusion_scheduler_config.algorithm_type": ["dpmsolver++"],  # beside BESIDE's sampler
    "num_inference_steps": [0, 1001],
    "sample_every": [0, -2],
    "eval_every": [0, -2],
    "eval_split": ["0", "1", "1.5", "-0.1", "nan", "validation"],
    "samples_per_grid": [-1],
    "caption_retrieval": [-1],
}
"""Values that each rule must refuse, by key."""

BESIDE: dict[str, dict[str, Any]] = {
    "lr_step_rules": {"lr_schedule": "piecewise"},
    **{key: {"lora_rank": 4} for key in ("lora_alpha", "lora_targets", "lora_dropout")},
    "int8_base": {"lora_rank": 4, "quantization": "int8"},
    "train_text_encoder": {"train_controlnet": True},
    "train_controlnet": {"dataset_type": "tfrecord"},
    "class_data_dir": {"dataset_type": "tfrecord", "class_prompt": "a dog"},
    "class_prompt": {"class_data_dir": "dogs"},
    "diffusion_scheduler_config.algorithm_type": {"diffusion_scheduler_config._class_name": "DDIM"},
}
"""The values beside which a rule refuses."""

GOOD: dict[str, list[Any]] = {
    "run_name": ["", "a", "run-1.2_b"],
    "seed": [0, 2**32 - 1],
    "max_train_steps": [-1, 1],
    "per_device_batch_size": [0.25],
    "warmup_steps_fraction": [0.0, 1.0],
    "adam_b1": [0.0],
    "ema_decay": [0.999],
    "max_nonfinite_steps": [0],
    "lr_step_rules": ["0.5", "1:10,0.1", "1:10,0.1:20,0", "1:1000,0.1:2000,0.01"],
    "lora_rank": [0, 1],
    "lora_alpha": [0.0, 0.5],
    "lora_targets": [("to_q",)],
    "lora_dropout": [0.0, 0.99],
    "text_encoder_learning_rate": [1e-12],
    "snr_gamma": [-1.0, 5.0],
    "huber_c": [1.0],
    "noise_offset": [0.0],
    "timestep_bias.begin": [999],
    "timestep_bias.end": [1, 1000],
    "timestep_bias.portion": [1.0],
    "eval_split": ["", "0.1"],
    "resolution": [8, 1024],
    "controlnet_conditioning_dropout": [0.0, 1.0],
    "prior_loss_weight": [0.0],
    "flash_min_seq_length": [0, 4096],
    "flash_block_sizes.block_q": [None, 1],
    "mesh_axes": [("tensor", "context", "fsdp", "data")],
    "ici_data_parallelism": [-1, 8],
    "ici_fsdp_parallelism": [1, 4],
    "dcn_tensor_parallelism": [1, 2],
    "logical_axis_rules": [(), (("embed", ()), ("activation_kv_length", ("fsdp", "context")))],
    "data_sharding": [("data",), ("tensor", "data", "fsdp", "context")],
    "checkpoint_every": [-1, 1],
    "guidance_scale": [0.0, 1.0],
    "samples_per_grid": [0],
}


def test_the_table_of_bad_values_covers_every_rule():
    assert set(BAD) == {name for name, _, _ in rules(VALID)}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_rule_refuses_a_bad_value_and_names_its_flag_the_value_and_the_rule(key: str, value: Any):
    rule = next(rule for name, rule, _ in rules(VALID) if name == key)
    with pytest.raises(ValueError, match=r"^--") as error:
        merge(VALID, {**BESIDE.get(key, {}), key: value}).check()
    assert str(error.value) == f"{NAMES[key].flag} {plain(value)!r}: {rule}"


def test_pictures_of_a_class_go_with_no_controlnet():
    wanted = {"class_data_dir": "dogs", "class_prompt": "a dog"}
    merge(VALID, wanted).check()
    with pytest.raises(ValueError, match=r"^--class-data-dir 'dogs': .* leave it or --train-controlnet out$"):
        merge(VALID, {**wanted, "train_controlnet": True}).check()


@pytest.mark.parametrize(
    ("values", "other", "message"),
    [
        ({"lora_rank": 4}, {"train_controlnet": True}, "--lora-rank 4: a LoRA and a ControlNet do not train together"),
        ({"lora_rank": 4}, {"train_new_unet": True}, "--lora-rank 4: a LoRA is of a model that is there"),
        ({"train_text_encoder": True}, {"dataset_type": "tfrecord"}, "--train-text-encoder True: TFRecords hold text"),
    ],
)
def test_what_does_not_train_together_is_refused(values: dict[str, Any], other: dict[str, Any], message: str):
    merge(VALID, values).check()
    merge(VALID, other).check()
    with pytest.raises(ValueError, match=f"^{message}"):
        merge(VALID, {**values, **other}).check()


def test_text_encoders_train_beside_the_unet_and_by_lora_as_it_does():
    assert merge(VALID, {"train_text_encoder": True}).trains == "unet"
    together = merge(VALID, {"train_text_encoder": True, "lora_rank": 4})
    together.check()
    assert together.trains == "lora"


@pytest.mark.parametrize(
    "values", [{"train_text_encoder": True}, {"caption_shuffle": True}, {"cache_latents_text_encoder_outputs": False}]
)
def test_text_is_cached_where_neither_it_nor_what_encodes_it_changes(values: dict[str, Any]):
    assert VALID.is_text_cached and not merge(VALID, values).is_text_cached


def test_prodigy_wants_a_factor_for_its_learning_rate():
    with pytest.raises(ValueError, match=r"^--learning-rate 4e-07: with --optimizer prodigy .* give 1$"):
        merge(VALID, {"optimizer": "prodigy"}).check()
    merge(VALID, {"optimizer": "prodigy", "learning_rate": 1.0}).check()


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in GOOD.items() for value in values])
def test_values_at_the_edge_of_a_rule_are_taken(key: str, value: Any):
    merge(VALID, {**BESIDE.get(key, {}), key: value}).check()


def test_the_defaults_are_complete_but_for_the_data():
    with pytest.raises(ValueError, match=r"^--train-data-dir '': .*--config configs/tiny\.yaml"):
        TrainConfig().check()
    VALID.check()


@pytest.mark.parametrize("kind", ["dcn", "ici"])
@pytest.mark.parametrize("axis", ["fsdp", "context", "tensor"])
def test_any_one_axis_may_take_the_rest(kind: str, axis: str):
    merge(VALID, {f"{kind}_data_parallelism": 1, f"{kind}_{axis}_parallelism": -1}).check()


def test_an_error_about_axis_rules_shows_only_those_that_were_given():
    given = (("heads", ("data",)), ("embed", ("rows",)), ("mlp", ("tensor",)))
    with pytest.raises(ValueError) as error:
        merge(VALID, {"logical_axis_rules": given}).check()
    assert "--logical-axis-rules [['embed', ['rows']], ['heads', ['data']]]: " in str(error.value)


def test_axis_rules_that_are_given_replace_those_of_their_names():
    once = merge(VALID, {"logical_axis_rules": (("embed", ()), ("heads", ("fsdp", "tensor")))})
    twice = merge(once, {"logical_axis_rules": (("heads", ()), ("heads", ("data",)))})
    assert dict(once.parallel.logical_axis_rules) == dict(AXIS_RULES) | {"embed": (), "heads": ("fsdp", "tensor")}
    assert dict(twice.parallel.logical_axis_rules) == dict(AXIS_RULES) | {"embed": (), "heads": ("data",)}


def test_the_published_defaults_hold():
    published = {
        "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
        "weights_dtype": "float32",
        "activations_dtype": "bfloat16",
        "learning_rate": 4e-7,
        "max_train_steps": 200,
        "num_train_epochs": 1,
        "per_device_batch_size": 2.0,
        "adam_b1": 0.9,
        "adam_b2": 0.999,
        "adam_eps": 1e-8,
        "adam_weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "resolution": 1024,
        "cache_latents_text_encoder_outputs": True,
        "checkpoint_every": -1,
        "guidance_scale": 9.0,
        "num_inference_steps": 20,
        "flash_block_sizes": dict.fromkeys(FlashBlockSizes.__annotations__),
        "mesh_axes": ["data", "fsdp", "context", "tensor"],
        "dcn_data_parallelism": -1,
        "ici_tensor_parallelism": 1,
        "data_sharding": ["data", "fsdp", "context", "tensor"],
    }
    assert {key: flat(TrainConfig())[key] for key in published} == published


def test_nothing_in_a_config_can_be_changed():
    parts = [TrainConfig(), *groups(TrainConfig()).values()]
    for part in parts:
        field = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, getattr(part, field))


def test_no_name_is_in_two_groups():
    fields = [f.name for name, part in groups(TrainConfig()).items() if is_flat(name) for f in dataclasses.fields(part)]
    assert len(fields) == len(set(fields))
    assert not set(fields) & {name for name in groups(TrainConfig()) if not is_flat(name)}


def test_base_output_directory_wins_over_output_dir():
    assert merge(VALID, {"output_dir": "a"}).run.root == "a"
    assert merge(VALID, {"output_dir": "a", "base_output_directory": "b"}).run.root == "b"


def test_the_token_is_in_no_repr_no_yaml_and_no_dictionary():
    config = merge(VALID, {"hf_access_token": "hf_topsecret"})
    for text in (repr(config), str(config), to_yaml(config), str(flat(config))):
        assert "hf_topsecret" not in text
    assert "hf_access_token" not in flat(config)


def test_yaml_holds_every_published_name_but_the_token():
    keys = set()
    for key, value in yaml.safe_load(to_yaml(VALID)).items():
        keys |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    assert keys == set(NAMES) - {"hf_access_token"}


@pytest.mark.parametrize("module", ["groups", "trained"])
def test_every_field_says_what_it_means(module: str):
    import ast
    import importlib
    import inspect

    for node in ast.parse(inspect.getsource(importlib.import_module(f"sdxl_eqx.config.{module}"))).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
                    assert isinstance(text, str), f"{node.name}.{ast.unparse(field.target)} has no docstring"
                    assert len(text) > 10


@pytest.mark.parametrize(
    "prompt", ["\x85", "a\x85b", "\u2028", "\ufeff", "two\nlines", "\x00", "\U0001f996", "é", "yes", "~", "1e3", " "]
)
def test_no_prompt_is_changed_by_yaml(prompt: str):
    assert yaml.safe_load(to_yaml(merge(VALID, {"prompt": prompt})))["prompt"] == prompt


def test_yaml_keeps_other_scripts_readable():
    assert "ein Schloß 城" in to_yaml(merge(VALID, {"prompt": "ein Schloß 城"}))


def test_the_flat_form_is_the_same_after_a_round_trip_through_json():
    config = merge(VALID, {"data_sharding": ("data",), "flash_block_sizes.block_q": 512})
    assert json.loads(json.dumps(flat(config))) == flat(config)


@given(prompt=st.text(st.characters(exclude_categories=["Cs"])), rate=st.floats(1e-12, 1e3), steps=st.integers(1))
def test_yaml_says_what_the_config_says(prompt: str, rate: float, steps: int):
    config = merge(VALID, {"prompt": prompt, "learning_rate": rate, "max_train_steps": steps})
    assert yaml.safe_load(to_yaml(config)) == flat(config)
    assert replace(config) == config
