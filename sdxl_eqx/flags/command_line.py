"""The command lines of the scripts: flags over a YAML file over the published defaults, checked once."""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, get_args, get_origin

import tyro
import yaml

from sdxl_eqx.config import TINY, GenerateConfig, TrainConfig, flag, groups
from sdxl_eqx.flags.files import read
from sdxl_eqx.flags.names import (
    GENERATE_NAMES,
    LISTS,
    NAMES,
    READERS,
    SECRET,
    C,
    FlagError,
    Name,
    Names,
    merge,
    nearest,
    read_as,
)
from sdxl_eqx.flags.published import PUBLISHED, settle_data, settle_flags, today
from sdxl_eqx.flags.switches import check

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_FILE = REPOSITORY / TINY
"""What an empty command line runs."""

BOOLS = {"true": True, "false": False}


@dataclass(frozen=True)
class CommandLine(TrainConfig):
    """Train Stable Diffusion XL.

    Without any argument: `--config configs/tiny.yaml`, a small run for any machine.
    """

    config: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """YAML file of the names below, with underscores; flags win over it."""


@dataclass(frozen=True)
class GenerateLine(GenerateConfig):
    """Draw pictures with Stable Diffusion XL."""

    config: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """YAML file of the names below, with underscores; flags win over it. That of a training run will do."""


READING = tyro.constructors.ConstructorRegistry()
"""Has tyro read every type as files are read; a Boolean is two flags, which is tyro's own."""


@READING.primitive_rule
def _as_text(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    # tyro may have written a tuple anew, as typing.Tuple, which equals no tuple[...].
    wanted = GenericAlias(tuple, get_args(info.type)) if get_origin(info.type) is tuple else info.type
    if wanted is bool or wanted not in READERS:
        return None
    reader = READERS[wanted]
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=reader.metavar,
        instance_from_str=lambda words: reader.read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_inline(value) if isinstance(value, tuple) else str(value)],
    )


def _inline(value: tuple[Any, ...]) -> str:
    return json.dumps(value).replace('"', "")


def parse(argv: Sequence[str]) -> TrainConfig:
    """The checked config of a training command line. Nothing given means `--config configs/tiny.yaml`.

    Raises:
        SystemExit: 2 after one message on stderr where the flags or the file are wrong; 0 after `--help`.
    """
    return _or_exit(_parse, argv)


def parse_generate(argv: Sequence[str]) -> GenerateConfig:
    """The checked config of a command line that draws pictures.

    Raises:
        SystemExit: 2 after one message on stderr where the flags or the file are wrong; 0 after `--help`.
    """
    return _or_exit(_parse_generate, argv)


def _or_exit(read: Callable[[Sequence[str]], C], argv: Sequence[str]) -> C:
    try:
        return read(argv)
    except FlagError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def _parse(argv: Sequence[str]) -> TrainConfig:
    if not argv:
        if not TINY_FILE.is_file():
            raise FlagError(
                f"without arguments {TINY} is run, but that comes with a checkout of the repository and is not part of "
                "an installed package: name your own with --config FILE, or see --help"
            )
        argv = ["--config", str(TINY_FILE)]
    return _config(argv, TrainConfig(), NAMES, CommandLine, "scripts/train.py", elsewhere=None)


def _parse_generate(argv: Sequence[str]) -> GenerateConfig:
    return _config(argv, GenerateConfig(), GENERATE_NAMES, GenerateLine, "scripts/generate.py", elsewhere=NAMES)


def _config(
    argv: Sequence[str], default: C, names: Names, line: Callable[..., Any], script: str, *, elsewhere: Names | None
) -> C:
    trains = names is NAMES
    args, given, old, file = _words(argv, names, trains=trains)
    values = read(file, names, elsewhere=elsewhere) if file else {}
    secret = values.pop(SECRET, "")  # kept from tyro, whose help shows defaults
    shown = line(**groups(merge(default, values)))
    parsed = tyro.cli(line, prog=script, args=args, default=shown, registry=READING)
    flags = {key: getattr(getattr(parsed, names[key].group), names[key].field) for key in given}
    flags |= settle_flags(old, given)
    if trains:
        values = settle_data(file, values, flags)
    config = merge(merge(default, values), {SECRET: secret, **flags})
    check(config, file, values, flags)
    return config


def _words(argv: Sequence[str], names: Names, *, trains: bool) -> tuple[list[str], set[str], dict[str, Any], str]:
    """The arguments in the one form tyro is given (`--name=value`, `--x` or `--no-x`), the keys given, the YAML file.

    Before the file stand the values of published names, which tyro knows nothing of.
    No message repeats a value that belongs to no flag: it may be a misplaced token.
    """
    args: list[str] = []
    given: set[str] = set()
    old: dict[str, Any] = {}
    file = last = ""
    if trains:
        names = {**names, **{key: published.name for key, published in PUBLISHED.items()}}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            args.append("--help")
            continue
        if not word.startswith("--"):
            raise FlagError(_stray(word, last, names))
        shown, equals, value = word.partition("=")
        key = shown.removeprefix("--").replace("-", "_")
        negated = _negated(key, names)
        name = names.get(negated or key)
        last = shown
        if name is None and key != "config":
            raise FlagError(f"{shown}: no such flag{nearest(key, [*names, 'config'], as_flag=True)}")
        if name is not None and name.type is bool:
            if not negated and not equals and words and words[0].lower() in BOOLS:
                equals, value = "=", words.pop(0)
            if equals and (negated or value.lower() not in BOOLS):
                raise FlagError(f"{shown} {value!r}: {_forms(name)}")
            on = BOOLS[value.lower()] if equals else not negated
            if trains and name.key in PUBLISHED:
                old[name.key] = on
                continue
            args.append(name.flag if on else f"--no-{name.flag[2:]}")
            given.add(name.key)
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise FlagError(f"{shown}: a value must follow; one that begins with -- is written {shown}=--VALUE")
            value = words.pop(0)
            more = len(words) and name is not None and name.type in LISTS and not value.lstrip().startswith("[")
            if more and not words[0].startswith("--"):
                following = [value]
                while words and not words[0].startswith("--"):
                    following.append(words.pop(0))
                value = yaml.safe_dump(following, default_flow_style=True, width=math.inf).strip()
        if name is None:
            if file or not value:
                raise FlagError("--config: give one YAML file, once; flags win over it")
            file = value
            continue
        value = today(name.key, value) if trains else value
        try:
            found = read_as(name, value)
        except ValueError as rule:
            raise FlagError(f"{name.flag} {value!r}: {rule}") from None
        if trains and name.key in PUBLISHED:
            old[name.key] = found
            continue
        args.append(f"{name.flag}={value}")
        given.add(name.key)
    return args, given, old, file


def _negated(key: str, names: Names) -> str:
    """The Boolean key that `no_KEY` turns off, or ''."""
    positive = key.removeprefix("no_")
    return positive if positive != key and positive in names and names[positive].type is bool else ""


def _forms(name: Name) -> str:
    return f"write one of {name.flag}, --no-{name.flag[2:]}, {name.flag} True and {name.flag} False"


def _stray(word: str, last: str, names: Names) -> str:
    """What to say of a word that is neither a flag nor the value of one."""
    key, equals, value = word.partition("=")
    if equals and re.fullmatch(r"[A-Za-z_][\w.-]*", key):
        name = names.get(key.replace("-", "_"))
        known = name is not None and name.key != SECRET
        form = f"{name.flag if name else flag(key)} {value if known else 'VALUE'}"
        return f"{key}={value if known else '...'}: write {form}{'' if name else nearest(key, names, as_flag=True)}"
    if word.lower().endswith((".yml", ".yaml")):
        return f"{word}: write --config {word}"
    key = last[2:].replace("-", "_")
    before = names.get(_negated(key, names) or key)
    if before is not None and before.type is bool:
        return f"{last}: {_forms(before)}"
    if last:
        return f"{last}: more than one value follows; put quotes around a value with spaces"
    return "the command line begins with a value that belongs to no flag: write --NAME VALUE, see --help for the names"
