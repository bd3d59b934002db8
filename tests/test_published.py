"""Published names: a MaxDiffusion file trains as it is, and no name is taken without a word of what becomes of it."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_eqx.config import TrainConfig, to_yaml
from sdxl_eqx.flags import GENERATE_NAMES, NAMES, merge, parse, parse_generate
from sdxl_eqx.flags.published import PUBLISHED, VALUES

BASE_XL = Path(__file__).parent / "published" / "base_xl.yml"
DATA = ["--train-data-dir", "pictures"]
TOKEN = "hf_topsecret"

MEANT = """
run_name base_output_directory output_dir seed hardware skip_jax_distributed_system jax_cache_dir
pretrained_model_name_or_path revision unet_checkpoint from_pt weights_dtype activations_dtype precision train_new_unet
norm_num_groups
attention flash_min_seq_length flash_block_sizes.block_q flash_block_sizes.block_kv flash_block_sizes.block_kv_compute
flash_block_sizes.block_q_dkv flash_block_sizes.block_kv_dkv flash_block_sizes.block_kv_dkv_compute
flash_block_sizes.block_q_dq flash_block_sizes.block_kv_dq flash_block_sizes.use_fused_bwd_kernel split_head_dim
attention_sharding_uniform mask_padding_tokens remat_policy scan_unroll
quantization quantization_local_shard_count use_qwix_quantization
learning_rate scale_lr max_train_steps num_train_epochs max_train_samples per_device_batch_size
gradient_accumulation_steps warmup_steps_fraction learning_rate_schedule_steps lr_schedule optimizer adam_b1 adam_b2
adam_eps adam_weight_decay opt_enable_grad_clipping max_grad_value opt_enable_grad_global_norm_clipping max_grad_norm
ema_decay ema_every decay_all moments_dtype max_nonfinite_steps
snr_gamma timestep_bias.strategy timestep_bias.multiplier timestep_bias.begin timestep_bias.end timestep_bias.portion
diffusion_scheduler_config._class_name diffusion_scheduler_config.prediction_type
diffusion_scheduler_config.rescale_zero_terminal_snr diffusion_scheduler_config.timestep_spacing
loss_type huber_c noise_offset input_perturbation
dataset_name dataset_config_name train_split train_data_dir dataset_type image_column caption_column resolution
aspect_ratio_buckets center_crop random_flip enable_data_shuffling cache_latents_text_encoder_outputs
dataset_save_location hf_access_token transform_images_num_proc hf_data_dir hf_train_files caption_dropout
caption_shuffle keep_tokens caption_chunks bucket_count bucket_upscale max_bad_fraction reuse_example_batch
train_text_encoder text_encoder_learning_rate lora_rank lora_alpha lora_targets lora_init
train_controlnet conditioning_image_column
mesh_axes dcn_data_parallelism dcn_fsdp_parallelism dcn_context_parallelism dcn_tensor_parallelism
ici_data_parallelism ici_fsdp_parallelism ici_context_parallelism ici_tensor_parallelism logical_axis_rules
data_sharding allow_split_physical_axes compile_topology compile_topology_num_slices
checkpoint_every checkpoints_to_keep export_dtype enable_single_replica_ckpt_restoring
write_metrics metrics_file gcs_metrics log_period save_config_to_gcs write_timing_metrics timing_metrics_file
enable_profiler skip_first_n_steps_for_profiler profiler_steps
prompt negative_prompt do_classifier_free_guidance guidance_scale guidance_rescale num_inference_steps sample_every
eval_every eval_split tracker
""".split()  # noqa: SIM905, a list of so many names is not read better with quotes
"""The published names that are flags of training as they are."""

FATES: dict[str, tuple[Any, Any, str, str]] = {
    # key: (value that asks for nothing, value that asks, what a file says of that, what the flag says of it)
    "jit_initializers": (True, False, "mapped to True, which always holds", "cannot be had"),
    "tokenize_captions_num_proc": (4, 8, "mapped to transform_images_num_proc", "mapped to transform_images_num_proc"),
    **{
        key: (False, True, "services of Google Cloud", "cannot be had: services of Google Cloud")
        for key in ("enable_mllog", "enable_ml_diagnostics", "enable_ondemand_xprof")
    },
    "profiler_gcs_path": ("", "gs://a/b", "services of Google Cloud", "cannot be had: services of Google Cloud"),
    **{
        key: (None, value, "of scripts/generate.py", "of scripts/generate.py")
        for key, value in (
            ("lightning_repo", "a/b"), ("lightning_ckpt", "a.safetensors"), ("lightning_from_pt", False),
            ("lora_config.lora_model_name_or_path", "a"), ("lora_config.weight_name", "a"),
            ("lora_config.adapter_name", "a"), ("lora_config.scale", 0.5), ("lora_config.from_pt", True),
            ("controlnet_model_name_or_path", "a/b"), ("controlnet_from_pt", False),
            ("controlnet_conditioning_scale", 0.5), ("controlnet_image", "a.png"),
        )
    },
}  # fmt: skip
"""Every other published name, and what becomes of it."""

Write = Callable[[dict[str, Any]], str]
Refusal = Callable[[Sequence[str]], str]


@pytest.fixture(autouse=True)
def informed(caplog: pytest.LogCaptureFixture):
    """Log lines from INFO up, as the scripts show them."""
    caplog.set_level(logging.INFO, "sdxl_eqx")


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """Writes values as a YAML file and returns its path."""

    def write(values: dict[str, Any]) -> str:
        file = tmp_path / "user.yml"
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one message that refuses a command line, with exit code 2."""

    def refuse(argv: Sequence[str]) -> str:
        with pytest.raises(SystemExit) as exit_:
            parse(argv)
        err = capsys.readouterr().err
        assert exit_.value.code == 2
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return refuse


def flag_of(key: str) -> str:
    """A key as a flag."""
    return "--" + key.replace("_", "-")


def entry(key: str, value: Any) -> dict[str, Any]:
    """A key with its value as a file has it."""
    outer, _, inner = key.partition(".")
    return {outer: {inner: value} if inner else value}


def filled(**values: Any) -> dict[str, Any]:
    """base_xl.yml with a few values replaced."""
    return {**yaml.safe_load(BASE_XL.read_text(encoding="utf-8")), **values}


def test_every_published_name_is_known_and_has_a_row():
    assert sorted(set(MEANT) - NAMES.keys()) == []
    assert FATES.keys() == PUBLISHED.keys()
    assert not PUBLISHED.keys() & NAMES.keys()


@pytest.mark.parametrize("key", [key for key, row in FATES.items() if row[0] is not None])
def test_a_published_value_that_asks_for_nothing_is_taken_from_file_and_flag(
    key: str, written: Write, caplog: pytest.LogCaptureFixture
):
    off = FATES[key][0]
    assert parse(["--config", written(entry(key, off)), *DATA]) == parse(DATA)
    from_file = len(caplog.records)
    assert parse([*DATA, f"{flag_of(key)}={off}"]) == parse(DATA)
    assert (from_file, len(caplog.records)) == (1, 2)


@pytest.mark.parametrize("key", FATES)
def test_a_published_value_that_asks_is_said_or_refused_with_the_reason(
    key: str, written: Write, refusal: Refusal, caplog: pytest.LogCaptureFixture
):
    _, on, in_file, as_flag = FATES[key]
    file = written(entry(key, on))
    parse(["--config", file, *DATA])
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(file)
    assert key.partition(".")[0] in message and in_file in message
    if key == "tokenize_captions_num_proc":
        assert parse([*DATA, f"{flag_of(key)}={on}"]).data.transform_images_num_proc == on
        assert as_flag in caplog.records[-1].getMessage()
    else:
        said = refusal([*DATA, f"{flag_of(key)}={on}"])
        assert flag_of(key) in said and as_flag in said


@pytest.mark.parametrize("words", [["--enable-mllog"], ["--enable_mllog", "True"], ["--enable-mllog=true"]])
def test_published_booleans_take_every_form(words: list[str], refusal: Refusal):
    assert "--enable-mllog True cannot be had" in refusal([*DATA, *words])
    assert "--enable-mllog, --no-enable-mllog" in refusal([*DATA, "--enable-mllog", "maybe"])
    parse([*DATA, "--no-enable-mllog", "--enable-mllog", "False"])


# base_xl.yml

EXPECTED = [
    "hardware tpu: mapped to auto, which takes a TPU where there is one",
    "revision refs/pr/95: mapped to main, which has safetensors; refs/pr/95 is the branch of SDXL base for Flax",
    "norm_num_groups 32: mapped to -1, which takes what the model's unet/config.json says",
    "dataset_type tf: mapped to auto, which takes a data set of the Hub, or what lies in train_data_dir",
    "jit_initializers True: mapped to True, which always holds: weights are made by compiled code, on their devices",
    "tokenize_captions_num_proc 4: mapped to transform_images_num_proc, whose threads do all that is done to a sample; "
    "that is given too, and counts",
    "ignored: enable_mllog, enable_ml_diagnostics, profiler_gcs_path, enable_ondemand_xprof (services of Google Cloud, "
    "to which nothing here reports); lightning_repo, lightning_ckpt, lightning_from_pt, lora_config, "
    "controlnet_model_name_or_path, controlnet_from_pt, controlnet_conditioning_scale, controlnet_image (of "
    "scripts/generate.py)",
]


@pytest.mark.parametrize("data", [{"train_data_dir": "pictures"}, {"dataset_name": "someone/pictures"}])
def test_base_xl_parses_with_one_line_for_each_name_that_is_mapped_and_one_for_what_is_ignored(
    data: dict[str, str], written: Write, caplog: pytest.LogCaptureFixture
):
    file = written(filled(**data, pretrained_model_name_or_path="models/mine", output_dir="runs"))
    config = parse(["--config", file])
    assert [record.getMessage() for record in caplog.records] == [f"{file}: {line}" for line in EXPECTED]
    assert all(record.name == "sdxl_eqx" for record in caplog.records)
    theirs = {
        "pretrained_model_name_or_path": "models/mine", "output_dir": "runs", "from_pt": False,
        "attention": "dot_product", "diffusion_scheduler_config._class_name": "FlaxEulerDiscreteScheduler",
        "diffusion_scheduler_config.prediction_type": "epsilon",
        "diffusion_scheduler_config.rescale_zero_terminal_snr": False,
        "diffusion_scheduler_config.timestep_spacing": "trailing",
    }  # fmt: skip
    assert config == merge(TrainConfig(), {**theirs, **data})


def test_base_xl_without_a_data_set_says_how_to_name_one(refusal: Refusal):
    assert "--train-data-dir ''" in refusal(["--config", str(BASE_XL)])


def test_what_a_run_writes_of_base_xl_reads_back_without_a_word(written: Write, caplog: pytest.LogCaptureFixture):
    config = parse(["--config", written(filled(train_data_dir="pictures"))])
    caplog.clear()
    again = parse(["--config", written(yaml.safe_load(to_yaml(config)))])
    assert again == config
    assert not caplog.records


def test_base_xl_holds_only_names_that_have_a_row():
    keys = {f"{key}.{inner}" for key, value in filled().items() if isinstance(value, dict) for inner in value}
    keys |= {key for key, value in filled().items() if not isinstance(value, dict)}
    assert keys <= set(MEANT) | FATES.keys()
    assert {"jit_initializers", "quantization", "lora_config.scale", "timestep_bias.portion"} <= keys


# Values


@pytest.mark.parametrize(("key", "old"), VALUES)
def test_a_published_value_is_mapped_with_a_line(
    key: str, old: str, written: Write, caplog: pytest.LogCaptureFixture, refusal: Refusal
):
    value = VALUES[key, old]
    name = NAMES[key]
    config = parse(["--config", written({key: old}), *DATA])
    assert str(getattr(getattr(config, name.group), name.field)) == value.now
    assert f"user.yml: {key} {old}: mapped to {value.now}, which {value.why}" in caplog.text
    caplog.clear()
    asked = parse([*DATA, name.flag, old, *(["--train-new-unet"] if key == "norm_num_groups" else [])])
    assert str(getattr(getattr(asked, name.group), name.field)) == (value.now if value.as_flag else old)
    assert len(caplog.records) == value.as_flag


def test_hardware_of_a_flag_is_asked_for_over_that_of_a_file(written: Write):
    assert parse(["--config", written({"hardware": "tpu"}), *DATA, "--hardware", "gpu"]).run.hardware == "gpu"


@pytest.mark.parametrize(
    ("values", "words", "expected"),
    [
        ({"tokenize_captions_num_proc": 8}, [], 8),
        ({"tokenize_captions_num_proc": 8, "transform_images_num_proc": 2}, [], 2),
        ({"transform_images_num_proc": 2, "tokenize_captions_num_proc": 8}, [], 2),
        ({"tokenize_captions_num_proc": 8}, ["--transform-images-num-proc", "3"], 3),
        ({"transform_images_num_proc": 2}, ["--tokenize-captions-num-proc", "8"], 8),
        ({}, ["--tokenize-captions-num-proc", "8", "--transform-images-num-proc", "3"], 3),
    ],
)
def test_threads_of_captions_count_where_those_of_pictures_are_not_given(
    values: dict[str, Any], words: list[str], expected: int, written: Write
):
    assert parse(["--config", written({**values, "seed": 1}), *DATA, *words]).data.transform_images_num_proc == expected


@pytest.mark.parametrize(
    ("values", "words", "name", "folder", "dropped"),
    [
        ({"dataset_name": "a/b", "train_data_dir": "d", "dataset_type": "grain"}, [], "", "d", "dataset_type is array"),
        ({"dataset_name": "a/b", "train_data_dir": "d", "dataset_type": "tfrecord"}, [], "", "d", "is tfrecord"),
        ({"dataset_name": "a/b", "dataset_type": "synthetic"}, [], "", "", "is synthetic"),
        (
            {"dataset_name": "a/b", "dataset_type": "tf"},
            ["--train-data-dir", "d"],
            "",
            "d",
            "--train-data-dir is given",
        ),
        (
            {"train_data_dir": "d", "dataset_type": "tf"},
            ["--dataset-name", "a/b"],
            "a/b",
            "",
            "--dataset-name is given",
        ),
    ],
)
def test_a_data_set_of_the_file_gives_way_to_the_type_or_the_flag_with_a_line(
    values: dict[str, Any], words: list[str], name: str, folder: str, dropped: str, written: Write,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    data = parse(["--config", written(values), *words]).data
    assert (data.dataset_name, data.train_data_dir) == (name, folder)
    (record,) = [record for record in caplog.records if "has no effect here" in record.getMessage()]
    assert dropped in record.getMessage()


def test_nothing_is_said_of_a_data_set_that_a_flag_takes_out(written: Write, caplog: pytest.LogCaptureFixture):
    file = written({"dataset_name": "a/b", "train_data_dir": "d", "dataset_type": "tfrecord"})
    assert parse(["--config", file, "--dataset-name", ""]).data.train_data_dir == "d"
    assert not caplog.records


def test_two_data_sets_in_one_place_are_an_error(written: Write, refusal: Refusal):
    assert "--dataset-name" in refusal(["--config", written({"dataset_name": "a/b", "train_data_dir": "d"})])
    assert "--dataset-name" in refusal(["--dataset-name", "a/b", "--train-data-dir", "d"])
    assert "--dataset-name" in refusal(["--dataset-name", "a/b", "--dataset-type", "grain"])


# Wrong names, and the token


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("enable_mlog", "enable_mllog"),
        ("norm_num_group", "norm_num_groups"),
        ("lightning_rep", "lightning_repo"),
        ("lora_confg", "lora_config."),
        ("train_text_encoders", "train_text_encoder"),
        ("max_train_step", "max_train_steps"),
        ("tokenize_caption_num_proc", "tokenize_captions_num_proc"),
    ],
)
def test_a_misspelled_published_name_finds_its_neighbour(key: str, near: str, written: Write, refusal: Refusal):
    message = refusal(["--config", written(filled(train_data_dir="pictures", **{key: 1}))])
    assert re.search(rf"user\.yml: {key}: no such key; did you mean {re.escape(near)}", message), message
    as_flag = refusal([*DATA, flag_of(key), "1"])
    assert f"{flag_of(key)}: no such flag; did you mean {flag_of(near)}" in as_flag, as_flag


def test_names_like_no_other_and_wrong_values_are_refused(written: Write, refusal: Refusal):
    assert "zzz: no such key" in refusal(["--config", written({"zzz": 1}), *DATA])
    assert "lora_config.scal: no such key" in refusal(["--config", written({"lora_config": {"scal": 1}}), *DATA])
    assert "norm_num_groups: many: must be a whole number" in refusal(
        ["--config", written({"norm_num_groups": "many"}), *DATA]
    )
    assert "--norm-num-groups 'many': must be a whole number" in refusal([*DATA, "--norm-num-groups", "many"])


def test_nothing_said_of_a_published_file_shows_the_token(
    written: Write, refusal: Refusal, caplog: pytest.LogCaptureFixture
):
    file = written(filled(train_data_dir="pictures", hf_access_token=TOKEN))
    assert parse(["--config", file]).data.hf_access_token == TOKEN
    assert caplog.records and TOKEN not in caplog.text
    for words in (["--enable-mllog"], ["--lightning-repo", TOKEN], ["--enable-mlog", TOKEN], ["--dataset-type", "x"]):
        assert TOKEN not in refusal(["--config", file, *words])


# Drawing


def test_drawing_takes_the_file_of_training_and_passes_over_what_is_published(
    written: Write, caplog: pytest.LogCaptureFixture
):
    values = filled(train_data_dir="pictures", controlnet_model_name_or_path="", prompt="a fox")
    config = parse_generate(["--config", written(values)])
    assert config.picture.prompt == "a fox"
    (record,) = [record for record in caplog.records if "of no meaning here" in record.getMessage()]
    listed = record.getMessage().partition(": of no meaning here: ")[2].split(", ")
    known = {key.partition(".")[0] for key in GENERATE_NAMES}
    assert listed == [key for key in values if key not in known]
