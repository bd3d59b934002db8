import dataclasses
import sys
import types
from typing import Any

import numpy as np
import pytest

from sdxl_eqx.config import MetricsConfig, TrainConfig, flat
from sdxl_eqx.training.metrics import MetricsWriter
from sdxl_eqx.training.trackers import check_tracker, open_tracker

WANDB = MetricsConfig(tracker="wandb")


class Run:
    """A run of a stand-in for wandb."""

    def __init__(self):
        self.logged, self.defined, self.finished, self.fails = [], [], 0, False

    def define_metric(self, *names, **options):
        self.defined.append((names, options))

    def log(self, values):
        if self.fails:
            raise RuntimeError("the network is down")
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb, which sends nothing anywhere."""
    module = types.SimpleNamespace(begun=[], run=Run())

    def init(**options):
        module.begun.append(options)
        return module.run

    module.init, module.Image = init, lambda array: ("image", array.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def begin(tmp_path, place="gs://bucket/runs/x", config=WANDB, flags=None) -> Any:
    return open_tracker(config, folder=tmp_path, run_name="x", place=place, flags=flags or {})


def test_it_is_asked_for_by_name(tmp_path, wandb):
    assert begin(tmp_path, config=MetricsConfig()) is None
    assert begin(tmp_path, config=dataclasses.replace(WANDB, write_metrics=False)) is None
    assert not wandb.begun


def test_a_run_that_is_resumed_goes_on_there_and_another_of_its_name_does_not(tmp_path, wandb):
    for place in ("gs://bucket/runs/x", "gs://bucket/runs/x", "/elsewhere/x"):
        begin(tmp_path, place)
    first, again, other = (options["id"] for options in wandb.begun)
    assert first == again != other
    assert {(o["project"], o["name"], o["resume"], o["dir"]) for o in wandb.begun} == {
        ("sdxl_eqx", "x", "allow", str(tmp_path))
    }


def test_the_config_goes_there_without_the_token(tmp_path, wandb):
    config = TrainConfig()
    data = dataclasses.replace(config.data, hf_access_token="hf_secret", keep_tokens=2)
    begin(tmp_path, flags={**flat(dataclasses.replace(config, data=data)), "hf_access_token": "hf_secret"})
    (options,) = wandb.begun
    assert options["config"]["keep_tokens"] == 2 and options["config"]["learning_rate"] == 4e-7
    assert "hf_secret" not in repr(wandb.begun)


def test_numbers_and_pictures_reach_it_through_the_writer(tmp_path, wandb):
    tracker = begin(tmp_path)
    writer = MetricsWriter(
        WANDB, file=tmp_path / "m.jsonl", tensorboard=tmp_path / "tb", run_name="x", start=0, tracker=tracker
    )
    writer.text("config", "seed: 0")
    writer.write(3, {"learning/loss": 0.5})
    writer.picture("samples", np.zeros((8, 8, 3), np.uint8), 3)
    writer.write(2, {"learning/loss": 0.25})
    assert wandb.run.logged == [
        {"learning/loss": 0.5, "train/step": 3},
        {"samples": ("image", (8, 8, 3)), "train/step": 3},
        {"learning/loss": 0.25, "train/step": 2},
    ]
    assert (("*",), {"step_metric": "train/step"}) in wandb.run.defined
    assert not wandb.run.finished
    writer.close()
    assert wandb.run.finished == 1


def test_what_fails_there_is_said_once_and_costs_nothing_else(tmp_path, wandb, caplog):
    tracker = begin(tmp_path)
    wandb.run.fails = True
    for n in (1, 2):
        tracker.write(n, {"learning/loss": 0.5})
    wandb.run.finish = lambda: 1 / 0
    tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "--tracker wandb: RuntimeError: the network is down",
        "--tracker wandb: ZeroDivisionError: division by zero",
    ]


def test_a_login_that_fails_is_an_error_with_the_remedy(tmp_path, wandb):
    wandb.init = lambda **_: 1 / 0
    with pytest.raises(ValueError, match=r"--tracker wandb: ZeroDivisionError.*`wandb login`.*WANDB_MODE=offline"):
        begin(tmp_path)


def test_a_package_that_is_not_there_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match=r"--tracker wandb: its package is not installed.*pip install 'sdxl-eqx\[wandb\]'"
    ):
        check_tracker(WANDB)
    check_tracker(MetricsConfig())
    check_tracker(dataclasses.replace(WANDB, write_metrics=False))


def test_a_package_that_is_there_is_none(wandb):
    check_tracker(WANDB)
    assert not wandb.begun
