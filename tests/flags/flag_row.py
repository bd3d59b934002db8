"""What a row of the table of flags holds, and how its effect is seen without running anything long."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import MagicMock

import jax
import pytest
from training.tiny_step import TEXT, TEXT_2, UNET, VAE_CONFIG

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.loading import ModelShapes
from sdxl_eqx.training.program import Program

SHAPES = ModelShapes(UNET, VAE_CONFIG, TEXT, TEXT_2, ScheduleConfig())

OTHER: Any = object()
"""Stands for whatever is not what the row says of the changed value."""


@dataclass(frozen=True)
class Row:
    """One published name."""

    value: Any
    """As YAML has it; it differs from the default."""
    observe: Callable[[TrainConfig], Any]
    """What the flag feeds, seen there."""
    was: Any
    now: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Values of others, without and with it."""
    along: Mapping[str, Any] = field(default_factory=dict)
    """Values of others that must change with it."""


Rows = Mapping[str, Row]


class Caught(BaseException):
    """A call that was to be seen, and goes no further."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__("seen by nobody")
        self.given, self.named = args, kwargs


def caught(target: str, call: Callable[[], Any], **instead: Any) -> Caught | None:
    """How `call` calls the function of that dotted name, or None where it does not; `instead` stands for others.

    A key of `instead` has `__` for each dot after `sdxl_eqx.`.
    """

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Caught(args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name, other in instead.items():
            patch.setattr(f"sdxl_eqx.{name.replace('__', '.')}", other)
        patch.setattr(target, stop)
        try:
            call()
        except Caught as found:
            return found
    return None


def seen(target: str, call: Callable[[], Any], **instead: Any) -> Caught:
    """As `caught`, of a call that must be."""
    found = caught(target, call, **instead)
    assert found is not None, f"{target} is not called"
    return found


def stand_in(kind: type, **values: Any) -> Any:
    """What passes for an instance of a class and has whatever it is asked for; `values` are its attributes."""
    one = MagicMock(**values)
    one.__class__ = kind
    return one


def program(config: TrainConfig, devices: int = 1) -> Program:
    """The step of a config on the first CPU devices, for a very small model; nothing is compiled."""
    return Program.make(config, SHAPES, jax.devices()[:devices], None)


def entry(key: str, value: Any) -> dict[str, Any]:
    """A key with its value as a file has it."""
    outer, _, inner = key.partition(".")
    return {outer: {inner: value} if inner else value}


def entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with their values as a file has them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        one = entry(key, value)
        for outer, inner in one.items():
            found[outer] = {**found.get(outer, {}), **inner} if "." in key else inner
    return found


def written(value: Any) -> str:
    """A value as it stands after a flag."""
    return json.dumps(value) if isinstance(value, list) else str(value)
