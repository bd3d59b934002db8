"""What every source of samples gives, whatever its files are."""

import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """Random access to samples, in an order that is the same wherever the data set is opened.

    All methods are safe to call from many threads at once.
    """

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the data set calls a sample, for people: the file, or the file and the key or row in it."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """One or more captions, of which each visit picks one; nothing of the picture is read.

        Raises:
            BadSample: it has none that can be read.
        """
        ...

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The bytes of the picture's file (JPEG, PNG, ...), or the first `limit` of them, as a header needs.

        Raises:
            BadSample: they cannot be read.
        """
        ...


@runtime_checkable
class Conditioned(Source, Protocol):
    """A source that was opened with what a ControlNet sees of each sample."""

    def condition(self, index: int) -> bytes:
        """The bytes of the file (JPEG, PNG, ...) of the map that belongs to a sample's picture, of any size.

        Raises:
            BadSample: there is none, or it cannot be read.
        """
        ...


def texts_or(captions: Sequence[str], otherwise: str) -> tuple[str, ...]:
    """The captions that are not blank, or `otherwise` where none is; where that is '' they are left as they are."""
    if not otherwise:
        return tuple(captions)
    return tuple(caption for caption in captions if caption.strip()) or (otherwise,)


def texts(value: Any) -> tuple[str, ...]:
    """The captions in the value of a caption column: a string, a list of strings, or either as JSON.

    JSON objects give the strings among their values ({"short": ..., "long": ...}). A string that is no JSON of these
    forms is a caption as it is, whatever brackets it begins with.

    Raises:
        ValueError: the value is of another kind, or holds no caption.
    """
    found = value
    if isinstance(value, bytes):
        found = value = value.decode("utf-8-sig")
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{", '"'):
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, or brackets without end
            read = value
        found = read if _strings(read) else value
    strings = _strings(found)
    if not strings:
        raise ValueError(f"a caption must be a string, a list of strings or JSON of these, not {str(value)[:80]!r}")
    return strings


def _strings(value: Any) -> tuple[str, ...]:
    """The captions of a value, or none where it is of another kind."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, dict):
        value = [part for part in value.values() if isinstance(part, str)]
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(value)
    return ()
