"""JAX's settings for a run."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from sdxl_eqx.config import MachineConfig
from sdxl_eqx.parallel.begin import configure_jax

CACHE = "jax_compilation_cache_dir"
PRECISION = "jax_default_matmul_precision"


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Those of before, afterwards."""
    before = {name: getattr(jax.config, name) for name in (CACHE, PRECISION)}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("backend", "devices", "kept"), [("cpu", 1, True), ("cpu", 2, False), ("gpu", 8, True), ("tpu", 4, True)]
)
def test_programs_are_kept_but_for_several_cpu_devices_that_would_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, devices: int, kept: bool
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    configure_jax(MachineConfig(jax_cache_dir=str(tmp_path)), "DEFAULT")
    assert getattr(jax.config, CACHE) == (str(tmp_path) if kept else None)


@pytest.mark.parametrize(("given", "where"), [("", "~/.cache/sdxl_eqx/jax"), ("none", None)])
def test_programs_are_kept_in_the_users_own_folder_or_nowhere(monkeypatch: pytest.MonkeyPatch, given: str, where):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    configure_jax(MachineConfig(jax_cache_dir=given), "DEFAULT")
    assert getattr(jax.config, CACHE) == (where and str(Path(where).expanduser()))


@pytest.mark.parametrize(("precision", "set_to"), [("DEFAULT", None), ("HIGH", "high"), ("HIGHEST", "highest")])
def test_precision_of_matrix_products(precision: str, set_to: str | None):
    configure_jax(MachineConfig(), precision)
    assert getattr(jax.config, PRECISION) == set_to
