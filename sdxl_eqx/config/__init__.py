"""What a script is asked for: frozen dataclasses, and the check of the whole. No file, no device is touched."""

from sdxl_eqx.config.generate import GenerateConfig, GenerateModelConfig, OutputConfig, PictureConfig
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
from sdxl_eqx.config.report import ReportConfig
from sdxl_eqx.config.rules import flag, flat, groups, is_flat, to_yaml
from sdxl_eqx.config.shared import (
    AttentionKernelConfig,
    DiffusionSchedulerConfig,
    FlashBlockSizes,
    LoadedConfig,
    LoraConfig,
    MachineConfig,
    MeshConfig,
    ModelSourceConfig,
    PromptConfig,
)
from sdxl_eqx.config.train import TINY, TrainConfig, step_rules

__all__ = [
    "TINY",
    "AttentionConfig",
    "AttentionKernelConfig",
    "CheckpointConfig",
    "DataConfig",
    "DiffusionSchedulerConfig",
    "FlashBlockSizes",
    "GenerateConfig",
    "GenerateModelConfig",
    "LoadedConfig",
    "LoraConfig",
    "LossConfig",
    "MachineConfig",
    "MeshConfig",
    "MetricsConfig",
    "ModelConfig",
    "ModelSourceConfig",
    "OptimConfig",
    "OutputConfig",
    "ParallelConfig",
    "PictureConfig",
    "PromptConfig",
    "ReportConfig",
    "RunConfig",
    "SampleConfig",
    "TimestepBiasConfig",
    "TrainConfig",
    "flag",
    "flat",
    "groups",
    "is_flat",
    "step_rules",
    "to_yaml",
]
