"""Files of prompts: text with one a line and kohya's options at its end, or JSON lines."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_eqx.data.sources.files import Files

MAX_SEED = 2**32 - 1
"""Larger seeds would begin again at 0: JAX's keys hold 32 bits of them."""

OPTIONS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "l": "guidance_scale",
    "s": "steps",
    "i": "image",
    "t": "strength",
}
"""What kohya's options mean (sd-scripts, docs/gen_img_README.md); letters may be capitals."""

_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True)
class PromptLine:
    """A prompt and what its line says of its picture; what it does not say is None."""

    prompt: str
    line: int
    """Counted from 1."""
    negative_prompt: str | None = None
    prompt_2: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    image: str | None = None
    """The picture to begin from."""
    strength: float | None = None
    """How much of that picture is drawn anew, above 0 and at most 1."""


def read_prompts(file: str) -> list[PromptLine]:
    """The prompts of a file, local or remote, in its order.

    In a text each line is a prompt, perhaps with kohya's options behind it (`a cat --n dog --w 1024 --h 768 --d 7
    --l 5.5 --s 30 --i cat.png --t 0.6`); blank lines and those that begin with # are passed over. In a `.jsonl` each
    line is an object with the fields of `PromptLine`, of which only `prompt` has to be there.

    Raises:
        ValueError: it cannot be read or holds no prompt, or a line breaks a rule; with file, line, value and rule.
    """
    try:
        text = Files().read(file).decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file}: the prompts cannot be read ({error}); give a text or .jsonl file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is no text in UTF-8 ({error}); save it as one") from error
    parse = _json_line if file.lower().endswith(".jsonl") else _text_line
    prompts = []
    # Only line feeds end a line: prompts and JSON strings may hold the other separators that str.splitlines knows.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or (line.startswith("#") and parse is _text_line):
            continue
        try:
            prompts.append(_checked(parse(line), number))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"{file}: holds no prompt; write one a line")
    return prompts


def _text_line(line: str) -> dict[str, Any]:
    """Fields of a line of text."""
    prompt, *options = _OPTION.split(line)
    fields: dict[str, Any] = {"prompt": prompt.strip()}
    for option in options:
        letter, _, value = option.strip().partition(" ")
        name = OPTIONS.get(letter.lower())
        if name is None:
            known = ", ".join(f"--{letter} ({name})" for letter, name in OPTIONS.items())
            raise ValueError(f"--{letter} is no option of a prompt; there are {known}")
        if name in fields:
            raise ValueError(f"--{letter} is there twice; take one away")
        fields[name] = _converted(letter, name, value.strip())
    return fields


def _converted(letter: str, name: str, value: str) -> Any:
    """An option's value in its type."""
    kind: Callable[[str], Any] = {**dict.fromkeys(_WHOLE, int), **dict.fromkeys(_REAL, float)}.get(name, str)
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"--{letter} {value!r} ({name}) must be {what}") from None


def _json_line(line: str) -> dict[str, Any]:
    """Fields of a line of JSON."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f'is no JSON ({error}); write an object such as {{"prompt": "a cat"}}') from error
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ValueError('must be an object with a text under \'prompt\', such as {"prompt": "a cat"}')
    unknown = sorted(fields.keys() - _RULES.keys() - {"prompt"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no key of a prompt; there are prompt, {', '.join(_RULES)}")
    # A whole number may stand where a real one is asked for.
    return {k: float(v) if k in _REAL and type(v) is int else v for k, v in fields.items() if v is not None}


def _checked(fields: Mapping[str, Any], line: int) -> PromptLine:
    for name, value in fields.items():
        if name != "prompt" and not _RULES[name][0](value):
            raise ValueError(f"{name} must be {_RULES[name][1]}, not {value!r}")
    return PromptLine(line=line, **fields)


_WHOLE = ("seed", "width", "height", "steps")
_REAL = ("guidance_scale", "strength")

_SIDE = (lambda x: type(x) is int and x > 0 and x % 8 == 0, "a multiple of 8 above 0")
_TEXT = (lambda x: isinstance(x, str), "a text")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "negative_prompt": _TEXT,
    "prompt_2": _TEXT,
    "seed": (lambda x: type(x) is int and 0 <= x <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}"),
    "width": _SIDE,
    "height": _SIDE,
    "steps": (lambda x: type(x) is int and 1 <= x <= 1000, "a whole number from 1 to 1000"),
    "guidance_scale": (lambda x: type(x) is float and math.isfinite(x) and x >= 0, "a number of 0 or more"),
    "image": (lambda x: isinstance(x, str) and x != "", "a path or URL"),
    "strength": (lambda x: type(x) is float and 0 < x <= 1, "a number above 0 and at most 1"),
}
"""What each field but the prompt must be."""
