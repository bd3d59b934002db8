"""Files of prompts: kohya's form, JSON lines, and errors that say where and why."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_eqx.sampling.prompts import MAX_SEED, PromptLine, read_prompts


def prompts(folder: Path, text: str | bytes, name: str = "prompts.txt") -> list[PromptLine]:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts(str(file))


def test_each_line_is_a_prompt_but_blank_ones_and_comments(tmp_path: Path):
    read = prompts(tmp_path, "\ufeffa cat\r\n\n  # no\n#no\n  a dog, #1 \n \nlast\u2028one")
    assert read == [PromptLine("a cat", 1), PromptLine("a dog, #1", 5), PromptLine("last\u2028one", 7)]


def test_kohyas_options_are_read(tmp_path: Path):
    line = "a (cat:1.2), -- sitting --n dog, low-res --w 1024 --H 768 --d 42 --l 7 --s 28 --i in put.png --t 0.5"
    assert prompts(tmp_path, line) == [
        PromptLine(
            "a (cat:1.2), -- sitting",
            1,
            negative_prompt="dog, low-res",
            width=1024,
            height=768,
            seed=42,
            guidance_scale=7.0,
            steps=28,
            image="in put.png",
            strength=0.5,
        )
    ]


def test_a_line_of_options_alone_has_an_empty_prompt(tmp_path: Path):
    assert prompts(tmp_path, "--d 1\na --n") == [PromptLine("", 1, seed=1), PromptLine("a", 2, negative_prompt="")]


def test_words_with_hyphens_are_no_options(tmp_path: Path):
    assert prompts(tmp_path, "well--known --n a--b")[0] == PromptLine("well--known", 1, negative_prompt="a--b")


TEXT = st.text(max_size=12)


@given(
    st.builds(
        dict,
        prompt=TEXT,
        negative_prompt=st.none() | TEXT,
        prompt_2=st.none() | TEXT,
        seed=st.none() | st.integers(0, MAX_SEED),
        width=st.none() | st.integers(1, 99).map(lambda x: 8 * x),
        height=st.none() | st.integers(1, 99).map(lambda x: 8 * x),
        steps=st.none() | st.integers(1, 1000),
        guidance_scale=st.none() | st.floats(0, 100),
        image=st.none() | st.text(min_size=1, max_size=5),
        strength=st.none() | st.floats(0.01, 1),
    ),
    st.booleans(),
)
def test_json_lines_are_read_back(tmp_path_factory: pytest.TempPathFactory, fields: dict, ascii_only: bool):
    line = json.dumps(fields, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        line.decode()
    except UnicodeDecodeError:
        return  # lone surrogates, which no file in UTF-8 holds
    read = prompts(tmp_path_factory.getbasetemp(), b"\n" + line + b"\n", "prompts.jsonl")
    assert read == [PromptLine(line=2, **fields)]
    assert {**asdict(read[0]), **fields} == asdict(read[0])


def test_a_whole_number_serves_as_a_guidance_scale(tmp_path: Path):
    read = prompts(tmp_path, '{"prompt": "a", "guidance_scale": 7, "strength": 1}', "PROMPTS.JSONL")
    assert (read[0].guidance_scale, read[0].strength) == (7.0, 1.0)


@pytest.mark.parametrize(
    "line, said",
    [
        ("a --w 1023", r"line 2: width must be a multiple of 8 above 0, not 1023"),
        ("a --h 0", r"height must be a multiple of 8"),
        ("a --w wide", r"--w 'wide' \(width\) must be a whole number"),
        ("a --s 0", r"steps must be a whole number from 1 to 1000"),
        ("a --s", r"--s '' \(steps\)"),
        ("a --d 1,2", r"--d '1,2' \(seed\) must be a whole number"),
        ("a --d 4294967296", r"seed must be a whole number from 0 to 4294967295"),
        ("a --l high", r"--l 'high' \(guidance_scale\) must be a number"),
        ("a --l nan", r"guidance_scale must be a number of 0 or more"),
        ("a --l inf", r"guidance_scale must be"),
        ("a --t 0", r"strength must be a number above 0"),
        ("a --t 1.5", r"strength must be a number above 0"),
        ("a --i", r"image must be a path or URL"),
        ("a --nl 3", r"--nl is no option of a prompt; there are --n \(negative_prompt\)"),
        ("a --prompt b", r"--prompt is no option"),
        ("a --s 3 --S 4", r"--S is there twice"),
    ],
)
def test_a_line_of_text_that_breaks_a_rule_is_named(tmp_path: Path, line: str, said: str):
    with pytest.raises(ValueError, match=r"prompts\.txt, line 2: .*" + said.removeprefix("line 2: ")):
        prompts(tmp_path, f"fine\n{line}\nfine")


@pytest.mark.parametrize(
    "line, said",
    [
        ("a cat", "is no JSON"),
        ("# a comment", "is no JSON"),
        ('["a"]', "must be an object with a text under 'prompt'"),
        ('{"seed": 1}', "must be an object with a text under 'prompt'"),
        ('{"prompt": null}', "must be an object with a text under 'prompt'"),
        ('{"prompt": "a", "sede": 1}', "'sede' is no key of a prompt; there are prompt, negative_prompt"),
        ('{"prompt": "a", "line": 1}', "'line' is no key"),
        ('{"prompt": "a", "seed": true}', "seed must be a whole number"),
        ('{"prompt": "a", "seed": 1.0}', "seed must be a whole number"),
        ('{"prompt": "a", "width": "8"}', "width must be a multiple of 8"),
        ('{"prompt": "a", "guidance_scale": true}', "guidance_scale must be a number"),
        ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale must be a number"),
        ('{"prompt": "a", "negative_prompt": 3}', "negative_prompt must be a text"),
        ('{"prompt": "a", "image": ""}', "image must be a path"),
    ],
)
def test_a_line_of_json_that_breaks_a_rule_is_named(tmp_path: Path, line: str, said: str):
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: .*" + said):
        prompts(tmp_path, f'{{"prompt": "fine"}}\n{line}', "prompts.jsonl")


@pytest.mark.parametrize("text, said", [(b"\n# no\n", "holds no prompt"), (b"", "no prompt"), (b"\xff\xfe", "UTF-8")])
def test_a_file_without_prompts_is_named(tmp_path: Path, text: bytes, said: str):
    with pytest.raises(ValueError, match=rf"prompts\.txt: .*{said}"):
        prompts(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.txt: the prompts cannot be read"):
        read_prompts(str(tmp_path / "none.txt"))
