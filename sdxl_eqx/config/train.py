"""The whole config of a training run and the rules it keeps."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from sdxl_eqx.config.groups import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    LossConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
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

TINY = "configs/tiny.yaml"


@dataclass(frozen=True)
class TrainConfig:
    """Train Stable Diffusion XL."""

    run: Annotated[RunConfig, Flat] = field(default_factory=RunConfig)
    model: Annotated[ModelConfig, Flat] = field(default_factory=ModelConfig)
    attention: Annotated[AttentionConfig, Flat] = field(default_factory=AttentionConfig)
    flash_block_sizes: FlashBlockSizes = field(default_factory=FlashBlockSizes)
    optim: Annotated[OptimConfig, Flat] = field(default_factory=OptimConfig)
    loss: Annotated[LossConfig, Flat] = field(default_factory=LossConfig)
    timestep_bias: TimestepBiasConfig = field(default_factory=TimestepBiasConfig)
    diffusion_scheduler_config: DiffusionSchedulerConfig = field(default_factory=DiffusionSchedulerConfig)
    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    parallel: Annotated[ParallelConfig, Flat] = field(default_factory=ParallelConfig)
    checkpoint: Annotated[CheckpointConfig, Flat] = field(default_factory=CheckpointConfig)
    metrics: Annotated[MetricsConfig, Flat] = field(default_factory=MetricsConfig)
    sample: Annotated[SampleConfig, Flat] = field(default_factory=SampleConfig)

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
        *_loss_rules(config),
        *scheduler_rules(config.diffusion_scheduler_config),
        *_data_rules(data, needs_data=not parallel.compile_topology),
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
