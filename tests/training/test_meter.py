"""What is said of each step: speed as a share of the chip's, and memory, where the device tells."""

import dataclasses
import importlib.util
import json
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_eqx.config import MetricsConfig, TrainConfig
from sdxl_eqx.parallel import topologies
from sdxl_eqx.parallel.topologies import CHIPS
from sdxl_eqx.training import meter
from sdxl_eqx.training.feed import Feed
from sdxl_eqx.training.meter import KINDS, Meter, memory_used, peak_tflops
from sdxl_eqx.training.metrics import MetricsWriter, Watch
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.timings import Timings


@dataclasses.dataclass
class Device:
    """A device that says what it is told to say."""

    device_kind: str
    stats: dict[str, int] | None = None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


class Fake(Run):
    """A run of which a test says what it needs."""

    mesh = batch_size = parts = None  # type: ignore[assignment]


def made(kind: type, **values: Any) -> Any:
    """An instance with these attributes alone."""
    one = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(one, name, value)
    return one


@pytest.fixture
def records(tmp_path, monkeypatch):
    """The records of steps of 2, 2 and 4 seconds, on given devices; a step takes 150 TFLOP a picture."""
    now = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(meter, "training_flops", lambda parts, data, shape: 150 * 10**12)

    def run(devices: list[Device]) -> list[dict[str, Any]]:
        mesh = SimpleNamespace(size=2, local_devices=devices)
        one = made(Fake, config=TrainConfig(), mesh=mesh, batch_size=4, total_steps=3, rate=lambda n: 0.1,
                   folder=SimpleNamespace(path=tmp_path))  # fmt: skip
        data = made(Feed, bad=SimpleNamespace(count=0), buckets=SimpleNamespace(shapes=((64, 64),)))
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        config = MetricsConfig(log_period=1)
        writer = MetricsWriter(config, file=file, tensorboard=tmp_path / "board", run_name="x", start=0)
        counted = Meter(one, writer, Watch(start=0, total=3, log_period=1, is_shown=False), data, Timings())
        for n, seconds in enumerate((2, 2, 4), 1):
            values = {"learning/loss": 1.0, "learning/grad_norm": 1.0}
            counted.put(n, {**values, "decile_sums": np.zeros(10), "decile_counts": np.zeros(10)}, (64, 64), 0.0)
            now[0] += seconds
            for device in devices:
                if device.stats:
                    device.stats["bytes_in_use"] += 1
            counted.flush()
        writer.close()
        return [json.loads(line) for line in file.read_text().splitlines()]

    return run


def test_speed_is_a_share_of_the_chips_peak_and_memory_is_that_of_the_fullest_device(records):
    devices = [
        Device("TPU v5p", {"bytes_in_use": 10, "peak_bytes_in_use": 70, "bytes_limit": 99}),
        Device("TPU v5p", {"bytes_in_use": 20, "peak_bytes_in_use": 60, "bytes_limit": 99}),
    ]
    found = records(devices)
    # 4 pictures on 2 devices: 300 TFLOP each.
    assert [r["perf/per_device_tflops_per_sec"] for r in found] == [150, 150, 75]
    assert [r["perf/mfu"] for r in found] == pytest.approx([150 / 459, 150 / 459, 75 / 459])
    assert [r["perf/memory_bytes_in_use"] for r in found] == [21, 22, 23]
    assert [r["perf/memory_peak_bytes"] for r in found] == [70, 70, 70]


@pytest.mark.parametrize("device", [Device("cpu"), Device("cpu", {}), Device("NVIDIA A100-SXM4-80GB")])
def test_what_a_device_does_not_tell_is_no_metric(records, device: Device):
    for record in records([device]):
        assert not {"perf/mfu", "perf/memory_bytes_in_use", "perf/memory_peak_bytes"} & record.keys()
        assert record["perf/per_device_tflops"] == 300


def test_metrics_of_the_device_reach_tensorboard(records, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("tensorboardX.SummaryWriter.add_scalar", lambda self, name, value, step: told.append(name))
    records([Device("NVIDIA H200", {"bytes_in_use": 1, "peak_bytes_in_use": 2})])
    assert {"perf/mfu", "perf/memory_bytes_in_use", "perf/memory_peak_bytes"} <= set(told)


def test_every_chip_of_the_table_has_a_name_by_which_jax_calls_it():
    assert set(KINDS.values()) == CHIPS.keys()
    for kind, name in KINDS.items():
        assert peak_tflops([Device(kind)]) == CHIPS[name].tflops


@pytest.mark.parametrize("form", ["PCIe", "NVL"])
def test_a_slower_card_of_the_same_name_is_not_taken_for_a_faster_one(form: str):
    assert peak_tflops([Device(f"NVIDIA H100 {form}")]) is None
    assert peak_tflops([Device(f"NVIDIA H200 {form}")]) is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpus_that_libtpu_describes_are_called_so(topology: str):
    devices = topologies.devices(topology)
    assert peak_tflops(devices) == CHIPS[topology.partition(":")[0]].tflops


def test_memory_that_only_some_devices_tell_of_is_not_told():
    assert memory_used([Device("x", {"bytes_in_use": 1}), Device("x")]) == {}
    assert memory_used([Device("x", {"bytes_in_use": 1})]) == {"perf/memory_bytes_in_use": 1.0}


def test_log_lines_of_a_run_are_as_before(records, caplog):
    caplog.set_level(logging.INFO)
    records([Device("cpu")])
    assert [line.partition("  ")[0] for line in caplog.messages] == ["step 1/3", "step 2/3", "step 3/3"]
