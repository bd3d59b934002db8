"""Wrong input ends scripts/train.py with exit code 2 and one message: the value, the rule and the remedy."""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny_run import ROOT

from sdxl_eqx.training import loop
from sdxl_eqx.training.program import Program
from sdxl_eqx.training.run_folder import RunFolder

Main = Callable[..., tuple[int, str]]
"""Runs the script on arguments; its exit code and all that it said."""

TOKEN = "hf_" + "secret" * 5


@pytest.fixture
def settings():
    """Puts JAX's settings back, which a run changes."""
    names = ("jax_default_matmul_precision", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def script() -> Any:
    """scripts/train.py as a module."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def main(script, settings, monkeypatch, capsys, caplog) -> Main:
    """Runs the script in this process, on 8 devices. What it does not catch, the test sees."""
    caplog.set_level(logging.INFO)

    def run(*arguments: str) -> tuple[int, str]:
        caplog.clear()
        monkeypatch.setattr("sys.argv", ["scripts/train.py", *arguments])
        try:
            code = script.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = [record.getMessage() for record in caplog.records if record.name == "sdxl_eqx"]
        return code, "\n".join([*said, *"".join(capsys.readouterr()).splitlines()])

    return run


@pytest.fixture
def refused(main: Main, monkeypatch) -> Callable[..., str]:
    """Runs the script on wrong input; the one message."""

    def never(*_: Any) -> None:
        pytest.fail("a run with wrong input began")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(Program, "jit", never)
        code, said = main(*arguments)
        assert code == 2, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said
        assert "Traceback" not in said
        return errors[0]

    return run


@pytest.fixture
def flags(model: Path, pictures: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The flags of a run that would work, with some changed."""

    def make(**changed: str) -> list[str]:
        values = {
            "pretrained_model_name_or_path": str(model),
            "train_data_dir": str(pictures),
            "resolution": "16",
            "run_name": "run",
            "output_dir": str(tmp_path / "outputs"),
            "jax_cache_dir": "none",
            "max_train_steps": "6",
            "per_device_batch_size": "1",
            "samples_per_grid": "0",
            "activations_dtype": "float32",
        } | changed
        return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]

    return make


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def test_a_missing_data_set_names_the_flag_and_the_tiny_configuration(refused):
    message = refused("--run-name", "mine")
    assert "--train-data-dir" in message and "configs/tiny.yaml" in message


def test_an_unknown_flag_suggests_the_nearest_name(refused, flags):
    message = refused(*flags(), "--lerning-rate", "1e-3")
    assert "--lerning-rate" in message and "did you mean --learning-rate?" in message


def test_an_unknown_key_suggests_the_nearest_name(refused, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("train_data_dir: asset:emoji\nlerning_rate: 1e-3\n")
    message = refused("--config", str(file))
    assert "lerning_rate" in message and "did you mean learning_rate?" in message and "mine.yaml" in message


def test_an_empty_folder_says_what_it_must_hold(refused, flags, tmp_path: Path):
    folder = tmp_path / "empty"
    folder.mkdir()
    message = refused(*flags(train_data_dir=str(folder)))
    assert str(folder) in message and "metadata.jsonl" in message and '"file_name"' in message


def test_a_folder_that_is_not_there_is_named(refused, flags, tmp_path: Path):
    message = refused(*flags(train_data_dir=str(tmp_path / "nowhere")))
    assert "nowhere" in message and "asset:emoji" in message


def test_a_line_without_its_picture_is_named(refused, flags, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a picture"}\n')
    message = refused(*flags(train_data_dir=str(folder)))
    assert "line 1" in message and "gone.png" in message and "remove the line" in message


def test_a_batch_that_the_devices_cannot_share_names_the_flag(refused, flags):
    message = refused(*flags(per_device_batch_size="0.5"))
    assert "--per-device-batch-size 0.5" in message and "8 devices" in message and "use a whole number" in message


def test_a_mesh_that_the_devices_do_not_fill_names_the_flags(refused, flags):
    message = refused(*flags(ici_fsdp_parallelism="3"))
    assert "--ici-fsdp-parallelism 3" in message and "8 devices" in message and "-1" in message


def test_a_resolution_that_the_model_cannot_divide_names_the_multiple(refused, flags):
    small = flags(pretrained_model_name_or_path="asset:tiny-sdxl", resolution="72")
    message = refused(*small, "--train-new-unet", "--new-text-encoders")
    assert "--resolution 72" in message and "multiple of 16" in message


def test_an_output_folder_in_use_names_the_run_and_the_remedy(refused, flags, tmp_path: Path):
    folder = RunFolder.open(str(tmp_path / "outputs"), "run")
    try:
        message = refused(*flags())
    finally:
        folder.close()
    assert "--run-name run" in message and "another process" in message and "choose another name" in message


def test_an_output_dir_that_is_a_file_is_named(refused, flags, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    message = refused(*flags(output_dir=str(file)))
    assert "--output-dir" in message and str(file) in message and "choose another" in message


def test_hardware_that_is_not_there_names_the_extra(refused, flags):
    message = refused(*flags(hardware="gpu"))
    assert "--hardware gpu" in message and "'.[cuda13]'" in message and "--hardware auto" in message


def test_a_model_without_unet_weights_names_train_new_unet(refused, flags, own_model: Path):
    (own_model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    message = refused(*flags(pretrained_model_name_or_path=str(own_model)))
    assert f"{own_model}: has no weights of unet" in message and "--train-new-unet" in message


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_are_cut_off_are_named(part: str, refused, flags, own_model: Path):
    file = own_model / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    message = refused(*flags(pretrained_model_name_or_path=str(own_model)))
    assert str(file) in message and "fetch or save it again" in message


def test_weights_that_are_no_safetensors_are_named(refused, flags, own_model: Path):
    file = own_model / "text_encoder" / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert str(file) in refused(*flags(pretrained_model_name_or_path=str(own_model)))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_a_model_folder_without_a_config_is_named(part: str, refused, flags, own_model: Path):
    file = own_model / part / "config.json"
    file.unlink()
    assert f"{file}: missing" in refused(*flags(pretrained_model_name_or_path=str(own_model)))


def test_weights_of_another_shape_than_the_config_are_named(refused, flags, own_model: Path):
    file = own_model / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 64}))
    message = refused(*flags(pretrained_model_name_or_path=str(own_model)))
    assert "config and weights do not belong together" in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_config_that_lacks_a_key_is_named(part: str, refused, flags, own_model: Path):
    file = own_model / part / "config.json"
    config = json.loads(file.read_text())
    del config["hidden_size" if part == "text_encoder" else "block_out_channels"]
    file.write_text(json.dumps(config))
    message = refused(*flags(pretrained_model_name_or_path=str(own_model)))
    assert "hidden_size" in message or "block_out_channels" in message


def test_a_model_out_of_reach_names_it_and_not_the_token(refused, flags, hub: Path):
    name = "someone/nothing"
    message = refused(*flags(pretrained_model_name_or_path=name), "--hf-access-token", TOKEN)
    assert name in message and "HF_TOKEN" in message and TOKEN not in message


def test_a_name_that_is_neither_folder_nor_hub_id_is_named(refused, flags):
    message = refused(*flags(pretrained_model_name_or_path="./nothing"))
    assert "./nothing" in message and "no such file or folder" in message


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache of the Hub, which is out of reach."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def store(model: Path, cache: Path, name: str, commit: str) -> None:
    """A model folder as the Hub's cache has it: blobs, and snapshots of links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{i:040x}"
        shutil.copy(file, blob)
        link = repository / "snapshots" / commit / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(file.relative_to(model).parts) + 1)) / "blobs" / blob.name)


class Tracer:
    """Stands for the compiled step: counts, changes one weight, and costs no compilation."""

    def __init__(self, error_at: int = 0, error: Exception | None = None, nan_at: int = 0):
        self.error_at, self.error, self.nan_at = error_at, error, nan_at

    def __call__(self, optimizer: Any) -> Any:
        def step(state: Any, frozen: Any, batch: Any, schedule: Any) -> Any:
            n = int(state.step) + 1
            if n == self.error_at and self.error is not None:
                raise self.error
            state = jax.tree_util.tree_map(lambda x: x, state)
            object.__setattr__(state, "step", jax.device_put(jnp.int32(n), state.step.sharding))
            loss = jnp.float32(jnp.nan if n == self.nan_at else 1 / n)
            deciles = dict.fromkeys(("decile_sums", "decile_counts"), jnp.zeros(10))
            return state, {"learning/loss": loss, "learning/grad_norm": jnp.float32(1), **deciles}

        return step


@pytest.fixture
def counted(monkeypatch) -> Callable[..., None]:
    """Puts a `Tracer` in the place of the compiled step."""

    def put(**arguments: Any) -> None:
        monkeypatch.setattr(Program, "jit", Tracer(**arguments))

    return put


def test_a_model_in_the_hubs_cache_is_read_while_the_hub_is_out_of_reach(
    main: Main, flags, hub: Path, model: Path, monkeypatch
):
    store(model, hub, "someone/small", "0123456789abcdef0123456789abcdef01234567")
    began = []

    def fit(run: Any, timings: Any) -> Any:
        began.append(run)
        raise loop.RunError("far enough")

    monkeypatch.setattr(loop, "fit", fit)
    code, said = main(*flags(pretrained_model_name_or_path="someone/small"))
    assert (code, said.splitlines()[-1]) == (2, "error: far enough")
    (run,) = began
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    assert np.array_equal(
        run.state.trained.unet.conv_in.weight, load_file(file)["conv_in.weight"].transpose(2, 3, 1, 0)
    )
    assert "models--someone--small" in str(run.parts.model.tokenizers)


def test_a_checkpoint_of_another_model_or_optimizer_or_format_is_refused(
    main: Main, counted, refused, flags, own_model: Path, tmp_path: Path
):
    uncached = "--no-cache-latents-text-encoder-outputs"
    counted()
    code, said = main(*flags(), uncached)
    assert code == 0, said
    longer = flags(max_train_steps="12", pretrained_model_name_or_path=str(own_model))
    config = own_model / "unet" / "config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({**whole, "norm_num_groups": 4}))
    message = refused(*longer, uncached)
    assert "--run-name run" in message and "norm_num_groups" in message and "another run name" in message
    config.write_text(json.dumps(whole))
    for flag, value in (
        ("--ema-decay", "0.9"),
        ("--seed", "7"),
        ("--weights-dtype", "bfloat16"),
        ("--diffusion-scheduler-config.prediction-type", "v_prediction"),
    ):
        message = refused(*longer, uncached, flag, value)
        assert flag in message and "the run was begun with" in message and "another --run-name" in message
    meta = tmp_path / "outputs" / "run" / "checkpoints" / "6" / "meta" / "metadata"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 99}))
    message = refused(*longer, uncached)
    assert "format 99" in message and "another --run-name" in message


def broken(folder: Path, good: int, bad: int) -> Path:
    """A data set with pictures that can be read and others that cannot."""
    folder.mkdir()
    lines = []
    for i in range(good + bad):
        file = folder / f"{i:02d}.png"
        if i < good:
            Image.fromarray(np.full((20, 30, 3), 10 * i, np.uint8)).save(file)
        else:
            file.write_bytes(b"no picture")
        lines.append(json.dumps({"file_name": file.name, "text": f"number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("good", "bad"), [(3, 11), (0, 3)])
def test_too_many_unreadable_pictures_end_the_run(
    cached: bool, good: int, bad: int, main: Main, counted, flags, tmp_path: Path
):
    counted()
    folder = broken(tmp_path / "data", good, bad)
    code, said = main(
        *flags(train_data_dir=str(folder), max_train_steps="50"),
        "--cache-latents-text-encoder-outputs",
        str(cached),
    )
    assert code == 2, said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"{bad} of {good + bad} samples cannot be used" in error and "--max-bad-fraction" in error
    assert any(f"{i:02d}.png" in error for i in range(good, good + bad))
    assert sum(line.startswith("skipped ") for line in said.splitlines()) == bad


def test_out_of_memory_names_batch_and_remat_and_the_last_good_checkpoint(main: Main, counted, flags, tmp_path: Path):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
    counted(error_at=4, error=error)
    uncached = "--no-cache-latents-text-encoder-outputs"
    code, said = main(*flags(), uncached, "--checkpoint-every", "16", "--remat-policy", "dots")
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "--per-device-batch-size 1" in line and "--remat-policy dots" in line and "step 2" in line
    assert [p.name for p in (tmp_path / "outputs" / "run" / "checkpoints").iterdir()] == ["2"]


def test_more_steps_in_a_row_than_may_be_that_are_not_finite_end_the_run_before_they_are_saved(
    main: Main, counted, flags, tmp_path: Path
):
    counted(nan_at=4)
    uncached = "--no-cache-latents-text-encoder-outputs"
    code, said = main(*flags(), uncached, "--checkpoint-every", "16", "--max-nonfinite-steps", "0")
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "step 4: loss nan" in line and "--learning-rate" in line and "that of step 2" in line
    assert [p.name for p in (tmp_path / "outputs" / "run" / "checkpoints").iterdir()] == ["2"]
    assert not (tmp_path / "outputs" / "run" / "export").exists()


def test_a_step_that_is_not_finite_is_said_and_counted_and_not_saved(main: Main, counted, flags, tmp_path: Path):
    counted(nan_at=4)
    uncached = "--no-cache-latents-text-encoder-outputs"
    code, said = main(*flags(), uncached, "--checkpoint-every", "16")
    folder = tmp_path / "outputs" / "run"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert code == 0, said
    assert "step 4: loss nan, gradient norm 1.0: not finite, so that it changes nothing" in said
    assert "step 4 was not finite: no checkpoint is written of it" in said
    assert [record["learning/skipped_steps"] for record in records if "learning/loss" in record][3:] == [1, 1, 1]


def test_any_other_error_of_the_device_is_not_called_out_of_memory(main: Main, counted, flags):
    counted(error_at=1, error=jax.errors.JaxRuntimeError("INTERNAL: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main(*flags(), "--no-cache-latents-text-encoder-outputs")


def test_a_full_disk_costs_neither_the_last_good_checkpoint_nor_the_run(
    main: Main, counted, flags, tmp_path: Path, monkeypatch
):
    counted()
    usage = shutil.disk_usage(tmp_path)
    asked = []

    def full(path: Any) -> Any:
        asked.append(path)
        return usage if len(asked) == 1 else usage._replace(free=1000)

    uncached = "--no-cache-latents-text-encoder-outputs"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        code, said = main(*flags(), uncached, "--checkpoint-every", "16")
    assert code == 2, said
    assert "no checkpoint of step 4" in said and "the checkpoint of step 6" in said
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
    folder = tmp_path / "outputs" / "run"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["2"]
    assert not (folder / "export").exists()
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [*range(1, 7)]

    code, said = main(*flags(), uncached, "--checkpoint-every", "16")
    assert code == 0, said
    assert "at step 2 of 6" in said
    assert (folder / "export").is_dir()
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [*range(1, 7)]
