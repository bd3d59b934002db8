"""The YAML file of `--config`."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import yaml

from sdxl_eqx.flags.names import LISTS, NAMES, FlagError, Name, Names, nearest, read_as
from sdxl_eqx.flags.published import PUBLISHED, settle_file, today

log = logging.getLogger("sdxl_eqx")


def read(file: str | Path, names: Names = NAMES, *, elsewhere: Names | None = None) -> dict[str, Any]:
    """The values of a `--config` file by key (`diffusion_scheduler_config.prediction_type` for those of a mapping).

    Scalars are read from their text as the field's type wants them: `4e-7` is a number although YAML 1.1 calls it a
    string, and a run named `007` keeps its zeros. Names that have a meaning `elsewhere` are passed over and said; for
    training, published names and values are mapped to today's, or said to be ignored.

    Raises:
        FlagError: with the file, the key and its value, the rule and the remedy.
    """
    root = _compose(file)
    values: dict[str, Any] = {}
    others = []
    trains = names is NAMES
    if trains:
        names = {**names, **{key: published.name for key, published in PUBLISHED.items()}}
    passed_over = [*elsewhere, *PUBLISHED] if elsewhere is not None else []
    for key, node in _items(file, root, ""):
        if key in names:
            values[key] = _value(file, names[key], node, trains=trains)
        elif any(name.startswith(key + ".") for name in names):
            if isinstance(node, yaml.MappingNode):
                for inner, inner_node in _items(file, node, key + "."):
                    if inner not in names:
                        raise FlagError(f"{file}: {inner}: no such key{nearest(inner, names)}")
                    values[inner] = _value(file, names[inner], inner_node, trains=trains)
            elif not _is_null(node):
                raise FlagError(f"{file}: {key}: {_shown(node)}: must be a mapping, as `{key}: {{name: value}}`")
        elif any(name == key or name.startswith(key + ".") for name in passed_over):
            others.append(key)
        else:
            raise FlagError(f"{file}: {key}: no such key{nearest(key, names)}")
    if others:
        log.info("%s: of no meaning here: %s", file, ", ".join(others))
    return settle_file(str(file), values) if trains else values


def _compose(file: str | Path) -> yaml.MappingNode:
    """The nodes of a YAML file that holds one mapping."""
    try:
        root = yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise FlagError(f"--config {file}: {error.strerror or 'unreadable'}: name a YAML file that is there") from None
    except UnicodeDecodeError:
        raise FlagError(f"--config {file}: not a text in UTF-8: name a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = re.sub(r" '.{2,}'", "", getattr(error, "problem", None) or "not readable")  # quotes may hold a token
        raise FlagError(f"{file}{place}: not valid YAML ({problem}): write one `name: value` a line") from None
    if not isinstance(root, yaml.MappingNode):
        what = "it is empty" if root is None else f"it holds {_kind(root)}"
        raise FlagError(f"{file}: must be a mapping of names to values, but {what}: write one `name: value` a line")
    return root


def _items(file: str | Path, node: yaml.MappingNode, prefix: str) -> list[tuple[str, yaml.Node]]:
    """The entries of a mapping, whose keys must be scalars that occur once."""
    seen: dict[str, yaml.Node] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise FlagError(f"{file}: line {key_node.start_mark.line + 1}: a key must be a name, not {_kind(key_node)}")
        key = prefix + key_node.value
        if key in seen:
            raise FlagError(f"{file}: {key}: occurs again in line {key_node.start_mark.line + 1}: remove one")
        seen[key] = value_node
    return list(seen.items())


def _value(file: str | Path, name: Name, node: yaml.Node, *, trains: bool) -> Any:
    """A value of the file read as the name's type; nothing (null) is the empty text, a list its inline form."""
    shown = text = _shown(node)
    try:
        if isinstance(node, yaml.ScalarNode):
            text = "" if _is_null(node) else node.value
        elif isinstance(node, yaml.CollectionNode) and name.type in LISTS:
            shown = text = _inline(node)
        else:
            raise ValueError("must be a single value")
        return read_as(name, today(name.key, text, str(file)) if trains else text)
    except ValueError as rule:
        raise FlagError(f"{file}: {name.key}: {shown}: {rule}; leave the key out for the default") from None


def _inline(node: yaml.CollectionNode) -> str:
    """A list or mapping of the file as a flag would write it."""
    return yaml.serialize(type(node)(node.tag, node.value, flow_style=True), width=math.inf).strip()


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a single value"


def _shown(node: yaml.Node) -> str:
    """A value as messages show it: a scalar by its text, anything else by its kind (it may hold a token)."""
    return (node.value or "nothing") if isinstance(node, yaml.ScalarNode) else _kind(node)
