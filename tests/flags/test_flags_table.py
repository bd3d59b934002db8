"""The table of flags: every name is a flag and a key, and what it changes is seen where that is used."""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flag_rows_data
import flag_rows_run
import flag_rows_trained
import flag_rows_training
import pytest
import yaml
from flag_row import OTHER, Rows, entries, written

from sdxl_eqx.config import TrainConfig, flag
from sdxl_eqx.flags import NAMES, FlagError, merge, parse, read
from sdxl_eqx.flags.names import read_as
from sdxl_eqx.flags.published import PUBLISHED
from sdxl_eqx.flags.switches import check

ROWS: Rows = {**flag_rows_training.ROWS, **flag_rows_trained.ROWS, **flag_rows_data.ROWS, **flag_rows_run.ROWS}

DATA = {"train_data_dir": "asset:emoji"}

SAID: Mapping[str, tuple[Any, Any, str]] = {
    "jit_initializers": (False, {}, "mapped to True, which always holds"),
    "tokenize_captions_num_proc": (8, {"transform_images_num_proc": 8}, "mapped to transform_images_num_proc"),
    **{
        key: (value, {}, "services of Google Cloud")
        for key, value in (
            ("enable_mllog", True), ("enable_ml_diagnostics", True), ("profiler_gcs_path", "gs://a/b"),
            ("enable_ondemand_xprof", True),
        )
    },
    **{
        key: (value, {}, "of scripts/generate.py")
        for key, value in (
            ("lightning_repo", "a/b"), ("lightning_ckpt", "c.safetensors"), ("lightning_from_pt", False),
            ("controlnet_model_name_or_path", "a/b"), ("controlnet_from_pt", False),
            ("controlnet_conditioning_scale", 0.7), ("controlnet_image", "a.png"),
            ("lora_config.lora_model_name_or_path", ["a"]), ("lora_config.weight_name", ["b"]),
            ("lora_config.adapter_name", ["c"]), ("lora_config.scale", [0.7]), ("lora_config.from_pt", [True]),
        )
    },
}  # fmt: skip
"""Published names without a flag of their own: a value that asks, what it changes, and what is said of it."""


def with_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """These values, and a data set where they name none."""
    has = "dataset_name" in values or values.get("dataset_type") == "synthetic"
    return {**({} if has else DATA), **values}


def of_file(values: Mapping[str, Any], path: Path) -> TrainConfig:
    """The checked config of a file of these values."""
    path.write_text(yaml.safe_dump(entries(with_data(values))), encoding="utf-8")
    config = merge(TrainConfig(), read(path))
    config.check()
    return config


@functools.cache
def observed(observe: Callable[[TrainConfig], Any], config: TrainConfig) -> Any:
    """What many rows have in common is looked at once."""
    return observe(config)


def test_every_name_has_a_row():
    assert sorted(ROWS.keys() ^ NAMES.keys()) == []
    assert sorted(SAID.keys() ^ PUBLISHED.keys()) == []


@pytest.mark.parametrize("key", ROWS)
def test_a_key_changes_what_it_should(key: str, tmp_path: Path):
    row = ROWS[key]
    before = of_file(row.beside, tmp_path / "before.yaml")
    after = of_file({**row.beside, **row.along, key: row.value}, tmp_path / "after.yaml")
    assert observed(row.observe, after) == row.now
    was = observed(row.observe, before)
    assert was != row.now
    assert row.was is OTHER or was == row.was


def lines() -> list[dict[str, Any]]:
    """The values of all rows on as few command lines as may be: on each, those that go together."""
    found: list[dict[str, Any]] = []
    for key, row in ROWS.items():
        wanted = {**row.beside, **row.along, key: row.value}
        for line in found:
            if all(line.get(name, value) == value for name, value in wanted.items()) and _go_together(line | wanted):
                line.update(wanted)
                break
        else:
            found.append(wanted)
    return found


def _go_together(values: Mapping[str, Any]) -> bool:
    """Whether a command line may have all of them."""
    flags = {key: read_as(NAMES[key], written(value)) for key, value in with_data(values).items()}
    try:
        check(merge(TrainConfig(), flags), "", {}, flags)
    except FlagError:
        return False
    return True


def test_as_flags_all_names_change_the_config_as_in_a_file(tmp_path: Path):
    found = lines()
    assert {key for line in found for key in line} >= ROWS.keys()
    for values in found:
        flags = [f"{flag(key)}={written(value)}" for key, value in with_data(values).items()]
        assert parse(flags) == of_file(values, tmp_path / "file.yaml")


@pytest.mark.parametrize("key", SAID)
def test_a_published_name_without_a_flag_is_said(key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "sdxl_eqx")
    value, changes, said = SAID[key]
    assert of_file({key: value}, tmp_path / "run.yaml") == merge(TrainConfig(), {**DATA, **changes})
    (message,) = caplog.messages
    assert key.partition(".")[0] in message and said in message
