"""What `scripts/generate.py` asks for, in which order and batches, and what each picture's file says of it."""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_folder import OWN

from sdxl_eqx.config import GenerateConfig
from sdxl_eqx.flags import merge, parse_generate
from sdxl_eqx.generation import Pipeline, script
from sdxl_eqx.generation.script import batches_of, draw_pictures, jobs_of, lines_of, parameters_of, settings_of
from sdxl_eqx.sampling.parameters import Parameters, parse_parameters
from sdxl_eqx.sampling.png import PARAMETERS, SETTINGS

TOKEN = "hf_topsecret"

Call = tuple[list[str], list[int], tuple[int, int]]
"""Prompts, seeds and size of one batch."""


def jobs(values: dict[str, Any]) -> list[script.Job]:
    """The jobs of a config with those values."""
    config = merge(GenerateConfig(), values)
    return jobs_of(config, lines_of(config))


@pytest.fixture
def prompts_file(tmp_path: Path) -> Callable[..., str]:
    """Writes a file of prompts and returns its path."""

    def write(text: str, name: str = "prompts.txt") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def calls(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The batches drawn, of which none costs a compilation: the pictures are noise that follows from the seed."""
    seen: list[Call] = []

    def draw(self: Pipeline, config: Any, prompts: Any, seeds: Sequence[int], size: Any, **beside: Any) -> np.ndarray:
        seen.append(([prompt.prompt for prompt in prompts], list(seeds), size))
        return np.stack([np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8) for seed in seeds])

    def of(config: GenerateConfig) -> Pipeline:
        return dataclasses.replace(pipeline, config=config)

    monkeypatch.setattr(Pipeline, "draw", draw)
    monkeypatch.setattr(Pipeline, "of", of)
    return seen


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that loads the model."""

    def never(config: GenerateConfig) -> Pipeline:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(Pipeline, "of", never)


def asked(folder: Path, **values: Any) -> GenerateConfig:
    """A config that writes into a folder."""
    config = merge(GenerateConfig(), {"images_dir": str(folder), **values})
    config.check()
    return config


# Jobs


def test_a_prompt_is_drawn_with_a_seed_and_those_that_follow():
    found = jobs({"prompt": "a fox", "seed": 5, "num_images_per_prompt": 3})
    assert [(job.text, job.seed) for job in found] == [("a fox", 5), ("a fox", 6), ("a fox", 7)]
    assert [job.seed for job in jobs({"seed": 2**32 - 1, "num_images_per_prompt": 2})] == [2**32 - 1, 0]


def test_every_line_of_a_file_is_drawn_and_says_what_is_its_own(prompts_file: Callable[..., str]):
    file = prompts_file("# two\na fox --d 9 --w 64 --h 32 --s 3 --l 2.5 --n dog\n\na castle\n")
    found = jobs({"prompts_file": file, "prompt": "unused", "seed": 1, "width": 128, "num_images_per_prompt": 2})
    assert [(job.text, job.seed) for job in found] == [("a fox", 9), ("a fox", 10), ("a castle", 1), ("a castle", 2)]
    pictures = [job.config.picture for job in found[1:3]]
    assert [(p.width, p.height, p.num_inference_steps) for p in pictures] == [(64, 32, 3), (128, 0, 20)]
    assert [(p.guidance_scale, p.negative_prompt) for p in pictures] == [(2.5, "dog"), (9.0, "")]


def test_lines_of_json_say_the_rest(prompts_file: Callable[..., str]):
    line = {"prompt": "a fox", "prompt_2": "oil", "image": "a.png", "strength": 0.5, "steps": 4, "seed": 0}
    (job,) = jobs({"prompts_file": prompts_file(json.dumps(line), "p.jsonl"), "seed": 7})
    picture = job.config.picture
    assert (job.seed, picture.prompt_2, picture.image, picture.strength) == (0, "oil", "a.png", 0.5)
    assert picture.num_inference_steps == 4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a fox\na cat --w 12\n", ["line 2", "width must be a multiple of 8", "12"]),
        ("a fox --x 3\n", ["line 1", "--x is no option"]),
        ("a fox --d -1\n", ["line 1", "seed must be"]),
        ("\n# none\n", ["holds no prompt"]),
    ],
)
def test_a_wrong_file_of_prompts_is_refused_with_file_and_line(
    text: str, parts: list[str], prompts_file: Callable[..., str], tmp_path: Path, unloaded: None
):
    file = prompts_file(text)
    with pytest.raises(ValueError) as error:
        draw_pictures(asked(tmp_path, prompts_file=file))
    assert all(part in str(error.value) for part in [file, *parts]), str(error.value)


def test_what_a_line_makes_of_the_config_is_checked_with_file_and_line(
    prompts_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    file = prompts_file("a fox\na cat --l 3\n")
    monkeypatch.setattr(script, "read_prompts", lambda file: [script.PromptLine("a cat", 2, guidance_scale=-1.0)])
    with pytest.raises(ValueError, match=r"prompts\.txt, line 2: --guidance-scale -1\.0: must be"):
        jobs({"prompts_file": file})


def test_a_file_of_prompts_is_read_once(
    prompts_file: Callable[..., str], calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read, reads = script.read_prompts, []
    monkeypatch.setattr(script, "read_prompts", lambda file: (reads.append(file), read(file))[1])
    draw_pictures(asked(tmp_path / "out", prompts_file=prompts_file("a fox\n")))
    assert len(reads) == len(calls) == 1


# Batches


def batches(values: dict[str, Any], size: int) -> list[list[tuple[str, int]]]:
    """Prompts and seeds of the batches of a config."""
    return [[(job.text, job.seed) for job in batch] for batch in batches_of(jobs(values), size)]


def test_a_batch_holds_as_many_as_are_asked_for_in_order(prompts_file: Callable[..., str]):
    file = prompts_file("a --n x\nb\nc --d 7\n")
    found = batches({"prompts_file": file, "num_images_per_prompt": 2}, 4)
    assert found == [[("a", 0), ("a", 1), ("b", 0), ("b", 1)], [("c", 7), ("c", 8)]]
    assert batches({"prompts_file": file}, 1) == [[("a", 0)], [("b", 0)], [("c", 7)]]


@pytest.mark.parametrize("option", ["--w 64", "--h 64", "--s 3", "--l 2", "--i a.png", "--i a.png --t 0.5"])
def test_what_is_drawn_otherwise_begins_a_batch_and_the_order_stays(option: str, prompts_file: Callable[..., str]):
    file = prompts_file(f"a\nb {option}\nc {option}\nd\n")
    assert batches({"prompts_file": file}, 8) == [[("a", 0)], [("b", 0), ("c", 0)], [("d", 0)]]


def test_no_jobs_are_no_batches():
    assert list(batches_of([], 4)) == []


# Files


def test_pictures_are_numbered_on_from_the_highest(calls: list[Call], tmp_path: Path):
    config = asked(tmp_path / "out", prompt="a fox", seed=3, num_images_per_prompt=2, width=16, height=24)
    assert [file.name for file in draw_pictures(config)] == ["00000-3.png", "00001-4.png"]
    (tmp_path / "out" / "00007-1.png").write_bytes(b"")
    files = draw_pictures(config)
    assert [file.name for file in files] == ["00008-3.png", "00009-4.png"]
    assert calls == [(["a fox", "a fox"], [3, 4], (24, 16))] * 2
    with Image.open(files[0]) as picture:
        assert picture.size == (16, 24)
        expected = np.random.default_rng(3).integers(0, 256, (24, 16, 3), np.uint8)
        np.testing.assert_array_equal(np.asarray(picture), expected)


def test_batch_size_is_as_asked_and_else_one_a_device(calls: list[Call], tmp_path: Path):
    draw_pictures(asked(tmp_path, num_images_per_prompt=10))
    draw_pictures(asked(tmp_path, num_images_per_prompt=10, batch_size=5))
    assert [len(seeds) for _, seeds, _ in calls] == [8, 2, 5, 5]
    assert calls[0][2] == (OWN, OWN)


def texts(file: Path) -> dict[str, str]:
    """The texts of a PNG."""
    with Image.open(file) as picture:
        return {str(key): text for key, text in picture.info.items() if isinstance(text, str)}


def test_a_picture_says_all_of_how_it_was_made_and_not_the_token(
    calls: list[Call], prompts_file: Callable[..., str], tmp_path: Path, folder: Path
):
    file = prompts_file("a fox, oil --n blurry, grey --d 9 --s 3 --l 2.5\n")
    values = {
        "prompts_file": file, "hf_access_token": TOKEN, "guidance_rescale": 0.5, "prompt_2": "paint",
        "pretrained_model_name_or_path": str(folder), "vae_checkpoint": "vaes/fixed.safetensors",
        "image": "https://user:pass@example.com/a.png?sig=secret", "strength": 0.4, "grid": True,
        "lora_config.lora_model_name_or_path": ("loras/style.safetensors", "owner/repo"),
        "lora_config.weight_name": ("", "line.safetensors"), "lora_config.scale": (0.8, 0.5),
        "unet_checkpoint": "runs/mine",
    }  # fmt: skip
    pixels = np.zeros((8, 8, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "open_image", lambda where, **_: pixels)
        first, sheet = draw_pictures(asked(tmp_path / "out", **values))
    found = texts(first)
    assert set(found) == {PARAMETERS, SETTINGS}
    assert parse_parameters(found[PARAMETERS]) == Parameters(
        prompt="a fox, oil",
        negative_prompt="blurry, grey",
        prompt_2="paint",
        steps=3,
        sampler="EulerDiscreteScheduler",
        schedule_type="Automatic",
        guidance_scale=2.5,
        guidance_rescale=0.5,
        seed=9,
        width=OWN,
        height=OWN,
        model="small-sdxl",
        vae="fixed",
        loras=(("style", 0.8), ("line", 0.5)),
        denoising_strength=0.4,
        others=(("UNet", "mine"),),
    )
    settings = json.loads(found[SETTINGS])
    assert (settings["prompt"], settings["seed"], settings["num_inference_steps"]) == ("a fox, oil", 9, 3)
    assert settings["image"] == "https://example.com/a.png"
    assert set(texts(sheet)) == {SETTINGS}
    for text in (*found.values(), *texts(sheet).values()):
        assert not any(secret in text for secret in (TOKEN, "hf_access_token", "user:pass", "sig=secret"))


def test_the_settings_of_a_picture_are_a_config_that_draws_it_alone(
    prompts_file: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    values = {"prompts_file": prompts_file("a\nb --w 64 --s 3\n"), "num_images_per_prompt": 3, "grid": True}
    job = jobs({**values, "original_size": (64, 32), "lora_config.lora_model_name_or_path": ("x, y",)})[4]
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings_of(job)))
    config = parse_generate(["--config", str(file)])
    (again,) = jobs_of(config, lines_of(config))
    assert (again.text, again.seed) == (job.text, job.seed) == ("b", 1)
    assert settings_of(again) == settings_of(job)
    assert again.config.picture.width == 64 and not again.config.output.grid
    assert not caplog.records


def test_parameters_leave_out_what_had_no_part(pipeline: Pipeline):
    (job,) = jobs({"negative_prompt": "grey", "do_classifier_free_guidance": False, "prompt": "a"})
    found = parameters_of(pipeline, job, (16, 24))
    assert (found.width, found.height, found.guidance_scale, found.negative_prompt) == (24, 16, 1.0, "")
    assert (found.denoising_strength, found.refiner, found.controlnets, found.loras) == (None, "", (), ())


def test_parameters_name_sampler_refiner_and_controlnets(pipeline: Pipeline):
    scheduler = dataclasses.replace(
        pipeline.models.scheduler,
        name="DPMSolverMultistepScheduler",
        algorithm_type="sde-dpmsolver++",
        use_karras_sigmas=True,
    )
    sampled = dataclasses.replace(pipeline, models=dataclasses.replace(pipeline.models, scheduler=scheduler))
    values = {
        "refiner_model_name_or_path": "models/refiner.safetensors", "refiner_fraction": 0.25,
        "controlnet_model_name_or_path": ("nets/canny", "nets/depth"), "controlnet_image": ("a.png",),
        "controlnet_conditioning_scale": (0.7,), "control_guidance_end": (0.5, 1.0), "controlnet_canny": True,
        "image": "a.png", "mask_image": "m.png", "lightning_repo": "r", "lightning_ckpt": "l.safetensors",
    }  # fmt: skip
    (job,) = jobs(values)
    found = parameters_of(sampled, job, (16, 16))
    assert (found.algorithm_type, found.schedule_type) == ("sde-dpmsolver++", "Karras")
    assert (found.refiner, found.refiner_switch_at, found.denoising_strength) == ("refiner", 0.75, 0.9999)
    nets = [(net.model, net.module, net.weight, net.start, net.end) for net in found.controlnets]
    assert nets == [("canny", "canny", 0.7, 0.0, 0.5), ("depth", "canny", 0.7, 0.0, 1.0)]
    assert found.others == (("Lightning", "l.safetensors"),)


# The sheet


def test_a_sheet_holds_all_pictures(calls: list[Call], tmp_path: Path):
    *files, sheet = draw_pictures(asked(tmp_path, num_images_per_prompt=3, batch_size=2, grid=True))
    assert (len(files), sheet.name) == (3, "grid-0000.png")
    with Image.open(sheet) as image:
        assert image.size == (2 * OWN, 2 * OWN)
        corner = np.asarray(image)[OWN:, :OWN]
    with Image.open(files[2]) as picture:
        np.testing.assert_array_equal(corner, np.asarray(picture))


def test_pictures_of_several_sizes_on_one_sheet_are_refused_before_the_model_is_loaded(
    prompts_file: Callable[..., str], tmp_path: Path, unloaded: None
):
    file = prompts_file("a --w 64 --h 64\nb --w 64 --h 32\n")
    with pytest.raises(ValueError, match=r"^--grid: the pictures are of several sizes \(64x64, 64x32\); leave it out"):
        draw_pictures(asked(tmp_path / "out", prompts_file=file, grid=True))


def test_the_models_own_size_counts_too_before_anything_is_drawn(
    prompts_file: Callable[..., str], calls: list[Call], tmp_path: Path
):
    file = prompts_file(f"a\nb --w {OWN} --h {OWN + 8}\n")
    with pytest.raises(ValueError, match=rf"\({OWN}x{OWN}, {OWN}x{OWN + 8}\)"):
        draw_pictures(asked(tmp_path / "out", prompts_file=file, grid=True))
    assert not calls and not (tmp_path / "out").exists()
    assert len(draw_pictures(asked(tmp_path / "out", prompts_file=file))) == 2
    same = prompts_file(f"a\nb --w {OWN} --h {OWN}\n")
    assert len(draw_pictures(asked(tmp_path / "out", prompts_file=same, grid=True))) == 3


# Pictures that steer


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The URL of a page where a picture was asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>no picture</html>")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/a.png"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--image", lambda url: {"image": url}),
        ("--mask-image", lambda url: {"image": "", "mask_image": url}),
        ("--controlnet-image", lambda url: {"controlnet_image": (url,), "controlnet_model_name_or_path": ("n",)}),
    ],
)
def test_a_url_that_is_no_picture_is_refused_before_the_model_is_loaded(
    flag: str, values: Callable[[str], dict[str, Any]], page: str, tmp_path: Path, unloaded: None
):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = values(page)
    if "mask_image" in found:
        found["image"] = str(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"^{flag} {page}\S*: is no picture that can be read .*text/html"):
        draw_pictures(asked(tmp_path, **found))


def test_a_picture_that_a_line_names_is_read_before_the_model_is_loaded(
    prompts_file: Callable[..., str], tmp_path: Path, unloaded: None
):
    file = prompts_file(f"a\nb --i {tmp_path}/nowhere.png\n")
    with pytest.raises(ValueError, match=r"nowhere\.png: cannot be read"):
        draw_pictures(asked(tmp_path, prompts_file=file))


def test_every_line_gets_its_picture_and_the_mask_goes_with_pictures_alone(
    prompts_file: Callable[..., str], calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, grey in (("a", 10), ("b", 20), ("mask", 255)):
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / f"{name}.png")
    shown: list[tuple[Any, Any]] = []
    draw = Pipeline.draw

    def seen(self: Pipeline, *args: Any, image: Any, mask: Any, hints: Any) -> np.ndarray:
        shown.append((None if image is None else int(image[0, 0, 0]), None if mask is None else int(mask[0, 0])))
        return draw(self, *args)

    monkeypatch.setattr(Pipeline, "draw", seen)
    file = prompts_file(f"p --i {tmp_path}/a.png\nq --i {tmp_path}/b.png\nr\n")
    draw_pictures(asked(tmp_path / "out", prompts_file=file, mask_image=str(tmp_path / "mask.png")))
    assert shown == [(10, 255), (20, 255), (None, None)]


def test_each_picture_is_said_with_its_file_and_prompt(
    calls: list[Call], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "sdxl_eqx")
    (file,) = draw_pictures(asked(tmp_path, prompt="a fox", hf_access_token=TOKEN))
    assert [line for line in caplog.messages if line.startswith(str(file)) and line.endswith("a fox")]
    assert TOKEN not in caplog.text
