"""Pictures that say how they were made: A1111's text, word for word and by its own rules, and files that last."""

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_eqx.sampling import png
from sdxl_eqx.sampling.png import (
    ControlNetUse,
    Parameters,
    grid_file,
    next_number,
    parse_parameters,
    picture_file,
    read_parameters,
    read_settings,
    save_png,
    schedule_type,
    write_parameters,
)

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
PLAIN = Parameters("a cat", "", 20, "EulerAncestralDiscreteScheduler", 7.0, 1, 1024, 768, version="")
FULL = Parameters(
    prompt="a cat, on a mat",
    negative_prompt="dog: brown\nbad",
    steps=30,
    sampler="DPMSolverMultistepScheduler",
    algorithm_type="sde-dpmsolver++",
    schedule_type="Karras",
    guidance_scale=6.5,
    seed=42,
    width=832,
    height=1216,
    prompt_2="oil, thick",
    guidance_rescale=0.7,
    model="sd_xl_base_1.0",
    model_hash="31e35c80fc",
    vae="sdxl_vae.safetensors",
    loras=(("pixel-art", 0.8), ("ink", 1.0)),
    controlnets=(ControlNetUse("canny-sdxl", "canny", 0.5, 0.0, 0.75),),
    denoising_strength=0.4,
    refiner="sd_xl_refiner_1.0",
    refiner_switch_at=0.8,
    version="sdxl_eqx 0.1.0",
)
SAID = (
    "a cat, on a mat <lora:pixel-art:0.8><lora:ink:1>\n"
    "Negative prompt: dog: brown\nbad\n"
    "Steps: 30, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 42, Size: 832x1216, "
    "Model hash: 31e35c80fc, Model: sd_xl_base_1.0, VAE: sdxl_vae.safetensors, Denoising strength: 0.4, "
    "CFG rescale: 0.7, Refiner: sd_xl_refiner_1.0, Refiner switch at: 0.8, "
    'ControlNet 0: "Module: canny, Model: canny-sdxl, Weight: 0.5, Guidance Start: 0, Guidance End: 0.75", '
    'Prompt 2: "oil, thick", Version: sdxl_eqx 0.1.0'
)


def changed(parameters: Parameters, **changes) -> Parameters:
    return Parameters(**{**parameters.__dict__, **changes})


def by_lines(text: str) -> str:
    """What A1111's form keeps of a prompt: lines without the spaces around them, and no empty ones at the ends."""
    return "\n".join(line.strip() for line in text.split("\n")).strip()


TEXT = st.text(
    st.sampled_from("ab ,:;\"\\'\n\r\t()<>[]{}é日🐱\u2028") | st.characters(exclude_categories=["Cs"]), max_size=30
)
PROMPT = TEXT.map(lambda text: by_lines(text.replace("\0", ""))).filter(
    lambda text: "Negative prompt:" not in text and "<lora:" not in text
)
VALUE = TEXT.map(lambda text: text.replace("\0", ""))
NAME = st.text(st.sampled_from('ab-_ .é"'), min_size=1, max_size=8)
SHARE = st.floats(0, 1)


@st.composite
def fields(draw) -> dict[str, Any]:
    sampler, algorithm = draw(st.sampled_from([*png.SAMPLERS, ("DEISMultistepScheduler", "")]))
    return dict(
        prompt=draw(PROMPT),
        negative_prompt=draw(PROMPT),
        steps=draw(st.integers(1, 1000)),
        sampler=sampler,
        algorithm_type=algorithm,
        schedule_type=draw(st.sampled_from(["Automatic", "Karras", "SGM Uniform"])),
        guidance_scale=draw(st.floats(0, 1e6)),
        seed=draw(st.integers(0, 2**63)),
        width=draw(st.integers(1, 9999)),
        height=draw(st.integers(1, 9999)),
        prompt_2=draw(VALUE),
        guidance_rescale=draw(SHARE),
        model=draw(VALUE),
        model_hash=draw(st.sampled_from(["", "31e35c80fc", "1234567890"])),
        vae=draw(VALUE),
        loras=tuple(draw(st.lists(st.tuples(NAME, st.floats(-4, 4)), max_size=3))),
        controlnets=tuple(draw(st.lists(st.builds(ControlNetUse, NAME, NAME, SHARE, SHARE, SHARE), max_size=2))),
        denoising_strength=draw(st.none() | SHARE),
        refiner=draw(VALUE),
        refiner_switch_at=draw(st.none() | SHARE),
        others=(("Clip skip", "2"), ("Hires upscaler", draw(VALUE.filter(bool)))),
        version=draw(VALUE),
    )


def theirs(text: str) -> dict[str, str]:
    """A1111's reading: its regular expressions, on the last line."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    pairs = pattern.findall(text.strip().split("\n")[-1])
    return {key: json.loads(value) if value[:1] == value[-1:] == '"' else value for key, value in pairs}


def test_the_text_is_a1111s():
    assert write_parameters(FULL) == SAID


def test_what_is_not_set_is_not_said():
    assert write_parameters(PLAIN) == (
        "a cat\nSteps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1, Size: 1024x768"
    )


@given(fields())
def test_what_is_written_is_read_back(fields: dict[str, Any]):
    made = Parameters(**fields)
    assert parse_parameters(write_parameters(made)) == made


@given(VALUE.filter(bool), VALUE.filter(bool))
def test_a1111_reads_every_value_whole(model: str, vae: str):
    said = theirs(write_parameters(changed(PLAIN, model=model, vae=vae)))
    assert (said["Model"], said["VAE"], said["Seed"]) == (model, vae, "1")


@pytest.mark.parametrize(
    "model, said",
    [
        ("a:b", '"a:b"'),
        ("a, b", '"a, b"'),
        ("a\nb", r'"a\nb"'),
        ("日,", '"日,"'),
        ('a"b', 'a"b'),
        ("a (b) [c]", "a (b) [c]"),
    ],
)
def test_values_are_quoted_as_a1111_quotes_them(model: str, said: str):
    assert write_parameters(changed(PLAIN, model=model)).endswith(f", Model: {said}")


def test_a_schedule_that_is_named_is_not_sought_in_the_samplers_name():
    made = changed(PLAIN, sampler="My Beta", schedule_type="Karras")
    assert parse_parameters(write_parameters(made)) == made


def test_a_picture_of_a1111_is_read():
    read = parse_parameters(
        "masterpiece <lora:add_detail:0.5>, a cat\nwith a hat\nNegative prompt: lowres,\n\nugly\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 3, Size: 512x768, Model hash: 6ce0161689, "
        'Model: v1-5, Clip skip: 2, Lora hashes: "add_detail: 7c6bad76eb54", Version: v1.5.1'
    )
    assert read.prompt == "masterpiece , a cat\nwith a hat"
    assert read.negative_prompt == "lowres,\n\nugly"
    assert (read.sampler, read.schedule_type, read.loras) == (
        "DPMSolverMultistepScheduler",
        "Karras",
        (("add_detail", 0.5),),
    )
    assert read.others == (("Clip skip", "2"), ("Lora hashes", "add_detail: 7c6bad76eb54"))
    assert (read.height, read.version) == (768, "v1.5.1")


@pytest.mark.parametrize(
    "text", ["", "a cat, a dog", "a cat\nSteps: many, Sampler: Euler, Seed: 1", "Steps: 3, Seed: 1"]
)
def test_a_text_that_says_nothing_of_the_kind_is_an_error(text: str):
    with pytest.raises(ValueError, match=r"settings|no number"):
        parse_parameters(text)


def test_a_name_cannot_end_its_tag():
    made = changed(PLAIN, loras=(("a:b>c", 1.0),), controlnets=(ControlNetUse("x, Weight: 9"),))
    read = parse_parameters(write_parameters(made))
    assert read.loras == (("a_b_c", 1.0),)
    assert read.controlnets == (ControlNetUse("x_ Weight_ 9"),)


def test_the_version_is_not_taken_for_a1111s_own():
    # A1111 switches old behaviour on for versions below its own, where it can read a number.
    assert re.match(r"v?\d", Parameters("", "", 1, "", 1.0, 0, 8, 8).version) is None


@pytest.mark.parametrize(
    "spacing, options, wanted",
    [
        ("leading", {}, "Automatic"),
        ("trailing", {}, "SGM Uniform"),
        ("linspace", {}, "Uniform"),
        ("trailing", {"use_karras_sigmas": True}, "Karras"),
        ("leading", {"use_exponential_sigmas": True}, "Exponential"),
        ("leading", {"use_beta_sigmas": True}, "Beta"),
    ],
)
def test_schedules_have_a1111s_names(spacing: str, options: dict[str, bool], wanted: str):
    assert schedule_type(spacing, **options) == wanted


@pytest.mark.parametrize("prompt, chunk", [("a café", b"tEXtparameters"), ("日本 🐱", b"iTXtparameters")])
def test_a_file_keeps_pixels_parameters_and_settings(tmp_path: Path, prompt: str, chunk: bytes):
    file = tmp_path / "new" / "one.png"
    made = changed(FULL, prompt=prompt)
    save_png(PICTURE, file, made, {"steps": 30, "size": (832, 1216), "where": Path("here")})
    np.testing.assert_array_equal(np.asarray(Image.open(file)), PICTURE)
    assert read_parameters(file) == made
    assert read_settings(file) == {"steps": 30, "size": [832, 1216], "where": "here"}
    assert chunk in file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["one.png"]


def test_no_secret_is_kept(tmp_path: Path):
    file = tmp_path / "one.png"
    url = "https://me:s3cret@host/a.png?sig=s3cret#s3cret"
    inner = {"hf_access_token": "s3cret", "api-key": "s3cret", "tokenizer": "kept", "keep_tokens": 2}
    settings = {"token": "s3cret", "parts": [inner], "image": f"see {url}"}
    save_png(PICTURE, file, PLAIN, settings)
    assert b"s3cret" not in file.read_bytes()
    assert read_settings(file) == {
        "parts": [{"tokenizer": "kept", "keep_tokens": 2}],
        "image": "see https://host/a.png",
    }


def test_text_that_no_file_can_hold_is_replaced(tmp_path: Path):
    file = tmp_path / "one.png"
    save_png(PICTURE, file, changed(PLAIN, prompt="a\0b\udc80"), {})
    assert read_parameters(file).prompt == "ab?"


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "one.png"
    save_png(PICTURE, file, PLAIN, {})
    before = file.read_bytes()

    def fail(self: Image.Image, where: Path, *args: object, **options: object) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(PICTURE, file, FULL, {})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_a_text_behind_the_pixels_is_found(tmp_path: Path):
    file = tmp_path / "one.png"
    Image.fromarray(PICTURE).save(file)
    chunk = b"tEXtparameters\0" + SAID.encode("latin-1")
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    pixels, end = file.read_bytes()[:-12], file.read_bytes()[-12:]
    file.write_bytes(pixels + whole + end)
    assert read_parameters(file) == FULL


@pytest.mark.parametrize("data", [b"", b"GIF89a", None])
def test_a_file_without_parameters_is_named(tmp_path: Path, data: bytes | None):
    file = tmp_path / "one.png"
    if data is None:
        Image.fromarray(PICTURE).save(file)
    else:
        file.write_bytes(data)
    for read in (read_parameters, read_settings):
        with pytest.raises(ValueError, match=r"one\.png"):
            read(file)


def test_a_sheet_of_several_pictures_has_settings_alone(tmp_path: Path):
    save_png(PICTURE, tmp_path / "grid.png", None, {"n": 4})
    assert read_settings(tmp_path / "grid.png") == {"n": 4}
    with pytest.raises(ValueError, match="holds no text"):
        read_parameters(tmp_path / "grid.png")


def test_numbers_go_on_after_the_highest(tmp_path: Path):
    assert next_number(tmp_path / "none") == 0
    assert grid_file(tmp_path).name == "grid-0000.png"
    for name in ("00002-77.png", "00010-1.png", "grid-0041.png", "99999x.png", "notes.txt", "00003.jpg"):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 11
    assert picture_file(tmp_path, 11, 5) == tmp_path / "00011-5.png"
    assert grid_file(tmp_path).name == "grid-0042.png"
