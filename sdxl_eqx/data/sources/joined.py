"""Sources made of others: several as one, one after the other, and some samples of one."""

import bisect
import itertools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources.source import Conditioned, Source


class Joined(Conditioned):
    """The samples of some sources by the name of each, which stands before the names of its samples."""

    def __init__(self, sources: Mapping[str, Source]):
        self._names, self._sources = list(sources), list(sources.values())
        self._ends = list(itertools.accumulate(map(len, self._sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        """What the data set calls a sample."""
        which, inner = self._at(index)
        return f"{self._names[which]}: {self._sources[which].name(inner)}"

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample."""
        which, inner = self._at(index)
        return self._sources[which].captions(inner)

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The encoded picture of a sample, or its first bytes."""
        which, inner = self._at(index)
        return self._sources[which].picture(inner, limit)

    def condition(self, index: int) -> bytes:
        """What a ControlNet sees of a sample.

        Raises:
            BadSample: its source has none.
        """
        which, inner = self._at(index)
        return _condition(self._sources[which], inner)

    def _at(self, index: int) -> tuple[int, int]:
        which = bisect.bisect_right(self._ends, index)
        return which, index - (self._ends[which - 1] if which else 0)


class Picked(Conditioned):
    """Some samples of a source, in an order; each may come several times."""

    def __init__(self, source: Source, indices: Int[np.ndarray, " n"]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        """What the data set calls a sample; all copies have one name, so that a bad one is counted once."""
        return self._source.name(self._at(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample."""
        return self._source.captions(self._at(index))

    def picture(self, index: int, limit: int = -1) -> bytes:
        """The encoded picture of a sample, or its first bytes."""
        return self._source.picture(self._at(index), limit)

    def condition(self, index: int) -> bytes:
        """What a ControlNet sees of a sample.

        Raises:
            BadSample: the source has none.
        """
        return _condition(self._source, self._at(index))

    def _at(self, index: int) -> int:
        return int(self._indices[index])


def _condition(source: Source, index: int) -> bytes:
    if not isinstance(source, Conditioned):
        raise BadSample(source.name(index), f"{type(source).__name__} has nothing for a ControlNet to see")
    return source.condition(index)
