"""Several sources as one, one after the other."""

import bisect
import itertools
from collections.abc import Mapping

from sdxl_eqx.data.sources.source import Source


class Joined:
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

    def _at(self, index: int) -> tuple[int, int]:
        which = bisect.bisect_right(self._ends, index)
        return which, index - (self._ends[which - 1] if which else 0)
