"""The rules that values keep, whichever script's they are, and the written forms of a config."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tyro
import yaml

from sdxl_eqx.config.shared import (
    AXIS_RULES,
    MESH_AXES,
    SCHEDULERS,
    AttentionKernelConfig,
    Axes,
    DiffusionSchedulerConfig,
    FlashBlockSizes,
    LoraConfig,
    MeshConfig,
    PromptConfig,
)

Flat = tyro.conf.OmitArgPrefixes
"""A group whose fields are flags of their own, without the group's name before them."""

NESTED = ("flash_block_sizes", "diffusion_scheduler_config", "timestep_bias", "lora_config")
"""Groups whose name stands before their fields."""

Rule = tuple[str, str, bool]
"""A key, what must hold of its value and the remedy, whether it holds."""


def check(config: Any, rules: Sequence[Rule]) -> None:
    """Check that every rule holds.

    Raises:
        ValueError: with the flag, its value, the rule and what to do.
    """
    for key, rule, holds in rules:
        if not holds:
            raise ValueError(f"{flag(key)} {_shown(config, key)!r}: {rule}")


def flag(key: str) -> str:
    """A key as it is written on the command line."""
    return "--" + ".".join(part[:1] + part[1:].replace("_", "-") for part in key.split("."))


def is_whole(n: int) -> bool:
    """Whether a number is above 0, or the -1 that leaves it to us."""
    return n == -1 or n > 0


def attention_rules(attention: AttentionKernelConfig, blocks: FlashBlockSizes) -> list[Rule]:
    """Those of what computes attention."""
    return [
        ("flash_min_seq_length", "must be 0 or more", attention.flash_min_seq_length >= 0),
        *(
            (f"flash_block_sizes.{name}", "must be above 0; none lets it be chosen by shape", size is None or size > 0)
            for name, size in dataclasses.asdict(blocks).items()
            if name != "use_fused_bwd_kernel"
        ),
    ]


def scheduler_rules(scheduler: DiffusionSchedulerConfig) -> list[Rule]:
    """Those of the sampler."""
    rule = f"must be one of {', '.join(name.removesuffix('Scheduler') for name in SCHEDULERS)}, or '' for the model's"
    name = scheduler.class_name
    return [
        ("diffusion_scheduler_config._class_name", rule, name is not None),
        (
            "diffusion_scheduler_config.algorithm_type",
            "is of DPMSolverMultistep; add --diffusion-scheduler-config._class-name DPMSolverMultistep",
            not scheduler.algorithm_type or name in ("", "DPMSolverMultistepScheduler"),
        ),
    ]


def prompt_rules(prompt: PromptConfig) -> list[Rule]:
    """Those of what is drawn."""
    return [
        ("guidance_scale", "must be a finite number, 0 or more", 0 <= prompt.guidance_scale < math.inf),
        ("guidance_rescale", "must be from 0 to 1", 0 <= prompt.guidance_rescale <= 1),
        ("num_inference_steps", "must be from 1 to 1000", 1 <= prompt.num_inference_steps <= 1000),
    ]


def lora_rules(lora: LoraConfig) -> list[Rule]:
    """Those of lists that belong together."""
    names = lora.lora_model_name_or_path or ()
    rule = f"must be one for all, or one for each of the {len(names)} of --lora-config.lora-model-name-or-path"
    lists = {field.name: getattr(lora, field.name) for field in dataclasses.fields(lora)[1:]}
    rules = [
        (f"lora_config.{key}", rule, value is None or len(value) in (1, len(names))) for key, value in lists.items()
    ]
    finite = lora.scale is None or all(math.isfinite(scale) for scale in lora.scale)
    return [*rules, ("lora_config.scale", "must be finite numbers", finite)]


def mesh_rules(mesh: MeshConfig) -> list[Rule]:
    """Those of the devices' mesh."""
    axes = ", ".join(MESH_AXES)
    found = [("mesh_axes", f"must be {axes}, in any order", sorted(mesh.mesh_axes) == sorted(MESH_AXES))]
    for kind in ("dcn", "ici"):
        sizes = {f"{kind}_{axis}_parallelism": getattr(mesh, f"{kind}_{axis}_parallelism") for axis in MESH_AXES}
        rule = f"must be -1 (the rest) or above 0, and only one of --{kind}-* -1 (by default --{kind}-data-parallelism)"
        rest = [key for key, n in sizes.items() if n == -1]
        found += [(key, rule, is_whole(n) and key not in rest[1:]) for key, n in sizes.items()]
    names = dict(AXIS_RULES)
    return [
        *found,
        (
            "logical_axis_rules",
            f"names must be of {', '.join(names)}, and axes of {axes}, none twice for a name",
            all(name in names and known(some, mesh) for name, some in mesh.logical_axis_rules),
        ),
    ]


def known(some: Axes, mesh: MeshConfig) -> bool:
    """Whether these are axes of the mesh, each once."""
    return set(some) <= set(mesh.mesh_axes) and len(some) == len(set(some))


def groups(config: Any) -> dict[str, Any]:
    """The groups of a config by field name."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def is_flat(group: str) -> bool:
    """Whether the fields of a group are flags of their own (the others keep the group's name before them)."""
    return group not in NESTED


def flat(config: Any) -> dict[str, Any]:
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


def to_yaml(config: Any) -> str:
    """The resolved config as a file that `--config` reads back."""
    values = flat(config)
    printable = all(value.isprintable() for value in values.values() if isinstance(value, str))
    return yaml.safe_dump(
        values, sort_keys=False, allow_unicode=printable, default_flow_style=None
    )  # unescaped, a control character may read as a space


def _shown(config: Any, key: str) -> Any:
    """The value of a key as an error shows it; of logical_axis_rules, those that are not the default."""
    values: Any = flat(config)
    for part in key.split("."):
        values = values[part]
    return [rule for rule in values if rule not in plain(AXIS_RULES)] if key == "logical_axis_rules" else values
