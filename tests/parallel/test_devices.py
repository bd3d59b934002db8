import logging

from sdxl_eqx.parallel import devices


def test_a_gpu_that_lies_idle_is_said_loudly(monkeypatch, caplog):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    assert devices.choose_hardware("auto")[0].platform == "cpu"
    (record,) = caplog.records
    assert "HAS A GPU BUT JAX RUNS ON THE CPU" in record.getMessage() and "cuda13" in record.getMessage()
    assert record.levelno == logging.WARNING


def test_a_cpu_that_was_asked_for_is_no_reason_to_warn(monkeypatch, caplog):
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    devices.choose_hardware("auto")
    monkeypatch.delenv("JAX_PLATFORMS")
    devices.choose_hardware("cpu")
    assert not caplog.records
