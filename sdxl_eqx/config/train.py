"""The whole config of a training run, the rules it keeps, and its written forms."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from sdxl_eqx.config.groups import (
    AXIS_RULES,
    MESH_AXES,
    AttentionConfig,
    Axes,
    CheckpointConfig,
    DataConfig,
    DiffusionSchedulerConfig,
    FlashBlockSizes,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SampleConfig,
)

Flat = tyro.conf.OmitArgPrefixes
"""A group whose fields are flags of their own, without the group's name before them."""

TINY = "configs/tiny.yaml"

Rule = tuple[str, str, bool]
"""A key, what must hold of its value and the remedy, whether it holds."""


@dataclass(frozen=True)
class TrainConfig:
    """Train Stable Diffusion XL."""

    run: Annotated[RunConfig, Flat] = field(default_factory=RunConfig)
    model: Annotated[ModelConfig, Flat] = field(default_factory=ModelConfig)
    attention: Annotated[AttentionConfig, Flat] = field(default_factory=AttentionConfig)
    flash_block_sizes: FlashBlockSizes = field(default_factory=FlashBlockSizes)
    optim: Annotated[OptimConfig, Flat] = field(default_factory=OptimConfig)
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
        for key, rule, holds in rules(self):
            if not holds:
                raise ValueError(f"--{key.replace('_', '-')} {_shown(self, key)!r}: {rule}")


def rules(config: TrainConfig) -> list[Rule]:
    """Every rule, in the order of the flags."""
    attention, optim, data = config.attention, config.optim, config.data
    parallel, checkpoint, metrics, sample = config.parallel, config.checkpoint, config.metrics, config.sample
    name = config.run.run_name
    return [
        ("run_name", "must be a folder name: letters, digits, '.', '_' and '-'", not name or _is_name(name)),
        ("base_output_directory", "must be a local folder", "://" not in config.run.base_output_directory),
        ("output_dir", "must be a local folder", "://" not in config.run.output_dir),
        ("seed", "must be 0 or more and below 2**32", 0 <= config.run.seed < 2**32),
        ("flash_min_seq_length", "must be 0 or more", attention.flash_min_seq_length >= 0),
        ("scan_unroll", "must be 1 or more", attention.scan_unroll >= 1),
        *(
            (f"flash_block_sizes.{name}", "must be above 0; none lets it be chosen by shape", size is None or size > 0)
            for name, size in dataclasses.asdict(config.flash_block_sizes).items()
            if name != "use_fused_bwd_kernel"
        ),
        ("learning_rate", "must be a finite number above 0", 0 < optim.learning_rate < math.inf),
        ("max_train_steps", "must be -1 (from epochs) or above 0", _whole(optim.max_train_steps)),
        ("num_train_epochs", "must be above 0", optim.num_train_epochs > 0),
        ("per_device_batch_size", "must be a finite number above 0", 0 < optim.per_device_batch_size < math.inf),
        ("warmup_steps_fraction", "must be from 0 to 1", 0 <= optim.warmup_steps_fraction <= 1),
        (
            "learning_rate_schedule_steps",
            "must be -1 (all steps) or above 0",
            _whole(optim.learning_rate_schedule_steps),
        ),
        ("adam_b1", "must be at least 0 and below 1", 0 <= optim.adam_b1 < 1),
        ("adam_b2", "must be at least 0 and below 1", 0 <= optim.adam_b2 < 1),
        ("adam_eps", "must be a finite number above 0", 0 < optim.adam_eps < math.inf),
        ("adam_weight_decay", "must be a finite number, 0 or more", 0 <= optim.adam_weight_decay < math.inf),
        ("max_grad_value", "must be a finite number above 0", 0 < optim.max_grad_value < math.inf),
        ("max_grad_norm", "must be a finite number above 0", 0 < optim.max_grad_norm < math.inf),
        ("ema_decay", "must be at least 0 and below 1", 0 <= optim.ema_decay < 1),
        ("ema_every", "must be 1 or more", optim.ema_every >= 1),
        *_data_rules(data, needs_data=not parallel.compile_topology),
        *_parallel_rules(parallel),
        ("checkpoint_every", "must be -1 (at the end) or above 0, in samples", _whole(checkpoint.checkpoint_every)),
        ("checkpoints_to_keep", "must be 1 or more", checkpoint.checkpoints_to_keep >= 1),
        ("log_period", "must be 1 or more", metrics.log_period >= 1),
        ("guidance_scale", "must be a finite number, 0 or more", 0 <= sample.guidance_scale < math.inf),
        ("num_inference_steps", "must be from 1 to 1000", 1 <= sample.num_inference_steps <= 1000),
        ("sample_every", "must be -1 (at the end) or above 0, in samples", _whole(sample.sample_every)),
        ("samples_per_grid", "must be 0 or more", sample.samples_per_grid >= 0),
        ("caption_retrieval", "must be 0 or more", sample.caption_retrieval >= 0),
    ]


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
        ("max_train_samples", "must be -1 (all) or above 0", _whole(data.max_train_samples)),
        ("transform_images_num_proc", "must be 1 or more", data.transform_images_num_proc >= 1),
        ("caption_dropout", "must be from 0 to 1", 0 <= data.caption_dropout <= 1),
        ("keep_tokens", "must be 0 or more", data.keep_tokens >= 0),
        ("caption_chunks", "must be 1 or more", data.caption_chunks >= 1),
        ("max_bad_fraction", "must be from 0 to 1", 0 <= data.max_bad_fraction <= 1),
    ]


def _parallel_rules(parallel: ParallelConfig) -> list[Rule]:
    def known(some: Axes) -> bool:
        return set(some) <= set(parallel.mesh_axes) and len(some) == len(set(some))

    axes = ", ".join(MESH_AXES)
    found = [("mesh_axes", f"must be {axes}, in any order", sorted(parallel.mesh_axes) == sorted(MESH_AXES))]
    for kind in ("dcn", "ici"):
        sizes = {f"{kind}_{axis}_parallelism": getattr(parallel, f"{kind}_{axis}_parallelism") for axis in MESH_AXES}
        rule = f"must be -1 (the rest) or above 0, and only one of --{kind}-* -1 (by default --{kind}-data-parallelism)"
        rest = [key for key, n in sizes.items() if n == -1]
        found += [(key, rule, _whole(n) and key not in rest[1:]) for key, n in sizes.items()]
    names = dict(AXIS_RULES)
    return [
        *found,
        (
            "logical_axis_rules",
            f"names must be of {', '.join(names)}, and axes of {axes}, none twice for a name",
            all(name in names and known(some) for name, some in parallel.logical_axis_rules),
        ),
        (
            "data_sharding",
            f"must be one or more of {axes}, none twice",
            bool(parallel.data_sharding) and known(parallel.data_sharding),
        ),
        (
            "compile_topology_num_slices",
            "must be -1 (one) or above 0",
            _whole(parallel.compile_topology_num_slices),
        ),
    ]


def _whole(n: int) -> bool:
    return n == -1 or n > 0


def _is_name(name: str) -> bool:
    return name == Path(name).name and name not in (".", "..") and all(c.isalnum() or c in "._-" for c in name)


def _shown(config: TrainConfig, key: str) -> Any:
    """The value of a key as an error shows it; of logical_axis_rules, those that are not the default."""
    values: Any = flat(config)
    for part in key.split("."):
        values = values[part]
    return [rule for rule in values if rule not in plain(AXIS_RULES)] if key == "logical_axis_rules" else values


def groups(config: Any) -> dict[str, Any]:
    """The groups of a config by field name."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def is_flat(group: str) -> bool:
    """Whether the fields of a group are flags of their own (the others keep the group's name before them)."""
    return group not in ("flash_block_sizes", "diffusion_scheduler_config")


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every published name with its value; mappings stay dictionaries. The form of `--config` files.

    The Hub token is left out: it is never saved.
    """
    values: dict[str, Any] = {}
    for name, group in groups(config).items():
        fields = {field: plain(value) for field, value in dataclasses.asdict(group).items()}
        values.update(fields if is_flat(name) else {name: fields})
    del values["hf_access_token"]
    return values


def plain(value: Any) -> Any:
    """A value with lists for its tuples, as JSON and YAML have them."""
    return [plain(part) for part in value] if isinstance(value, tuple) else value


def to_yaml(config: TrainConfig) -> str:
    """The resolved config as a file that `--config` reads back."""
    values = flat(config)
    printable = all(value.isprintable() for value in values.values() if isinstance(value, str))
    return yaml.safe_dump(
        values, sort_keys=False, allow_unicode=printable, default_flow_style=None
    )  # unescaped, a control character may read as a space
