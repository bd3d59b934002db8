"""Published names and values that are no flags here: what each is mapped to, or why it has no meaning."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from sdxl_eqx.config import LoadedConfig, LoraConfig, flag
from sdxl_eqx.flags.names import FlagError, Name

log = logging.getLogger("sdxl_eqx")


@dataclass(frozen=True)
class Published:
    """A name that a training file or command line may give although it is no flag of training.

    mapped: something else says it. ignored: it has no meaning here. drawing: scripts/generate.py has it.
    """

    name: Name
    fate: Literal["mapped", "ignored", "drawing"]
    idle: tuple[Any, ...]
    """The values that ask for nothing: its default, and what says the same."""
    why: str
    """To what it is mapped; or the reason."""
    to: str = ""
    """The flag that takes its value where it is not given itself."""


@dataclass(frozen=True)
class Value:
    """What stands for a published value of a flag that is here."""

    now: str
    why: str
    as_flag: bool = True
    """Whether it stands for it on the command line too."""


def _flat(fate: Any, why: str, to: str = "", **types: tuple[Any, Any]) -> dict[str, Published]:
    """Names of one fate, each with its type and the value that asks for nothing."""
    return {key: Published(Name("published", key, t), fate, (idle,), why, to) for key, (t, idle) in types.items()}


def _drawing(group: str, config: Any) -> dict[str, Published]:
    names = [Name(group, field, type_) for field, type_ in get_type_hints(config).items()]
    return {name.key: Published(name, "drawing", (), "of scripts/generate.py") for name in names}


PUBLISHED: Mapping[str, Published] = {
    **_flat(
        "mapped", "True, which always holds: weights are made by compiled code, on their devices",
        jit_initializers=(bool, True),
    ),
    **_flat(
        "mapped", "transform_images_num_proc, whose threads do all that is done to a sample",
        to="transform_images_num_proc", tokenize_captions_num_proc=(int, 4),
    ),
    **_flat(
        "ignored", "services of Google Cloud, to which nothing here reports",
        enable_mllog=(bool, False), enable_ml_diagnostics=(bool, False), profiler_gcs_path=(str, ""),
        enable_ondemand_xprof=(bool, False),
    ),
    **_drawing("published", LoadedConfig),
    **_drawing("lora_config", LoraConfig),
}  # fmt: skip
"""Every such name by its key."""

VALUES: Mapping[tuple[str, str], Value] = {
    ("hardware", "tpu"): Value("auto", "takes a TPU where there is one", as_flag=False),
    ("hardware", "gpu"): Value("auto", "takes a GPU where there is one", as_flag=False),
    ("norm_num_groups", "32"): Value("-1", "takes what the model's unet/config.json says", as_flag=False),
    ("revision", "refs/pr/95"): Value("main", "has safetensors; refs/pr/95 is the branch of SDXL base for Flax"),
    ("dataset_type", "tf"): Value("auto", "takes a data set of the Hub, or what lies in train_data_dir"),
    ("dataset_type", "grain"): Value("arrayrecord", "is what MaxDiffusion reads with grain"),
}
"""What stands for each published value, by key and text."""

OF_THE_HUB = ("auto", "hf")
"""The types of data set that dataset_name goes with."""


def today(key: str, text: str, file: str = "") -> str:
    """The text itself, or what stands for it where it is a published value, with a log line; no file is a flag."""
    value = VALUES.get((key, text))
    if value is None or not (file or value.as_flag):
        return text
    log.info("%s %s: mapped to %s, which %s", f"{file}: {key}" if file else flag(key), text, value.now, value.why)
    return value.now


def settle_file(file: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file without those of published names: mapped, or listed in one log line with the reasons."""
    settled = {key: value for key, value in values.items() if key not in PUBLISHED}
    listed: dict[str, dict[str, None]] = {}
    for key in (key for key in values if key in PUBLISHED):
        published, value = PUBLISHED[key], values[key]
        match published.fate:
            case "mapped":
                settled |= _mapped(f"{file}: {key} {value}", published, value, settled)
            case "ignored" | "drawing":
                listed.setdefault(published.why, {})[key.partition(".")[0]] = None
    if listed:
        log.info("%s: ignored: %s", file, "; ".join(f"{', '.join(keys)} ({why})" for why, keys in listed.items()))
    return settled


def settle_flags(flags: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The values of flags that flags of published names are mapped to, each with a log line; `given` are the others.

    Raises:
        FlagError: one asks for what cannot be had.
    """
    settled: dict[str, Any] = {}
    for key, value in flags.items():
        published, shown = PUBLISHED[key], f"{flag(key)} {value}"
        asks = value not in published.idle
        match published.fate:
            case "drawing":
                raise FlagError(f"{flag(key)} is {published.why}; leave it out of training")
            case "ignored" if asks:
                raise FlagError(f"{shown} cannot be had: {published.why}; leave it out")
            case "mapped" if asks and not published.to:
                raise FlagError(f"{shown} cannot be had: it is mapped to {published.why}; leave it out")
            case "mapped":
                settled |= _mapped(shown, published, value, given)
            case "ignored":
                log.info("%s: ignored: %s", shown, published.why)
    return settled


def settle_data(file: str, values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file without the data set that a flag, or the type of data set, puts another in the place of.

    MaxDiffusion's files keep a dataset_name beside the folders that other types are read from.
    """
    kind = flags.get("dataset_type") or values.get("dataset_type") or "auto"
    instead = {
        "dataset_name": "--train-data-dir is given" if flags.get("train_data_dir") else
        f"dataset_type is {kind}" if kind not in OF_THE_HUB else "",
        "train_data_dir": "--dataset-name is given" if flags.get("dataset_name") else "",
    }  # fmt: skip
    dropped = {key: why for key, why in instead.items() if why and values.get(key) and key not in flags}
    for key, why in dropped.items():
        log.warning("%s: %s: %r has no effect here: %s", file, key, values[key], why)
    return {key: value for key, value in values.items() if key not in dropped}


def _mapped(shown: str, published: Published, value: Any, given: Collection[str]) -> dict[str, Any]:
    """Say to what a name is mapped; the flag with the value that it gives, unless that flag is given too."""
    counts = published.to in given
    log.info("%s: mapped to %s%s", shown, published.why, "; that is given too, and counts" if counts else "")
    return {published.to: value} if published.to and not counts else {}
