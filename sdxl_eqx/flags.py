"""The command line of training: flags over a YAML file over the published defaults, checked once."""

import dataclasses
import difflib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
import yaml

from sdxl_eqx.config import TINY, TrainConfig, groups, is_flat

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_FILE = REPOSITORY / TINY
"""What an empty command line runs."""

SECRET = "hf_access_token"
"""The key whose value no message shows."""

BOOLS = {"true": True, "false": False}
log = logging.getLogger("sdxl_eqx")


class FlagError(ValueError):
    """A command line or YAML file that cannot be run: what was given, the rule and the remedy, in one message."""


@dataclass(frozen=True)
class CommandLine(TrainConfig):
    """Train Stable Diffusion XL.

    Without any argument: `--config configs/tiny.yaml`, a small run for any machine.
    """

    config: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """YAML file of the names below, with underscores; flags win over it."""


@dataclass(frozen=True)
class Name:
    """A published name: where its value lies in TrainConfig and of which type it is."""

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
        return "--" + self.key.replace("_", "-")


NAMES = {
    name.key: name
    for group, value in groups(TrainConfig()).items()
    for field, type_ in get_type_hints(type(value)).items()
    for name in [Name(group, field, type_)]
}
"""Every published name by its key."""


@dataclass(frozen=True)
class Switch:
    """`keys` have an effect only where `is_on` holds; `remedy` names the switch."""

    keys: tuple[str, ...]
    is_on: Callable[[TrainConfig], bool]
    remedy: str


SWITCHES = (
    Switch(("output_dir",), lambda c: not c.run.base_output_directory, "leave --base-output-directory empty"),
    Switch(
        ("revision",),
        lambda c: not c.model.pretrained_model_name_or_path.startswith("asset:"),
        "name a model of the Hub with --pretrained-model-name-or-path",
    ),
    Switch(("unet_checkpoint",), lambda c: not c.model.train_new_unet, "leave --train-new-unet out"),
    Switch(
        ("learning_rate_schedule_steps",),
        lambda c: c.optim.lr_schedule != "constant" or c.optim.warmup_steps_fraction > 0,
        "choose another --lr-schedule than constant, or set --warmup-steps-fraction",
    ),
    Switch(("decay_all",), lambda c: c.optim.adam_weight_decay > 0, "set --adam-weight-decay above 0"),
    Switch(("max_grad_value",), lambda c: c.optim.opt_enable_grad_clipping, "add --opt-enable-grad-clipping"),
    Switch(
        ("max_grad_norm",),
        lambda c: c.optim.opt_enable_grad_global_norm_clipping,
        "add --opt-enable-grad-global-norm-clipping",
    ),
    Switch(("ema_every",), lambda c: c.optim.ema_decay > 0, "set --ema-decay above 0"),
    Switch(
        ("dataset_save_location",),
        lambda c: c.data.cache_latents_text_encoder_outputs,
        "add --cache-latents-text-encoder-outputs",
    ),
    Switch(("metrics_file",), lambda c: c.metrics.write_metrics, "add --write-metrics"),
    Switch(
        ("guidance_scale", "negative_prompt"),
        lambda c: c.sample.do_classifier_free_guidance,
        "add --do-classifier-free-guidance",
    ),
    Switch(("prompt", "sample_every"), lambda c: c.sample.samples_per_grid > 0, "set --samples-per-grid above 0"),
    Switch(
        ("guidance_scale", "negative_prompt", "do_classifier_free_guidance", "num_inference_steps"),
        lambda c: c.sample.samples_per_grid > 0 or c.sample.caption_retrieval > 0,
        "set --samples-per-grid or --caption-retrieval above 0",
    ),
)


def parse(argv: Sequence[str]) -> TrainConfig:
    """The checked config of a command line. Nothing given means `--config configs/tiny.yaml`.

    Raises:
        SystemExit: 2 after one message on stderr where the flags or the file are wrong; 0 after `--help`.
    """
    try:
        return _parse(argv)
    except FlagError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def read(file: str | Path) -> dict[str, Any]:
    """The values of a `--config` file by key (`diffusion_scheduler_config.prediction_type` for those of a mapping).

    Scalars are read from their text as the field's type wants them: `4e-7` is a number although YAML 1.1 calls it a
    string, and a run named `007` keeps its zeros.

    Raises:
        FlagError: with the file, the key and its value, the rule and the remedy.
    """
    root = _compose(file)
    values: dict[str, Any] = {}
    for key, node in _items(file, root, ""):
        if key in NAMES:
            values[key] = _value(file, NAMES[key], node)
        elif any(name.startswith(key + ".") for name in NAMES):
            if isinstance(node, yaml.MappingNode):
                for inner, inner_node in _items(file, node, key + "."):
                    if inner not in NAMES:
                        raise FlagError(f"{file}: {inner}: no such key{_nearest(inner, NAMES)}")
                    values[inner] = _value(file, NAMES[inner], inner_node)
            elif not _is_null(node):
                raise FlagError(f"{file}: {key}: {_shown(node)}: must be a mapping, as `{key}: {{name: value}}`")
        else:
            raise FlagError(f"{file}: {key}: no such key{_nearest(key, NAMES)}")
    return values


def merge(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`config` with the values of some keys replaced. Epochs without steps mean max_train_steps -1 (from epochs)."""
    if "num_train_epochs" in values and "max_train_steps" not in values:
        values = {**values, "max_train_steps": -1}
    changed: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        changed.setdefault(NAMES[key].group, {})[NAMES[key].field] = value
    parts = groups(config)
    return dataclasses.replace(
        config, **{name: dataclasses.replace(parts[name], **new) for name, new in changed.items()}
    )


def _parse(argv: Sequence[str]) -> TrainConfig:
    if not argv:
        if not TINY_FILE.is_file():
            raise FlagError(
                f"without arguments {TINY} is run, but that comes with a checkout of the repository and is not part of "
                "an installed package: name your own with --config FILE, or see --help"
            )
        argv = ["--config", str(TINY_FILE)]
    args, given, file = _words(argv)
    values = read(file) if file else {}
    secret = values.pop(SECRET, "")  # kept from tyro, whose help shows defaults
    base = merge(TrainConfig(), values)
    line = tyro.cli(CommandLine, prog="scripts/train.py", args=args, default=CommandLine(**groups(base)))
    parsed = TrainConfig(**{group: getattr(line, group) for group in groups(base)})
    flags = {key: getattr(getattr(parsed, NAMES[key].group), NAMES[key].field) for key in given}
    config = merge(base, {SECRET: secret, **flags})
    _check(config, file, values, flags)
    return config


def _check(config: TrainConfig, file: str, values: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Check the whole config, then what has its switch off: for a flag an error, for a key of the file a log line."""
    try:
        config.check()
    except ValueError as error:
        key = str(error).split()[0].removeprefix("--").replace("-", "_")
        raise FlagError(f"{error} (from {file})" if key in values.keys() - flags.keys() else str(error)) from None
    if {"max_train_steps", "num_train_epochs"} <= flags.keys() and config.optim.max_train_steps != -1:
        log.warning("--num-train-epochs has no effect: --max-train-steps is given too, and steps win")
    defaults = TrainConfig()
    for switch in SWITCHES:
        if switch.is_on(config):
            continue
        for key in switch.keys:
            name = NAMES[key]
            if flags.get(key, False) is not False:  # a switch turned off asks for nothing
                raise FlagError(f"{name.flag} {flags[key]!r} has no effect here: {switch.remedy}, or leave it out")
            default = getattr(getattr(defaults, name.group), name.field)
            if key not in flags and values.get(key, default) != default:
                log.warning("%s: %s: %r has no effect here: %s", file, key, values[key], switch.remedy)


def _words(argv: Sequence[str]) -> tuple[list[str], set[str], str]:
    """The arguments in the one form tyro is given (`--name=value`, `--x` or `--no-x`), the keys given, the YAML file.

    No message repeats a value that belongs to no flag: it may be a misplaced token.
    """
    args: list[str] = []
    given: set[str] = set()
    file = last = ""
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            args.append("--help")
            continue
        if not word.startswith("--"):
            raise FlagError(_stray(word, last))
        shown, equals, value = word.partition("=")
        key = shown.removeprefix("--").replace("-", "_")
        negated = _negated(key)
        name = NAMES.get(negated or key)
        last = shown
        if name is None and key != "config":
            raise FlagError(f"{shown}: no such flag{_nearest(key, [*NAMES, 'config'], flag=True)}")
        if name is not None and name.type is bool:
            if not negated and not equals and words and words[0].lower() in BOOLS:
                equals, value = "=", words.pop(0)
            if equals and (negated or value.lower() not in BOOLS):
                raise FlagError(f"{shown} {value!r}: {_forms(name)}")
            on = BOOLS[value.lower()] if equals else not negated
            args.append(name.flag if on else f"--no-{name.flag[2:]}")
            given.add(name.key)
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise FlagError(f"{shown}: a value must follow; one that begins with -- is written {shown}=--VALUE")
            value = words.pop(0)
        if name is None:
            if file or not value:
                raise FlagError("--config: give one YAML file, once; flags win over it")
            file = value
            continue
        try:
            args.append(f"{name.flag}={_read(name, value)}")
        except ValueError as rule:
            raise FlagError(f"{name.flag} {value!r}: {rule}") from None
        given.add(name.key)
    return args, given, file


def _negated(key: str) -> str:
    """The Boolean key that `no_KEY` turns off, or ''."""
    positive = key.removeprefix("no_")
    return positive if positive != key and positive in NAMES and NAMES[positive].type is bool else ""


def _forms(name: Name) -> str:
    return f"write one of {name.flag}, --no-{name.flag[2:]}, {name.flag} True and {name.flag} False"


def _stray(word: str, last: str) -> str:
    """What to say of a word that is neither a flag nor the value of one."""
    key, equals, value = word.partition("=")
    if equals and re.fullmatch(r"[A-Za-z_][\w.-]*", key):
        name = NAMES.get(key.replace("-", "_"))
        known = name is not None and name.key != SECRET
        form = f"{name.flag if name else '--' + key.replace('_', '-')} {value if known else 'VALUE'}"
        return f"{key}={value if known else '...'}: write {form}{'' if name else _nearest(key, NAMES, flag=True)}"
    if word.lower().endswith((".yml", ".yaml")):
        return f"{word}: write --config {word}"
    flag = NAMES.get(_negated(last[2:].replace("-", "_")) or last[2:].replace("-", "_"))
    if flag is not None and flag.type is bool:
        return f"{last}: {_forms(flag)}"
    if last:
        return f"{last}: more than one value follows; put quotes around a value with spaces"
    return "the command line begins with a value that belongs to no flag: write --NAME VALUE, see --help for the names"


def _nearest(key: str, known: Iterable[str], *, flag: bool = False) -> str:
    """`; did you mean ...?` with the nearest known name, found by the whole name or by its last part."""
    wanted = key.replace("-", "_").lower()
    full = {part: name for name in known for part in (name.rpartition(".")[2], name)}
    close = difflib.get_close_matches(wanted, full, n=1, cutoff=0.5)
    if not close:
        return "; --help lists all"
    name = full[close[0]]
    return f"; did you mean {'--' + name.replace('_', '-') if flag else name}?"


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


def _value(file: str | Path, name: Name, node: yaml.Node) -> Any:
    """A scalar of the file read as the name's type; nothing (null) is the empty text."""
    try:
        if isinstance(node, yaml.ScalarNode):
            return _read(name, "" if _is_null(node) else node.value)
        raise ValueError("must be a single value")
    except ValueError as rule:
        shown = _shown(node)
        raise FlagError(f"{file}: {name.key}: {shown}: {rule}; leave the key out for the default") from None


def _read(name: Name, text: str) -> Any:
    """A text read as the name's type, or a ValueError that says what it must be."""
    if get_origin(name.type) is Literal:
        choices = get_args(name.type)
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choice or repr(choice) for choice in choices)}")
        return text
    read, rule = _READERS[name.type]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"must be {rule}") from None


def _whole(text: str) -> int:
    """An integer, also in the forms `1e3` and `1000.0`."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    str: (str, "a text"),
    int: (_whole, "a whole number"),
    float: (float, "a number"),
    bool: (lambda text: yaml.SafeLoader.bool_values[text.lower()], "true or false"),
}
"""How a text is read as each type, and what it must be."""


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a single value"


def _shown(node: yaml.Node) -> str:
    """A value as messages show it: a scalar by its text, anything else by its kind (it may hold a token)."""
    return (node.value or "nothing") if isinstance(node, yaml.ScalarNode) else _kind(node)
