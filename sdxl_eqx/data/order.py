"""Which samples make which batch, for ever: a function of the batch's number alone."""

import bisect
import functools
from dataclasses import dataclass

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int, Int32, Int64

SORTED_UP_TO = 1 << 20
"""Orders of so many places are sorted and kept (4 MiB), longer ones are grain's cipher. That enciphers at least 16
bits, again and again until it meets a place that exists: 20 ms for a place of two, microseconds for one of a million.
"""

ROUNDS = 8
"""Of grain's cipher; with its usual 4, neighbours among 2**16 places stay correlated."""

MIX, MEMBERS = range(2)
"""What an order is of: the batches of an epoch, or the members of a bucket."""


@dataclass(frozen=True)
class OrderedBatch:
    """The samples of a batch, all of one bucket, and which epoch's visit to each of them this is."""

    bucket: int
    samples: Int64[np.ndarray, " b"]
    epochs: Int64[np.ndarray, " b"]


class Order:
    """Batches of samples of one bucket each, the same in every process, with random access from any thread.

    The samples of a bucket come epoch after epoch, each in an order of its own, and are cut into batches; what does not
    fill a batch thus goes into the next epoch. A batch lies in the epoch of its last sample: of a bucket of n samples,
    epoch e has the batches from floor(e n / b) to floor((e + 1) n / b), and those of all buckets are mixed.

    Args:
        bucket_of: the bucket of each sample; negative where it takes no part.
        batch_size: samples of a batch on all devices.
        seed: what the orders follow from.
        shuffle: without it, samples come in their own order, and a batch where its last sample comes.

    Raises:
        ValueError: no sample takes part.
    """

    def __init__(self, bucket_of: Int[np.ndarray, " n"], *, batch_size: int, seed: int, shuffle: bool):
        self.batch_size = batch_size
        self._seed, self._shuffle, self._length = seed, shuffle, len(bucket_of)
        narrow = np.int32 if len(bucket_of) < 2**31 else np.int64
        self._members = {
            int(bucket): np.flatnonzero(bucket_of == bucket).astype(narrow)
            for bucket in np.unique(bucket_of[bucket_of >= 0])
        }
        if not self._members:
            raise ValueError(f"of {len(bucket_of)} samples none can be used")
        for members in self._members.values():
            members.flags.writeable = False
        # Of each bucket the epoch it is in, the next one where a batch meets both, and the mix of batches.
        self._sorted = functools.lru_cache(maxsize=4 + len(self._members))(_sorted)

    @property
    def buckets(self) -> int:
        """How many buckets there are."""
        return len(self._members)

    def members(self, bucket: int) -> Int[np.ndarray, " k"]:
        """The samples of a bucket."""
        return self._members[bucket]

    def batches_in(self, epochs: int) -> int:
        """How many batches lie in the first so many epochs."""
        return sum(epochs * len(members) // self.batch_size for members in self._members.values())

    def epoch_of(self, index: int) -> int:
        """In which epoch a batch lies.

        Raises:
            ValueError: the number is negative.
        """
        if index < 0:
            raise ValueError(f"batches are numbered from 0, not {index}")
        buckets, total = len(self._members), sum(map(len, self._members.values()))
        # e epochs have at most e total / b batches, and less than one a bucket fewer.
        first = index * self.batch_size // total
        width = buckets * self.batch_size // total + 2
        return first + bisect.bisect_right(range(width), index, key=lambda i: self.batches_in(first + i + 1))

    def batch(self, index: int) -> OrderedBatch:
        """The batch of a number, from 0 on."""
        epoch = self.epoch_of(index)
        bucket, number = self._in_epoch(epoch, index - self.batches_in(epoch))
        members = self._members[bucket]
        begin, place = divmod(number * self.batch_size, len(members))
        later, places = np.divmod(place + np.arange(self.batch_size), len(members))
        if self._shuffle:
            parts = np.split(places, np.flatnonzero(np.diff(later)) + 1)
            keys = [(MEMBERS, bucket, begin + i) for i in range(len(parts))]
            places = np.concatenate([self._shuffled(*of, len(members)) for of in zip(parts, keys, strict=True)])
        return OrderedBatch(bucket, members[places].astype(np.int64), begin + later)

    def _in_epoch(self, epoch: int, place: int) -> tuple[int, int]:
        """The bucket of the batch at a place of an epoch, and its number among all of that bucket."""
        begins = {bucket: epoch * len(members) // self.batch_size for bucket, members in self._members.items()}
        if len(begins) == 1:  # its samples are shuffled already; as they come, an epoch ends where the next begins
            return next((bucket, begin + place) for bucket, begin in begins.items())
        if not self._shuffle:
            return self._completed(epoch, place, begins)
        ends = {bucket: (epoch + 1) * len(members) // self.batch_size for bucket, members in self._members.items()}
        count = sum(ends.values()) - sum(begins.values())
        place = int(self._shuffled(np.array([place]), (MIX, epoch), count)[0])
        for bucket, begin in begins.items():
            if place < ends[bucket] - begin:
                return bucket, begin + place
            place -= ends[bucket] - begin
        raise AssertionError(f"epoch {epoch} has no batch {place} more")

    def _completed(self, epoch: int, place: int, begins: dict[int, int]) -> tuple[int, int]:
        """What `_in_epoch` says where batches come as their last samples do."""

        def complete(bucket: int, sample: int) -> int:
            members = self._members[bucket]
            left = epoch * len(members) - begins[bucket] * self.batch_size
            # A bare int would make NumPy copy the members to compare them as int64.
            return (left + int(members.searchsorted(members.dtype.type(sample), "right"))) // self.batch_size

        # The sample with which the epoch has one batch more than `place`.
        everything = range(self._length)
        last = bisect.bisect_right(everything, place, key=lambda sample: sum(complete(b, sample) for b in begins))
        bucket = next(b for b in begins if complete(b, last) > complete(b, last - 1))
        return bucket, begins[bucket] + complete(bucket, last) - 1

    def _shuffled(self, places: Int[np.ndarray, " m"], key: tuple[int, ...], count: int) -> Int[np.ndarray, " m"]:
        """Where the order that belongs to a key puts these of `count` places."""
        if count <= SORTED_UP_TO:
            return self._sorted(count, self._seed, *key)[places]
        seed = int(np.random.SeedSequence([self._seed, *key]).generate_state(1)[0])
        return np.array([index_shuffle(place, count - 1, seed, ROUNDS) for place in places.tolist()])


def _sorted(count: int, *key: int) -> Int32[np.ndarray, " n"]:
    """A random order of `count` places. NumPy keeps raw draws the same in all its versions, but not `permutation`."""
    draws = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int32)
