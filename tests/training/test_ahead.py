"""The step compiled ahead of time: what is said of it is what a run takes; the search, and what does not fit."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from tiny_step import TEXT, UNET, VAE_CONFIG

from sdxl_eqx.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ReportConfig,
    TrainConfig,
)
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.remat import Remat
from sdxl_eqx.parallel.topologies import Chip
from sdxl_eqx.training import report as reporting
from sdxl_eqx.training.ahead import DoesNotFit, Report, Target, _shapes
from sdxl_eqx.training.program import Program
from sdxl_eqx.training.report import does_not_fit, report, table
from sdxl_eqx.training.search import search

ROOT = Path(__file__).resolve().parents[2]
CHIP = Chip("cpu", 10**9, 0.9, 1.0, 10.0, 1.0)
SHAPES = ModelShapes(UNET, VAE_CONFIG, TEXT, dataclasses.replace(TEXT, projection_dim=16), ScheduleConfig())


def config(batch: float = 2.0, *, cached: bool = True, remat: Any = "none", **parallel: Any) -> TrainConfig:
    """A config for CPU devices that stand for a topology."""
    return TrainConfig(
        attention=AttentionConfig(remat_policy=remat),
        optim=OptimConfig(per_device_batch_size=batch),
        data=DataConfig(resolution=16, cache_latents_text_encoder_outputs=cached),
        parallel=ParallelConfig(compile_topology="v5e:2x2", **parallel),
    )


def target(asked: TrainConfig, count: int = 1, chip: Chip = CHIP) -> Target:
    return Target(asked, 0.0, chip, jax.devices()[:count], SHAPES)


@pytest.fixture(scope="module")
def found() -> Report:
    """The report of the small step on one device."""
    return target(config()).compiled(config())


def test_what_a_report_says_is_what_was_asked_for(found: Report):
    assert (found.topology, found.devices, found.mesh) == ("v5e:2x2", 1, {})
    assert (found.per_device_batch_size, found.remat_policy, found.effort) == (2.0, "none", 0.0)
    assert found.fits and found.chip_bytes == 10**9
    assert found.collectives == {}
    assert found.ideal_step_seconds == found.tflop_per_step / 1.0
    assert 0.9 < found.recompute_ratio <= 1.0
    assert found.lower_seconds > 0 and found.compile_seconds > 0


def test_arguments_are_the_state_and_the_batch(found: Report):
    """Weights, two moments, and what counts: to a page."""
    unet = jax.eval_shape(lambda: UNet(UNET, key=jax.random.key(0)))
    weights = sum(x.size for x in jax.tree.leaves(unet))
    batch = 2 * (4 * (2 * 8 * 8 * 4 + 6) + 2 * (77 * 32 + 16))  # embeddings in the activation dtype
    assert found.argument_bytes == pytest.approx(4 * (3 * weights + 4 * 1000) + batch, abs=2**13)
    assert found.peak_bytes >= found.argument_bytes + found.temp_bytes


def test_encoders_that_run_are_in_arguments_and_operations(found: Report):
    asked = config(cached=False)
    other = target(asked).compiled(asked)
    assert other.argument_bytes > found.argument_bytes
    assert other.tflop_per_step > found.tflop_per_step


def test_devices_that_share_weights_hold_less_each_and_say_what_they_send(found: Report):
    asked = config(1.0, ici_data_parallelism=1, ici_fsdp_parallelism=2)
    other = target(asked, 2).compiled(asked)
    assert other.mesh == {"fsdp": 2} and other.devices == 2
    assert other.tflop_per_step == found.tflop_per_step
    assert other.ideal_step_seconds == found.ideal_step_seconds / 2
    assert other.collectives
    cells = [cell.strip() for cell in table([found, other]).splitlines()[-1].split("|")]
    assert cells[1:6] == ["v5e:2x2", "fsdp 2", "1", "none", "x 0.96"]


def test_memory_is_what_a_real_run_takes():
    """In a process of its own: how far the first step raises its memory, with some 10% that XLA does not account."""
    words = [sys.executable, str(Path(__file__).with_name("measure_memory.py"))]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    ended = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    said, arguments, rise = (int(word) for word in ended.stdout.split())
    print(f"temporaries and results: said {(said - arguments) / 1e6:.0f} MB, measured {rise / 1e6:.0f} MB")
    assert said - arguments <= rise <= 1.2 * (said - arguments)


def test_a_compiler_that_says_no_is_one_message_and_any_other_error_is_said_too(monkeypatch: pytest.MonkeyPatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.35G of 15.75G hbm. Exceeded ...")

    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    lowered = SimpleNamespace(compile=refuse)
    traced = SimpleNamespace(lower=lambda **_: lowered)
    jitted = SimpleNamespace(trace=lambda *_: traced)
    monkeypatch.setattr(Program, "jit", lambda *_: jitted)
    with pytest.raises(ValueError, match=r"2 images a device .* none do not fit, .*\(Used 20.35G of 15.75G\)\. What"):
        target(config()).compiled(config())
    error = jax.errors.JaxRuntimeError("INTERNAL: something else\nand more")
    with pytest.raises(ValueError, match=r"v5e:2x2: the compiler failed \(INTERNAL: something else\)\.$"):
        target(config()).compiled(config())


@dataclasses.dataclass(frozen=True)
class Imagined(Target):
    """Takes memory by a rule, and counts what is compiled."""

    compiled_batches: list[tuple[Remat, float]] = dataclasses.field(default_factory=list)

    def estimate(self, config: TrainConfig) -> int:
        return 24  # far too many for most, too few for some

    def compiled(self, config: TrainConfig) -> Report:
        batch, remat = config.optim.per_device_batch_size, config.attention.remat_policy
        fsdp = config.parallel.ici_fsdp_parallelism
        assert remat != "auto"
        self.compiled_batches.append((remat, batch))
        each = {"none": 400, "dots": 100, "attention": 60, "full": 20}[remat] * 10**6
        weights = 500 * 10**6 if fsdp == 1 else 500 * 10**6 // len(self.devices)
        peak = int(weights + each * batch * (1 + 0.001 * batch))
        if remat == "none" and fsdp == 1 and batch > 2:
            raise DoesNotFit("the compiler says no")
        return made(peak, batch, remat, {"fsdp": len(self.devices)} if fsdp != 1 else {})


def made(peak: int, batch: float, remat: Remat, mesh: dict[str, int]) -> Report:
    """A report of no program."""
    ratio = {"none": 1.0, "dots": 1.09, "attention": 1.2, "full": 1.24}[remat]
    return Report(
        "v5e:2x2", 4, mesh, batch, remat, "auto", 0.0, 500, peak - 500, peak, CHIP.memory, peak <= CHIP.limit, {},
        1.0, ratio, 0.5, ratio + 1 / batch, 1.0, 2.0,
    )  # fmt: skip


def test_a_larger_chip_or_a_policy_that_keeps_less_is_thought_to_hold_more_images():
    larger = dataclasses.replace(CHIP, memory=4 * CHIP.memory)
    none, more, full = (
        target(asked, chip=chip).estimate(asked)
        for asked, chip in ((config(), CHIP), (config(), larger), (config(remat="full"), CHIP))
    )
    assert more == pytest.approx(4 * none, rel=0.1) and full > none > 10


def imagined(remat: Any, count: int = 1, chip: Chip = CHIP) -> Imagined:
    return Imagined(config(remat=remat), 0.0, chip, jax.devices()[:count], SHAPES)


def test_the_search_finds_the_largest_batch_of_each_policy_and_orders_them():
    tried = imagined("auto")
    best, *others = search(tried)
    sizes = {one.remat_policy: one.per_device_batch_size for one in (best, *others)}
    assert sizes == {"none": 1, "dots": 3, "attention": 6, "full": 19}
    assert [one.image_seconds for one in (best, *others)] == sorted(one.image_seconds for one in (best, *others))
    assert best.remat_policy == "full"


@dataclasses.dataclass(frozen=True)
class Stepped(Imagined):
    """Of a compiler that saves memory only when it must: as much from 4 to 9, and too much from 10 on."""

    def compiled(self, config: TrainConfig) -> Report:
        batch = config.optim.per_device_batch_size
        self.compiled_batches.append(("full", batch))
        return made(800 * 10**6 if batch < 10 else 2 * 10**9, batch, "full", {})


def test_memory_that_makes_no_line_ends_the_search_all_the_same():
    tried = Stepped(config(remat="full"), 0.0, CHIP, jax.devices()[:1], SHAPES)
    (found,) = search(tried)
    assert found.fits and 6 <= found.per_device_batch_size <= 9
    assert len(tried.compiled_batches) <= 10


class Failing(Stepped):
    """Of a compiler that fails from 6 images on, whatever they take."""

    def compiled(self, config: TrainConfig) -> Report:
        if config.optim.per_device_batch_size >= 6:
            raise ValueError("the compiler failed")
        return super().compiled(config)


def test_a_compiler_that_fails_is_not_taken_for_a_batch_that_does_not_fit():
    with pytest.raises(ValueError, match="the compiler failed"):
        search(Failing(config(remat="full"), 0.0, CHIP, jax.devices()[:1], SHAPES))


def test_a_policy_and_a_mesh_that_are_given_are_kept():
    assert {one.remat_policy for one in search(imagined("full"))} == {"full"}
    given = dataclasses.replace(imagined("full", 4), config=config(remat="full", ici_fsdp_parallelism=1))
    meshes = [one.mesh for one in search(given)]
    assert {} in meshes and {"fsdp": 4} in meshes
    fixed = config(remat="full", ici_data_parallelism=1, ici_fsdp_parallelism=4)
    assert [one.mesh for one in search(dataclasses.replace(given, config=fixed))] == [{"fsdp": 4}]


@pytest.mark.parametrize(
    ("count", "hardware", "shares"),
    [(4, "tpu", [1, -1]), (16, "tpu", [1, -1]), (40, "tpu", [1, -1]), (32, "gpu", [1, -1]), (32, "tpu", [1, -1, 16])],
)
def test_a_large_slice_may_share_weights_among_16_chips_and_samples_among_all(count, hardware, shares):
    tried: list[tuple[int, int]] = []

    class Meshes(Stepped):
        def compiled(self, config: TrainConfig) -> Report:
            tried.append((config.parallel.ici_data_parallelism, config.parallel.ici_fsdp_parallelism))
            return super().compiled(config)

    chip = dataclasses.replace(CHIP, hardware=hardware)
    search(Meshes(config(remat="full", ici_fsdp_parallelism=1), 0.0, chip, count * jax.devices()[:1], SHAPES))
    assert list(dict.fromkeys(tried)) == [(1 if n == -1 else -1, n) for n in shares]


def test_what_does_not_fit_at_one_image_is_said_and_is_last():
    small = dataclasses.replace(CHIP, memory=700 * 10**6)
    *_, last = search(imagined("auto", chip=small))
    assert not last.fits and (last.remat_policy, last.per_device_batch_size) == ("none", 1)


@pytest.mark.parametrize(
    ("one", "would"),
    [
        (made(2 * 10**9, 4.0, "full", {"fsdp": 4}), "lower --per-device-batch-size"),
        (made(2 * 10**9, 1.0, "dots", {"fsdp": 4}), "use --remat-policy full"),
        (made(2 * 10**9, 1.0, "full", {"data": 4}), "--ici-fsdp-parallelism -1 --ici-data-parallelism 1"),
        (made(2 * 10**9, 1.0, "full", {"fsdp": 4}), "take larger devices, or --moments-dtype bfloat16"),
        (
            dataclasses.replace(made(10**9, 1.0, "full", {"fsdp": 4}), argument_bytes=6 * 10**8),
            "take 5 of these devices or more, by fsdp",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(one: Report, would: str):
    message = does_not_fit([one], CHIP)
    assert "of 1.0 it may fill 0.9" in message and would in message


def test_the_report_is_written_with_its_names_and_refused_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "sdxl_eqx")
    asked = config(remat="full")
    monkeypatch.setattr(reporting.Target, "of", lambda config, effort: imagined("full"))
    report(asked, ReportConfig(json=str(tmp_path / "r.json"), effort=-1.0))
    names = """topology devices per_device_batch_size remat_policy effort argument_bytes temp_bytes peak_bytes
    chip_bytes fits collectives tflop_per_step recompute_ratio ideal_step_seconds lower_seconds compile_seconds"""
    assert set(names.split()) <= json.loads((tmp_path / "r.json").read_text()).keys()
    assert "| v5e:2x2" in caplog.text
    with pytest.raises(ValueError, match="lower --per-device-batch-size"):
        report(config(30.0, remat="full"), ReportConfig())
    report(asked, ReportConfig(json=str(tmp_path / "s.json"), search=True))
    assert [one["remat_policy"] for one in json.loads((tmp_path / "s.json").read_text())] == ["full"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (ReportConfig(effort=-2.0), "--effort -2: must be from -1 to 1"),
        (ReportConfig(json="nowhere/r.json"), "--json nowhere/r.json: must be a file in a folder that is there"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_compiled(asked: ReportConfig, says: str):
    with pytest.raises(ValueError, match=says):
        report(config(), asked)


@pytest.mark.parametrize(("values", "groups"), [({"train_new_unet": True}, 16), ({}, 32)])
def test_the_known_model_has_the_groups_that_are_asked_for(values, groups):
    model = ModelConfig(norm_num_groups=16, **values)
    assert _shapes(TrainConfig(model=model)).unet.norm_num_groups == groups
