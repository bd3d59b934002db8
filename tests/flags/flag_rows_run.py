"""Rows of the run, its devices, what it keeps and what it shows."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import jax
import pytest
from filelock import FileLock
from flag_row import SHAPES, Row, Rows, caught, program, seen, stand_in
from flag_rows_data import fed
from flag_rows_training import jax_settings
from parallel.fake_devices import slices

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.parallel import begin
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training import exporting, finishing, loop, setup, showing
from sdxl_eqx.training.ahead import Target
from sdxl_eqx.training.cloud import Mirror
from sdxl_eqx.training.feed import Feed
from sdxl_eqx.training.meter import Meter
from sdxl_eqx.training.metrics import MetricsWriter
from sdxl_eqx.training.networks import Networks
from sdxl_eqx.training.profiling import Profiler
from sdxl_eqx.training.run_folder import RunFolder
from sdxl_eqx.training.setup import Run
from sdxl_eqx.training.state import TrainState
from sdxl_eqx.training.timings import Timings
from sdxl_eqx.training.trackers import check_tracker

# The run


def place(config: TrainConfig) -> tuple[str, str]:
    """(where the runs lie, the run's name)."""
    found = seen(
        "sdxl_eqx.training.setup.RunFolder.open", lambda: setup.prepare(config),
        training__setup__configure_jax=Mock(), training__setup___Plan=Mock(), training__setup__new_name=lambda: "new",
        training__setup___check_same_everywhere=Mock(),
    )  # fmt: skip
    return found.given


def hardware(config: TrainConfig) -> str:
    """The devices that are looked for."""
    return seen("sdxl_eqx.training.setup.choose_hardware", lambda: setup._Plan.make(config)).given[0]


def skipped(config: TrainConfig) -> bool:
    """Whether other processes are not waited for."""
    start = "sdxl_eqx.parallel.begin.hosts.start"
    return seen(start, lambda: begin.begin_jax(config.run), parallel__begin__set_compiler_flags=Mock()).named["skip"]


RUN: Rows = {
    "run_name": Row("mine", place, ("outputs", "new"), ("outputs", "mine")),
    "base_output_directory": Row("base", place, ("outputs", "new"), ("base", "new")),
    "output_dir": Row("out", place, ("outputs", "new"), ("out", "new")),
    "seed": Row(7, lambda c: fed(c).named["seed"], 0, 7),
    "hardware": Row("cpu", hardware, "auto", "cpu"),
    "skip_jax_distributed_system": Row(True, skipped, False, True),
    "jax_cache_dir": Row("compiled", lambda c: jax_settings(c)["jax_compilation_cache_dir"],
                         str(Path.home() / ".cache" / "sdxl_eqx" / "jax"), "compiled"),
}  # fmt: skip

# Devices


def inside(axis: str) -> Any:
    """How many of 8 devices of one slice lie along an axis."""
    return lambda config: make_mesh(config.parallel, jax.devices()).shape[axis]


def across(axis: str) -> Any:
    """The size of an axis on two slices of 4 chips."""
    return lambda config: make_mesh(config.parallel, slices(2, 2, 2, 1)).shape[axis]


def may_split(config: TrainConfig) -> bool:
    """Whether an axis of the mesh may be a part of a TPU's."""
    target = "sdxl_eqx.parallel.mesh.mesh_utils.create_device_mesh"
    return seen(target, lambda: make_mesh(config.parallel, jax.devices())).named["allow_split_physical_axes"]


def script(config: TrainConfig) -> str:
    """What scripts/train.py does: trains, or answers for a topology."""
    path = Path(__file__).parents[2] / "scripts" / "train.py"
    spec = importlib.util.spec_from_file_location("train_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.parse, module.talk = lambda _: config, Mock()  # pyright: ignore[reportAttributeAccessIssue]
    begun = caught("sdxl_eqx.parallel.begin.begin_jax", module.main, training__report__answer=lambda *_: 0)
    return "answers" if begun is None else "trains"


def described(config: TrainConfig) -> tuple[Any, ...]:
    """The topology that is compiled for."""
    return seen("sdxl_eqx.training.ahead.topologies.devices", lambda: Target.of(config, 0.0)).given


REST = {"ici_data_parallelism": 1, "ici_fsdp_parallelism": -1}
PARALLEL: Rows = {
    "mesh_axes": Row(["tensor", "context", "fsdp", "data"], lambda c: make_mesh(c.parallel, jax.devices()).axis_names,
                     ("data", "fsdp", "context", "tensor"), ("tensor", "context", "fsdp", "data")),
    "dcn_data_parallelism": Row(1, across("data"), 8, 4, along={"dcn_fsdp_parallelism": -1}),
    "ici_data_parallelism": Row(2, inside("data"), 8, 2, along={"ici_fsdp_parallelism": -1}),
    **{f"dcn_{axis}_parallelism": Row(2, across(axis), 1, 2) for axis in ("fsdp", "context", "tensor")},
    **{f"ici_{axis}_parallelism": Row(4, inside(axis), 1, 4) for axis in ("fsdp", "context", "tensor")},
    "allow_split_physical_axes": Row(True, may_split, False, True),
    "logical_axis_rules": Row(
        [["embed", ["tensor"]]],
        lambda c: Layout(make_mesh(c.parallel, jax.devices()), c.parallel.logical_axis_rules).named("embed"),
        ("fsdp",), ("tensor",),
    ),
    "data_sharding": Row(["fsdp"], lambda c: program(c, 4).batch_sharding.spec[0],
                         ("data", "fsdp", "context", "tensor"), "fsdp"),
    "compile_topology": Row("h100x8", script, "trains", "answers"),
    "compile_topology_num_slices": Row(2, described, ("v5e:2x2", 1), ("v5e:2x2", 2), {"compile_topology": "v5e:2x2"}),
}  # fmt: skip

# The loop


def told(config: TrainConfig) -> dict[str, Any]:
    """What a run of 6 steps of 2 samples does after which of them, and the batches that it trains on."""
    found: dict[str, Any] = {"saved": [], "shown": [], "measured": [], "batches": []}

    def note(name: str, at: int) -> Callable[..., Any]:
        return lambda *args: found[name].append(args[at]) or True

    @contextlib.contextmanager
    def step(*_: Any) -> Any:
        yield lambda shape, state, frozen, batch, schedule: (
            found["batches"].append(batch) or stand_in(TrainState, step=state.step + 1), {}
        )  # fmt: skip

    run = stand_in(Run, config=config, batch_size=2, total_steps=6, parts=Mock(schedule=ScheduleConfig()))
    run.mesh, run.state = jax.make_mesh((1,), ("data",)), stand_in(TrainState, step=0)
    run.folder, run.layout = Mock(), Mock()
    data = stand_in(Feed, stream=iter(range(9)), position=0, frozen=None)
    with pytest.MonkeyPatch.context() as patch:
        for name, other in {
            "_step": step, "_pixels": lambda *_: (64, 64), "_to_devices": lambda batch, run: batch, "Meter": MagicMock(
                return_value=Mock(in_a_row=0)), "Validation": MagicMock(), "_send": Mock(), "_written": lambda _: True,
            "finish": Mock(return_value=None), "show": note("shown", 1), "_measure": note("measured", 1),
            "_save": note("saved", 1), "to_yaml": lambda _: "", "_profiler": lambda run, start: Profiler(
                config.metrics, Path("nowhere"), start),
        }.items():  # fmt: skip
            patch.setattr(loop, name, other)
        patch.setattr("sdxl_eqx.training.feed.to_batch", lambda x: x)
        patch.setattr("sdxl_eqx.training.feed.Batches.next", _next)
        loop._train(run, data, stand_in(MetricsWriter), Timings())
    return found


def _next(batches: Any) -> Any:
    """Without a check of what a batch is."""
    if batches.last is None or not batches.is_one:
        batches.last = next(batches.stream)
    batches.next_index += 1
    return batches.last


def profiled(config: TrainConfig) -> list[int]:
    """The first and the last of 30 steps that are recorded."""
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        n = 0
        patch.setattr("jax.profiler.start_trace", lambda _: steps.append(n))
        patch.setattr("jax.profiler.stop_trace", lambda: steps.append(n))
        with Profiler(config.metrics, Path("nowhere"), 0) as profiler:
            for n in range(1, 31):
                with profiler.at(n) as keep:
                    keep(None)
    return steps


def kept(name: str) -> Any:
    """What the checkpoints of a run on two devices are asked for."""

    def observe(config: TrainConfig) -> Any:
        plan = stand_in(setup._Plan, inputs=Mock(parts=SHAPES), total_steps=6)
        plan.program = Mock(layout=Layout(make_mesh(config.parallel, jax.devices()[:2]), ()))
        folder = stand_in(RunFolder, checkpoints="checkpoints")
        return seen("sdxl_eqx.training.setup.Checkpoints", lambda: setup._open(config, plan, folder)).named[name]

    return observe


def exported(config: TrainConfig) -> str:
    """The dtype of the export."""
    run = stand_in(Run, config=config)
    found = seen(
        "sdxl_eqx.training.exporting._write_model", lambda: exporting.export(run, 6, stand_in(Networks)),
        training__exporting__SDXL=Mock(),
    )  # fmt: skip
    return str(found.given[2])


CHECKPOINT: Rows = {
    "checkpoint_every": Row(5, lambda c: told(c)["saved"], [6], [3, 5, 6]),
    "checkpoints_to_keep": Row(5, kept("keep"), 2, 5),
    "export_dtype": Row("float32", exported, "float16", "float32"),
    "enable_single_replica_ckpt_restoring": Row(True, kept("broadcast_over"), None, "data"),
}

# What is told


def files(config: TrainConfig) -> list[str]:
    """What a run's writer begins."""
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
        folder = Mock(path=Path(root), place=root, metrics=Path("metrics.jsonl"), tensorboard=Path("board"))
        run = stand_in(Run, config=config, folder=folder, state=Mock(step=0))
        loop._open_writer(run).close()
        return sorted(path.name for path in Path().iterdir())


def flushed(config: TrainConfig) -> int:
    """After how many of 200 steps TensorBoard's file is whole."""
    upload = Mock()
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        writer = MetricsWriter(
            config.metrics, file=place / "m", tensorboard=place / "b", run_name="x", start=0, upload=upload
        )
        for n in range(1, 201):
            writer.write(n, {})
        writer.close()
    return upload.call_count


def timed(config: TrainConfig) -> str:
    """The file of how long the start took, or ''."""
    folder = Mock(path=Path("run"))
    meter = stand_in(Meter, run=Mock(config=config, folder=folder), timings=stand_in(Timings), writer=Mock())
    Meter._report(meter, 1, 2.0)
    calls = meter.timings.report.call_args_list
    return calls[0].kwargs["file"] if calls else ""


def periods(config: TrainConfig) -> list[str]:
    """Files of a log_period each that a run in a bucket has after 5 steps."""
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
        here = Path(root)
        folder = Mock(path=here, place="gs://a/b", metrics=here / "m", tensorboard=here / "t", periods=here / "metrics")
        writer = loop._open_writer(stand_in(Run, config=config, folder=folder, state=Mock(step=0)))
        for n in range(1, 6):
            writer.write(n, {})
        writer.close()
        return sorted(path.name for path in here.glob("metrics/*"))


def configs(config: TrainConfig) -> list[str]:
    """Files of the config that a run in a bucket has."""
    with tempfile.TemporaryDirectory() as root:
        setup._write_config(config, RunFolder(Path(root), stand_in(FileLock), stand_in(Mirror)))
        return sorted(path.name for path in Path(root).iterdir())


def wants_wandb(config: TrainConfig) -> bool:
    """Whether Weights & Biases is looked for."""
    return caught("sdxl_eqx.training.trackers._wandb", lambda: check_tracker(config.metrics)) is not None


BUCKET = {"base_output_directory": "gs://a/b"}
"""Where they have an effect."""

PERIODS = ["metrics_step_000001_to_step_000003.txt", "metrics_step_000004_to_step_000005.txt"]

PROFILE = {"enable_profiler": True}
METRICS: Rows = {
    "write_metrics": Row(False, files, ["board", "metrics.jsonl"], []),
    "metrics_file": Row("copy.jsonl", files, ["board", "metrics.jsonl"], ["board", "copy.jsonl", "metrics.jsonl"]),
    "log_period": Row(50, flushed, 2, 4),
    "tracker": Row("wandb", wants_wandb, False, True),
    "gcs_metrics": Row(True, periods, [], PERIODS, {**BUCKET, "log_period": 3}),
    "save_config_to_gcs": Row(True, configs, ["config.yaml"], ["config.yaml", "config.yml"], BUCKET),
    "write_timing_metrics": Row(True, timed, "", "run/timing.json"),
    "timing_metrics_file": Row("t.json", timed, "run/timing.json", "t.json", {"write_timing_metrics": True}),
    "enable_profiler": Row(True, profiled, [], [6, 15]),
    "skip_first_n_steps_for_profiler": Row(2, profiled, [6, 15], [3, 12], PROFILE),
    "profiler_steps": Row(3, profiled, [6, 15], [6, 8], PROFILE),
    "reuse_example_batch": Row(True, lambda c: told(c)["batches"], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]),
}

# What is drawn


def drawn(name: str) -> Any:
    """How a sample is drawn: of its manner, or its negative prompt."""

    def observe(config: TrainConfig) -> Any:
        run = stand_in(Run, config=config, batch_size=2, layout=Mock(shardings=lambda tree: tree))
        run.mesh.size, run.model.return_value.controlnet = 1, None
        found = seen(
            "sdxl_eqx.training.showing.generate",
            lambda: showing.draw_captions(run, stand_in(Networks), ["a fox"]),
            training__showing__Drawing=Mock(return_value=Mock(shares=1)), training__showing__Models=Mock(),
            training__showing__Scheduler=Mock(), training__showing__put=Mock(),
        )  # fmt: skip
        prompts, manner = found.given[1], found.given[4]
        return getattr(prompts[0] if name == "negative_prompt" else manner, name)

    return observe


def prompts(draw: Callable[[Run], Any], config: TrainConfig) -> list[str]:
    """What is drawn, of pictures with the captions 0, 1 and on."""
    source = MagicMock(captions=lambda i: (str(i),), **{"__len__.return_value": 9})
    run = stand_in(Run, config=config, source=source)
    found = caught("sdxl_eqx.training.finishing._drawn", lambda: draw(run))
    return [] if found is None else list(found.given[2])


def shown(config: TrainConfig) -> list[str]:
    """Of a grid."""
    return prompts(lambda run: finishing.show(run, 1, stand_in(TrainState, ema=None), stand_in(MetricsWriter)), config)


def retrieved(config: TrainConfig) -> list[str]:
    """Of the captions that are to be found again."""
    state, writer = stand_in(TrainState), stand_in(MetricsWriter)
    return prompts(lambda run: finishing._retrieve(run, 1, state, writer), config)


CASTLE = "A magical castle in the middle of a forest, artistic drawing"
SAMPLE: Rows = {
    "prompt": Row("a fox", shown, [CASTLE] * 4, ["a fox"] * 4),
    "negative_prompt": Row("blurred", drawn("negative_prompt"), None, "blurred"),
    "do_classifier_free_guidance": Row(False, drawn("guidance_scale"), 9.0, 1.0),
    "guidance_scale": Row(5, drawn("guidance_scale"), 9.0, 5.0),
    "guidance_rescale": Row(0.7, drawn("guidance_rescale"), 0.0, 0.7),
    "num_inference_steps": Row(5, drawn("steps"), 20, 5),
    "sample_every": Row(5, lambda c: told(c)["shown"], [], [3, 5]),
    "eval_every": Row(5, lambda c: told(c)["measured"], [6], [3, 5, 6], {"eval_split": "0.1"}),
    "samples_per_grid": Row(2, shown, [CASTLE] * 4, [CASTLE] * 2),
    "caption_retrieval": Row(3, retrieved, [], ["0", "1", "2"]),
}

ROWS: Rows = {**RUN, **PARALLEL, **CHECKPOINT, **METRICS, **SAMPLE}
