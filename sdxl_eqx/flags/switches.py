"""Flags that have an effect only where another is on: an error on the command line, a log line from a file."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sdxl_eqx.config import FlashBlockSizes, GenerateConfig, TrainConfig
from sdxl_eqx.flags.names import GENERATE_NAMES, NAMES, FlagError

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class Switch:
    """`keys` have an effect only where `is_on` holds; `remedy` names the switch."""

    keys: tuple[str, ...]
    is_on: Callable[[Any], bool]
    remedy: str
    off_asks: bool = False
    """Whether a Boolean turned off asks for something too."""


def _may_be_flash(config: TrainConfig | GenerateConfig) -> bool:
    return config.attention.attention in ("flash", "auto")


def _has_context(config: TrainConfig | GenerateConfig) -> bool:
    return (config.parallel.ici_context_parallelism, config.parallel.dcn_context_parallelism) != (1, 1)


FLASH = "choose --attention flash or auto"
SHARED = (
    Switch(
        ("revision",),
        lambda c: not c.model.pretrained_model_name_or_path.startswith("asset:"),
        "name a model of the Hub with --pretrained-model-name-or-path",
    ),
    Switch(
        ("flash_min_seq_length", *(f"flash_block_sizes.{field.name}" for field in fields(FlashBlockSizes))),
        _may_be_flash,
        FLASH,
    ),
    Switch(("mask_padding_tokens",), _may_be_flash, FLASH, off_asks=True),
    Switch(("attention_sharding_uniform",), _has_context, "set --ici-context-parallelism", off_asks=True),
)
"""Of training and generation."""

SWITCHES = (
    *SHARED,
    Switch(("output_dir",), lambda c: not c.run.base_output_directory, "leave --base-output-directory empty"),
    Switch(("compile_topology_num_slices",), lambda c: bool(c.parallel.compile_topology), "name a --compile-topology"),
    Switch(
        ("lora_alpha", "lora_targets", "lora_init", "lora_dropout", "use_rslora", "use_dora", "int8_base"),
        lambda c: c.lora.lora_rank > 0,
        "set --lora-rank",
    ),
    Switch(("text_encoder_learning_rate",), lambda c: c.text.train_text_encoder, "add --train-text-encoder"),
    Switch(
        ("quantization_local_shard_count",),
        lambda c: c.quantization.how in ("int8", "fp8"),
        "choose --quantization int8 or fp8",
    ),
    Switch(("unet_checkpoint",), lambda c: not c.model.train_new_unet, "leave --train-new-unet out"),
    Switch(("norm_num_groups",), lambda c: c.model.train_new_unet, "add --train-new-unet"),
    Switch(
        ("learning_rate_schedule_steps",),
        lambda c: c.optim.lr_schedule != "constant" or c.optim.warmup_steps_fraction > 0,
        "choose another --lr-schedule than constant, or set --warmup-steps-fraction",
    ),
    Switch(
        ("lr_num_cycles",),
        lambda c: c.optim.lr_schedule == "cosine_with_restarts",
        "choose --lr-schedule cosine_with_restarts",
    ),
    Switch(("lr_step_rules",), lambda c: c.optim.lr_schedule == "piecewise", "choose --lr-schedule piecewise"),
    Switch(("adam_b1", "adam_b2"), lambda c: c.optim.optimizer != "adafactor", "choose another --optimizer"),
    Switch(("adam_eps",), lambda c: c.optim.optimizer not in ("adafactor", "lion"), "choose another --optimizer"),
    Switch(("moments_dtype",), lambda c: c.optim.optimizer != "adamw8bit", "choose another --optimizer"),
    Switch(("huber_c", "huber_schedule"), lambda c: c.loss.loss_type != "l2", "choose another --loss-type than l2"),
    Switch(
        ("timestep_bias.multiplier",), lambda c: c.timestep_bias.strategy != "none", "choose a --timestep-bias.strategy"
    ),
    Switch(
        ("timestep_bias.begin", "timestep_bias.end"),
        lambda c: c.timestep_bias.strategy == "range",
        "choose --timestep-bias.strategy range",
    ),
    Switch(
        ("timestep_bias.portion",),
        lambda c: c.timestep_bias.strategy in ("earlier", "later"),
        "choose --timestep-bias.strategy earlier or later",
    ),
    Switch(("eval_every",), lambda c: bool(c.sample.eval_split), "hold samples out with --eval-split"),
    Switch(("timing_metrics_file",), lambda c: c.metrics.write_timing_metrics, "add --write-timing-metrics"),
    Switch(
        ("skip_first_n_steps_for_profiler", "profiler_steps"),
        lambda c: c.metrics.enable_profiler,
        "add --enable-profiler",
    ),
    Switch(("decay_all",), lambda c: c.optim.adam_weight_decay > 0, "set --adam-weight-decay above 0"),
    Switch(("max_grad_value",), lambda c: c.optim.opt_enable_grad_clipping, "add --opt-enable-grad-clipping"),
    Switch(
        ("max_grad_norm",),
        lambda c: c.optim.opt_enable_grad_global_norm_clipping,
        "add --opt-enable-grad-global-norm-clipping",
    ),
    Switch(("ema_every",), lambda c: c.optim.ema_decay > 0, "set --ema-decay above 0"),
    Switch(
        ("dataset_save_location",),
        lambda c: c.data.cache_latents_text_encoder_outputs,
        "add --cache-latents-text-encoder-outputs",
    ),
    Switch(
        ("dataset_config_name", "hf_data_dir", "hf_train_files"),
        lambda c: bool(c.data.dataset_name),
        "name a data set of the Hub with --dataset-name",
    ),
    Switch(
        ("train_split",),
        lambda c: bool(c.data.dataset_name) or c.data.dataset_type == "hf",
        "name a data set of the Hub with --dataset-name, or choose --dataset-type hf",
    ),
    Switch(
        ("train_data_dir", "image_column", "caption_column", "instance_prompt"),
        lambda c: c.data.dataset_type != "synthetic",
        "choose another --dataset-type than synthetic",
    ),
    Switch(
        (
            "aspect_ratio_buckets",
            "center_crop",
            "random_flip",
            "caption_shuffle",
            "caption_chunks",
            "image_column",
            "caption_column",
            "instance_prompt",
        ),
        lambda c: c.data.dataset_type != "tfrecord",
        "choose another --dataset-type than tfrecord, whose pictures and captions are encoded already",
    ),
    Switch(("bucket_count", "bucket_upscale"), lambda c: c.data.aspect_ratio_buckets, "add --aspect-ratio-buckets"),
    Switch(
        ("conditioning_image_column", "controlnet_conditioning_dropout"),
        lambda c: c.controlnet.train_controlnet,
        "add --train-controlnet",
    ),
    Switch(
        ("class_prompt", "prior_loss_weight", "num_class_images"),
        lambda c: bool(c.dreambooth.class_data_dir),
        "name a folder with --class-data-dir",
    ),
    Switch(("keep_tokens",), lambda c: c.data.caption_shuffle, "add --caption-shuffle"),
    Switch(("metrics_file", "tracker"), lambda c: c.metrics.write_metrics, "add --write-metrics"),
    Switch(
        ("gcs_metrics", "save_config_to_gcs"),
        lambda c: c.run.root.startswith("gs://"),
        "set --base-output-directory to a folder on gs://",
    ),
    Switch(
        ("guidance_scale", "guidance_rescale", "negative_prompt"),
        lambda c: c.sample.do_classifier_free_guidance,
        "add --do-classifier-free-guidance",
    ),
    Switch(("prompt", "sample_every"), lambda c: c.sample.samples_per_grid > 0, "set --samples-per-grid above 0"),
    Switch(
        (
            "guidance_scale",
            "guidance_rescale",
            "negative_prompt",
            "do_classifier_free_guidance",
            "num_inference_steps",
        ),
        lambda c: c.sample.samples_per_grid > 0 or c.sample.caption_retrieval > 0 or bool(c.dreambooth.class_data_dir),
        "set --samples-per-grid or --caption-retrieval above 0",
    ),
)


GENERATE_SWITCHES = (
    *SHARED,
    Switch(
        (
            "guidance_scale",
            "guidance_rescale",
            "guidance_interval",
            "negative_prompt",
            "negative_prompt_2",
            "negative_original_size",
            "negative_crops_coords_top_left",
            "negative_target_size",
            "negative_aesthetic_score",
        ),
        lambda c: c.picture.do_classifier_free_guidance,
        "add --do-classifier-free-guidance",
    ),
    Switch(("prompt",), lambda c: not c.picture.prompts_file, "leave --prompts-file out"),
    # What '' stands for is known when the model is loaded, and checked then.
    Switch(
        ("eta",),
        lambda c: c.diffusion_scheduler_config.class_name in ("", "DDIMScheduler"),
        "choose --diffusion-scheduler-config._class-name DDIM",
    ),
    Switch(("strength",), lambda c: bool(c.picture.image or c.picture.prompts_file), "give a picture with --image"),
    Switch(
        ("refiner_fraction", "aesthetic_score", "negative_aesthetic_score"),
        lambda c: bool(c.picture.refiner_model_name_or_path),
        "name a --refiner-model-name-or-path",
    ),
    Switch(
        (
            "controlnet_from_pt",
            "controlnet_conditioning_scale",
            "control_guidance_start",
            "control_guidance_end",
            "controlnet_canny",
        ),
        lambda c: bool(c.loaded.controlnet_model_name_or_path),
        "name a --controlnet-model-name-or-path",
    ),
    Switch(("canny_low", "canny_high"), lambda c: c.picture.controlnet_canny, "add --controlnet-canny"),
    Switch(("lightning_ckpt", "lightning_from_pt"), lambda c: bool(c.loaded.lightning_repo), "name a --lightning-repo"),
    Switch(
        ("lora_config.weight_name", "lora_config.adapter_name", "lora_config.scale", "lora_config.from_pt"),
        lambda c: bool(c.lora_config.lora_model_name_or_path),
        "name LoRAs with --lora-config.lora-model-name-or-path",
    ),
)
"""Of generation."""


def check(config: TrainConfig | GenerateConfig, file: str, values: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Check the whole config, then what has its switch off: for a flag an error, for a key of the file a log line."""
    try:
        config.check()
    except ValueError as error:
        key = str(error).split()[0].removeprefix("--").replace("-", "_")
        raise FlagError(f"{error} (from {file})" if key in values.keys() - flags.keys() else str(error)) from None
    if isinstance(config, TrainConfig):
        if {"max_train_steps", "num_train_epochs"} <= flags.keys() and config.optim.max_train_steps != -1:
            log.warning("--num-train-epochs has no effect: --max-train-steps is given too, and steps win")
        defaults, names, switches = TrainConfig(), NAMES, SWITCHES
    else:
        defaults, names, switches = GenerateConfig(), GENERATE_NAMES, GENERATE_SWITCHES
    for switch in switches:
        if switch.is_on(config):
            continue
        for key in switch.keys:
            name = names[key]
            asked = flags.get(key)
            if asked is not None and (switch.off_asks or asked is not False):
                raise FlagError(f"{name.flag} {asked!r} has no effect here: {switch.remedy}, or leave it out")
            default = getattr(getattr(defaults, name.group), name.field)
            if key not in flags and values.get(key, default) != default:
                log.warning("%s: %s: %r has no effect here: %s", file, key, values[key], switch.remedy)
