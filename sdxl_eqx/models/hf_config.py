"""Reading the JSON configs of a diffusers folder: what a model cannot do is refused, not ignored."""

from collections.abc import Mapping
from typing import Any

WRONG = (LookupError, TypeError, AttributeError, ArithmeticError)
"""What reading a config raises that lacks a key, or holds something of another kind."""


def require(part: str, config: Mapping[str, Any], must: Mapping[str, Any]) -> None:
    """Check that each key of `must`, where `config` has it, has that value.

    Raises:
        ValueError: naming the part, the key, the value and what is supported.
    """
    for key, wanted in must.items():
        value = config.get(key, wanted)
        value = tuple(value) if isinstance(value, list) else value
        if value != wanted:
            raise ValueError(f"{part} config: {key}={value!r} is not supported; SDXL has {wanted!r}.")
