"""What a training run is: frozen dataclasses, one a room, and the check of the whole. No file, no device is touched."""

from sdxl_eqx.config.groups import (
    AttentionConfig,
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
from sdxl_eqx.config.report import ReportConfig
from sdxl_eqx.config.train import TINY, TrainConfig, flat, groups, is_flat, to_yaml

__all__ = [
    "TINY",
    "AttentionConfig",
    "CheckpointConfig",
    "DataConfig",
    "DiffusionSchedulerConfig",
    "FlashBlockSizes",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ReportConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "flat",
    "groups",
    "is_flat",
    "to_yaml",
]
