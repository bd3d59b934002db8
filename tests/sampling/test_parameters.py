"""How a picture was made: A1111's text, word for word and by its own rules."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_pictures import FULL, PLAIN, SAID, changed

from sdxl_eqx.sampling.parameters import (
    SAMPLERS,
    ControlNetUse,
    Parameters,
    parse_parameters,
    schedule_type,
    write_parameters,
)


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
    sampler, algorithm = draw(st.sampled_from([*SAMPLERS, ("DEISMultistepScheduler", "")]))
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
