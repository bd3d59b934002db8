"""The whole config of a training run and the rules it keeps."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sdxl_eqx.config.groups import (
    AttentionConfig,
    CheckpointConfig,
    ControlNetTrainingConfig,
    DataConfig,
    DreamBoothConfig,
    LossConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantizationConfig,
    RunConfig,
    SampleConfig,
    TimestepBiasConfig,
)
from sdxl_eqx.config.rules import (
    Flat,
    Rule,
    attention_rules,
    check,
    is_whole,
    known,
    mesh_rules,
    prompt_rules,
    scheduler_rules,
)
from sdxl_eqx.config.shared import MESH_AXES, DiffusionSchedulerConfig, FlashBlockSizes
from sdxl_eqx.config.trained import LoraTrainingConfig, TextEncoderConfig

TINY = "configs/tiny.yaml"


@dataclass(frozen=True)
class TrainConfig:
    """Train Stable Diffusion XL."""

    run: Annotated[RunConfig, Flat] = field(default_factory=RunConfig)
    model: Annotated[ModelConfig, Flat] = field(default_factory=ModelConfig)
    attention: Annotated[AttentionConfig, Flat] = field(default_factory=AttentionConfig)
    flash_block_sizes: FlashBlockSizes = field(default_factory=FlashBlockSizes)
    quantization: Annotated[QuantizationConfig, Flat] = field(default_factory=QuantizationConfig)
    text: Annotated[TextEncoderConfig, Flat] = field(default_factory=TextEncoderConfig)
    lora: Annotated[LoraTrainingConfig, Flat] = field(default_factory=LoraTrainingConfig)
    optim: Annotated[OptimConfig, Flat] = field(default_factory=OptimConfig)
    loss: Annotated[LossConfig, Flat] = field(default_factory=LossConfig)
    timestep_bias: TimestepBiasConfig = field(default_factory=TimestepBiasConfig)
    diffusion_scheduler_config: DiffusionSchedulerConfig = field(default_factory=DiffusionSchedulerConfig)
    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    controlnet: Annotated[ControlNetTrainingConfig, Flat] = field(default_factory=ControlNetTrainingConfig)
    dreambooth: Annotated[DreamBoothConfig, Flat] = field(default_factory=DreamBoothConfig)
    parallel: Annotated[ParallelConfig, Flat] = field(default_factory=ParallelConfig)
    checkpoint: Annotated[CheckpointConfig, Flat] = field(default_factory=CheckpointConfig)
    metrics: Annotated[MetricsConfig, Flat] = field(default_factory=MetricsConfig)
    sample: Annotated[SampleConfig, Flat] = field(default_factory=SampleConfig)

    @property
    def trains(self) -> Literal["unet", "lora", "controlnet"]:
        """What trains; text encoders may, beside the UNet or by LoRA as it does."""
        if self.controlnet.train_controlnet:
            return "controlnet"
        return "lora" if self.lora.lora_rank > 0 else "unet"

    @property
    def is_text_cached(self) -> bool:
        """Whether text embeddings are kept beside the latents: not where captions change from visit to visit."""
        changes = self.data.caption_shuffle or self.text.train_text_encoder
        return self.data.cache_latents_text_encoder_outputs and not changes

    def check(self) -> None:
        """Check everything that needs neither file nor device.

        Raises:
            ValueError: with the flag, its value, the rule and what to do.
        """
        check(self, rules(self))


def rules(config: TrainConfig) -> list[Rule]:
    """Every rule, in the order of the flags."""
    attention, optim, data = config.attention, config.optim, config.data
    parallel, checkpoint, metrics, sample = config.parallel, config.checkpoint, config.metrics, config.sample
    name = config.run.run_name
    return [
        ("run_name", "must be a folder name: letters, digits, '.', '_' and '-'", not name or _is_name(name)),
        (
            "base_output_directory",
            "must be a local folder, or gs://BUCKET/...",
            _is_place(config.run.base_output_directory),
        ),
        ("output_dir", "must be a local folder, or gs://BUCKET/...", _is_place(config.run.output_dir)),
        ("seed", "must be 0 or more and below 2**32", 0 <= config.run.seed < 2**32),
        ("scan_unroll", "must be 1 or more", attention.scan_unroll >= 1),
        *attention_rules(attention, config.flash_block_sizes),
        (
            "quantization_local_shard_count",
            "must be -1 (one for each slice of the devices), 0 (do not round for the gradients of weights) or more",
            config.quantization.quantization_local_shard_count >= -1,
        ),
        ("learning_rate", "must be a finite number above 0", 0 < optim.learning_rate < math.inf),
        (
            "learning_rate",
            "with --optimizer prodigy it is a factor of the rate that prodigy finds; give 1",
            optim.optimizer != "prodigy" or optim.learning_rate >= 0.01,
        ),
        ("max_train_steps", "must be -1 (from epochs) or above 0", is_whole(optim.max_train_steps)),
        ("num_train_epochs", "must be above 0", optim.num_train_epochs > 0),
        ("per_device_batch_size", "must be a finite number above 0", 0 < optim.per_device_batch_size < math.inf),
        ("warmup_steps_fraction", "must be from 0 to 1", 0 <= optim.warmup_steps_fraction <= 1),
        (
            "learning_rate_schedule_steps",
            "must be -1 (all steps) or above 0",
            is_whole(optim.learning_rate_schedule_steps),
        ),
        ("adam_b1", "must be at least 0 and below 1", 0 <= optim.adam_b1 < 1),
        ("adam_b2", "must be at least 0 and below 1", 0 <= optim.adam_b2 < 1),
        ("adam_eps", "must be a finite number above 0", 0 < optim.adam_eps < math.inf),
        ("adam_weight_decay", "must be a finite number, 0 or more", 0 <= optim.adam_weight_decay < math.inf),
        ("max_grad_value", "must be a finite number above 0", 0 < optim.max_grad_value < math.inf),
        ("max_grad_norm", "must be a finite number above 0", 0 < optim.max_grad_norm < math.inf),
        ("ema_decay", "must be at least 0 and below 1", 0 <= optim.ema_decay < 1),
        ("ema_every", "must be 1 or more", optim.ema_every >= 1),
        ("max_nonfinite_steps", "must be 0 or more", optim.max_nonfinite_steps >= 0),
        ("gradient_accumulation_steps", "must be 1 or more", optim.gradient_accumulation_steps >= 1),
        ("lr_num_cycles", "must be 1 or more", optim.lr_num_cycles >= 1),
        (
            "lr_step_rules",
            "must be FACTOR:UPDATE,...,FACTOR with updates that grow, as 1:1000,0.1:2000,0.01, where --lr-schedule is "
            "piecewise",
            optim.lr_schedule != "piecewise" or step_rules(optim.lr_step_rules) is not None,
        ),
        *_lora_rules(config),
        *_loss_rules(config),
        *scheduler_rules(config.diffusion_scheduler_config),
        *_data_rules(data, needs_data=not parallel.compile_topology),
        *_controlnet_rules(config),
        *_dreambooth_rules(config),
        *mesh_rules(parallel),
        (
            "data_sharding",
            f"must be one or more of {', '.join(MESH_AXES)}, none twice",
            bool(parallel.data_sharding) and known(parallel.data_sharding, parallel),
        ),
        (
            "compile_topology_num_slices",
            "must be -1 (one) or above 0",
            is_whole(parallel.compile_topology_num_slices),
        ),
        ("checkpoint_every", "must be -1 (at the end) or above 0, in samples", is_whole(checkpoint.checkpoint_every)),
        ("checkpoints_to_keep", "must be 1 or more", checkpoint.checkpoints_to_keep >= 1),
        ("norm_num_groups", "must be -1 (the model's) or above 0", is_whole(config.model.norm_num_groups)),
        ("log_period", "must be 1 or more", metrics.log_period >= 1),
        ("skip_first_n_steps_for_profiler", "must be 0 or more", metrics.skip_first_n_steps_for_profiler >= 0),
        ("profiler_steps", "must be 1 or more", metrics.profiler_steps >= 1),
        *prompt_rules(sample),
        ("sample_every", "must be -1 (at the end) or above 0, in samples", is_whole(sample.sample_every)),
        ("eval_every", "must be -1 (at the end) or above 0, in samples", is_whole(sample.eval_every)),
        (
            "eval_split",
            "must be a fraction above 0 and below 1, or the name of a split with --dataset-name",
            not sample.eval_split or _is_held(sample.eval_split, config.data),
        ),
        ("samples_per_grid", "must be 0 or more", sample.samples_per_grid >= 0),
        ("caption_retrieval", "must be 0 or more", sample.caption_retrieval >= 0),
    ]


def _lora_rules(config: TrainConfig) -> list[Rule]:
    lora, text = config.lora, config.text
    is_one = not config.controlnet.train_controlnet
    return [
        ("lora_rank", "must be 0 (the whole UNet trains) or more", lora.lora_rank >= 0),
        ("lora_rank", "a LoRA and a ControlNet do not train together; leave one out", lora.lora_rank <= 0 or is_one),
        ("lora_rank", "a LoRA is of a model that is there; leave --train-new-unet out",
         lora.lora_rank <= 0 or not config.model.train_new_unet),
        ("lora_alpha", "must be 0 (the rank) or a finite number above", 0 <= lora.lora_alpha < math.inf),
        ("lora_targets", "must name at least one kind of layer", bool(lora.lora_targets)),
        ("lora_dropout", "must be at least 0 and below 1", 0 <= lora.lora_dropout < 1),
        ("int8_base", "its weights are not rounded once more; leave out --quantization",
         not lora.int8_base or not config.quantization.how),
        ("train_text_encoder", "the text encoders do not train beside a ControlNet; leave one out",
         not text.train_text_encoder or is_one),
        ("train_text_encoder", "TFRecords hold text that is encoded already; choose another --dataset-type",
         not text.train_text_encoder or config.data.dataset_type != "tfrecord"),
        ("text_encoder_learning_rate", "must be a finite number above 0",
         0 < text.text_encoder_learning_rate < math.inf),
    ]  # fmt: skip


def _loss_rules(config: TrainConfig) -> list[Rule]:
    loss, bias = config.loss, config.timestep_bias
    return [
        ("snr_gamma", "must be -1 (off) or a finite number above 0",
         loss.snr_gamma == -1 or 0 < loss.snr_gamma < math.inf),
        ("huber_c", "must be above 0 and at most 1", 0 < loss.huber_c <= 1),
        ("noise_offset", "must be a finite number, 0 or more", 0 <= loss.noise_offset < math.inf),
        ("input_perturbation", "must be a finite number, 0 or more", 0 <= loss.input_perturbation < math.inf),
        ("timestep_bias.multiplier", "must be a finite number above 0", 0 < bias.multiplier < math.inf),
        ("timestep_bias.begin", "must be 0 or more and below timestep_bias.end", 0 <= bias.begin < bias.end),
        ("timestep_bias.end", "must be at most 1000", bias.end <= 1000),
        ("timestep_bias.portion", "must be above 0 and at most 1", 0 < bias.portion <= 1),
    ]  # fmt: skip


def step_rules(text: str) -> list[tuple[float, int]] | None:
    """Pairs of factor and the update up to which it holds (-1: for ever) of diffusers' step rules; None if wrong."""
    pairs = [part.partition(":")[::2] for part in text.split(",")]
    try:
        found = [(float(factor), int(until)) for factor, until in pairs[:-1]] + [(float(pairs[-1][0]), -1)]
    except ValueError:
        return None
    updates = [until for _, until in found[:-1]]
    is_right = pairs[-1][1] == "" and updates == sorted(set(updates)) and all(until > 0 for until in updates)
    return found if is_right and all(0 <= factor < math.inf for factor, _ in found) else None


def _data_rules(data: DataConfig, *, needs_data: bool) -> list[Rule]:
    is_synthetic, side = data.dataset_type == "synthetic", 64 if data.aspect_ratio_buckets else 8
    return [
        (
            "dataset_name",
            "must stand without --train-data-dir, and with --dataset-type auto or hf",
            not data.dataset_name or (not data.train_data_dir and data.dataset_type in ("auto", "hf")),
        ),
        (
            "train_data_dir",
            "name a folder of pictures, or a data set of the Hub with --dataset-name; "
            f"or try the bundled one first: python scripts/train.py --config {TINY}",
            bool(data.train_data_dir or data.dataset_name or is_synthetic or not needs_data),
        ),
        (
            "resolution",
            "must be a multiple of 8, at least 8; with --aspect-ratio-buckets of 64, at least 64",
            data.resolution >= side and data.resolution % side == 0,
        ),
        ("bucket_count", "must be 1 or more", data.bucket_count >= 1),
        ("max_train_samples", "must be -1 (all) or above 0", is_whole(data.max_train_samples)),
        ("transform_images_num_proc", "must be 1 or more", data.transform_images_num_proc >= 1),
        ("caption_dropout", "must be from 0 to 1", 0 <= data.caption_dropout <= 1),
        ("keep_tokens", "must be 0 or more", data.keep_tokens >= 0),
        ("caption_chunks", "must be 1 or more", data.caption_chunks >= 1),
        ("max_bad_fraction", "must be from 0 to 1", 0 <= data.max_bad_fraction <= 1),
    ]


def _controlnet_rules(config: TrainConfig) -> list[Rule]:
    net = config.controlnet
    return [
        (
            "train_controlnet",
            "TFRecords of latents hold nothing for it to see; choose another --dataset-type than tfrecord",
            not net.train_controlnet or config.data.dataset_type != "tfrecord",
        ),
        ("controlnet_conditioning_dropout", "must be from 0 to 1", 0 <= net.controlnet_conditioning_dropout <= 1),
    ]


def _dreambooth_rules(config: TrainConfig) -> list[Rule]:
    subject, data = config.dreambooth, config.data
    return [
        (
            "class_data_dir",
            "TFRecords of latents are encoded already; choose another --dataset-type than tfrecord",
            not subject.class_data_dir or data.dataset_type != "tfrecord",
        ),
        (
            "class_data_dir",
            "its pictures have nothing for a ControlNet to see; leave it or --train-controlnet out",
            not subject.class_data_dir or not config.controlnet.train_controlnet,
        ),
        (
            "class_prompt",
            "say what the pictures of --class-data-dir show, such as 'a photo of a dog'",
            bool(subject.class_prompt.strip()) or not subject.class_data_dir,
        ),
        ("prior_loss_weight", "must be a finite number, 0 or more", 0 <= subject.prior_loss_weight < math.inf),
        ("num_class_images", "must be 1 or more", subject.num_class_images >= 1),
    ]


def _is_held(split: str, data: DataConfig) -> bool:
    try:
        return 0 < float(split) < 1
    except ValueError:
        return bool(data.dataset_name) or data.dataset_type == "hf"


def _is_place(place: str) -> bool:
    protocol, mark, rest = place.partition("://")
    return not mark or (protocol == "gs" and rest.partition("/")[0] != "")


def _is_name(name: str) -> bool:
    return name == Path(name).name and name not in (".", "..") and all(c.isalnum() or c in "._-" for c in name)
