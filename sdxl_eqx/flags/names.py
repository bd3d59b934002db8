"""Every published name, what a text means as its type, and what to say of a name that there is not."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from sdxl_eqx.config import GenerateConfig, TrainConfig, flag, groups, is_flat
from sdxl_eqx.config.generate import Pair, Span
from sdxl_eqx.config.shared import Axes, AxisRules, Bools, Floats, Texts

SECRET = "hf_access_token"
"""The key whose value no message shows."""


class FlagError(ValueError):
    """A command line or YAML file that cannot be run: what was given, the rule and the remedy, in one message."""


@dataclass(frozen=True)
class Name:
    """A published name: where its value lies in a config and of which type it is."""

    group: str
    field: str
    type: Any

    @property
    def key(self) -> str:
        """The name in YAML; a dot stands before the keys of a mapping."""
        return self.field if is_flat(self.group) else f"{self.group}.{self.field}"

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return flag(self.key)


Names = Mapping[str, Name]
"""Every name of a script by its key."""


def names_of(config: Any) -> Names:
    """The names of a config."""
    return {
        name.key: name
        for group, value in groups(config).items()
        for field, type_ in get_type_hints(type(value)).items()
        for name in [Name(group, field, type_)]
    }


NAMES = names_of(TrainConfig())
"""Those of `scripts/train.py`."""

GENERATE_NAMES = names_of(GenerateConfig())
"""Those of `scripts/generate.py`."""

C = TypeVar("C", TrainConfig, GenerateConfig)


def merge(config: C, values: Mapping[str, Any]) -> C:
    """`config` with the values of some keys replaced; of logical_axis_rules, those of the names given.

    Epochs without steps mean max_train_steps -1 (from epochs).
    """
    if "num_train_epochs" in values and "max_train_steps" not in values:
        values = {**values, "max_train_steps": -1}
    names = NAMES if isinstance(config, TrainConfig) else GENERATE_NAMES
    changed: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key == "logical_axis_rules":
            value = tuple((dict(config.parallel.logical_axis_rules) | dict(value)).items())
        changed.setdefault(names[key].group, {})[names[key].field] = value
    parts = groups(config)
    return dataclasses.replace(
        config, **{name: dataclasses.replace(parts[name], **new) for name, new in changed.items()}
    )


def nearest(key: str, known: Iterable[str], *, as_flag: bool = False) -> str:
    """`; did you mean ...?` with the nearest known name, found by the whole name or by its last part."""
    wanted = key.replace("-", "_").lower()
    full = {part: name for name in known for part in (name.rpartition(".")[2], name)}
    close = difflib.get_close_matches(wanted, full, n=1, cutoff=0.5)
    if not close:
        return "; --help lists all"
    name = full[close[0]]
    return f"; did you mean {flag(name) if as_flag else name}?"


def read_as(name: Name, text: str) -> Any:
    """A text read as the name's type, or a ValueError that says what it must be."""
    if get_origin(name.type) is Literal:
        choices = get_args(name.type)
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choice or repr(choice) for choice in choices)}")
        return text
    reader = READERS[name.type]
    try:
        return reader.read(text)
    except (ValueError, KeyError, yaml.YAMLError):
        raise ValueError(f"must be {reader.rule}") from None


@dataclass(frozen=True)
class Reader:
    """How a text is read as a type, what it must be, and how `--help` shows that."""

    read: Callable[[str], Any]
    rule: str
    metavar: str


def _whole(text: str) -> int:
    """An integer, also in the forms `1e3` and `1000.0`."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _truth(text: str) -> bool:
    return yaml.SafeLoader.bool_values[text.lower()]


def _is_none(text: str) -> bool:
    return text.lower() in ("", "none", "null", "~")


def _axes(text: str) -> Axes:
    """Axes of the mesh as a list, which may be the one item of another."""
    match yaml.load(text, yaml.BaseLoader):
        case [[*axes]] | [*axes]:
            return _texts(axes)
    raise ValueError


def _axis_rules(text: str) -> AxisRules:
    """The axes of each name, of which there may be one, several or none."""
    rules = []
    found = yaml.load(text, yaml.BaseLoader)
    for rule in found if isinstance(found, list) else [found]:
        match rule:
            case [str(name), str(axis)]:
                rules.append((name, () if _is_none(axis) else (axis,)))
            case [str(name), [*axes]]:
                rules.append((name, _texts(axes)))
            case _:
                raise ValueError
    return tuple(rules)


def _texts(values: Any) -> Axes:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError
    return tuple(values)


def _some(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """What reads a list, or one value as a list of it; nothing is None."""

    def list_of(text: str) -> Any:
        if _is_none(text):
            return None
        found = yaml.load(text, yaml.BaseLoader) if text.lstrip().startswith("[") else [text]
        return tuple(read(part) for part in _texts(found)) or None

    return list_of


def _pair(text: str) -> Pair:
    """Two whole numbers, also as 1024x768."""
    if _is_none(text):
        return None
    first, second = text.split("x") if "x" in text else _texts(yaml.load(text, yaml.BaseLoader))
    return _whole(first), _whole(second)


def _span(text: str) -> Span:
    first, second = _texts(yaml.load(text, yaml.BaseLoader))
    return float(first), float(second)


LISTS = {
    Axes: Reader(_axes, "a list of axes, as [data, fsdp]", "YAML"),
    AxisRules: Reader(
        _axis_rules, "a list of [NAME, AXIS or [AXES]], as [[embed, [data, fsdp]], [heads, null]]", "YAML"
    ),
    Texts: Reader(_some(str), "a text, or a list of them, as [a, b]", "STR [STR ...]"),
    Floats: Reader(_some(float), "a number, or a list of them, as [0.8, 0.5]", "FLOAT [FLOAT ...]"),
    Bools: Reader(_some(_truth), "true or false, or a list of them, as [true, false]", "BOOL [BOOL ...]"),
    Pair: Reader(_pair, "two whole numbers, as [1024, 768] or 1024x768, or none", "INT INT"),
    Span: Reader(_span, "two numbers, as [0, 0.8]", "FLOAT FLOAT"),
}
"""How the types that are lists in YAML are read from its inline form."""

READERS: dict[Any, Reader] = {
    str: Reader(str, "a text", "STR"),
    int: Reader(_whole, "a whole number", "INT"),
    float: Reader(float, "a number", "FLOAT"),
    bool: Reader(_truth, "true or false", "BOOL"),
    int | None: Reader(lambda text: None if _is_none(text) else _whole(text), "a whole number or none", "INT|none"),
    bool | None: Reader(lambda text: None if _is_none(text) else _truth(text), "true, false or none", "BOOL|none"),
    **LISTS,
}
"""How every type but choices is read."""
