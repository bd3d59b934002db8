import io

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.survey import Survey, survey


class Pictures:
    """A source in memory: pictures of these (height, width), None where one cannot be read."""

    def __init__(self, *sizes):
        self.sizes = sizes
        self.limits: list[int] = []

    def __len__(self):
        return len(self.sizes)

    def name(self, index):
        return f"{index}.png"

    def captions(self, index):
        return tuple(f"caption {index} {j}" for j in range(1 + index % 2))

    def picture(self, index, limit=-1):
        self.limits.append(limit)
        if self.sizes[index] is None:
            raise BadSample(self.name(index), "torn")
        file = io.BytesIO()
        h, w = self.sizes[index]
        Image.new("RGB", (w, h), (index, 0, 0)).save(file, "PNG")
        return file.getvalue() if limit < 0 else file.getvalue()[:limit]


SIZES = ((4, 5), None, (6, 7), (8, 9), (10, 11), None, (3, 3))


def look(source, indices=None, digests=True):
    indices = range(len(source)) if indices is None else indices
    return survey(source, indices, digests=digests, num_threads=2)


def assert_same(one: Survey, other: Survey):
    for name in ("sizes", "pictures", "captions", "counts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert sorted((b.name, b.reason) for b in one.bad) == sorted((b.name, b.reason) for b in other.bad)


def test_a_survey_has_sizes_and_digests_in_order_and_names_what_is_bad():
    seen = look(Pictures(*SIZES))
    assert seen.sizes.tolist() == [list(size or (0, 0)) for size in SIZES]
    assert seen.counts.tolist() == [1, 0, 1, 2, 1, 0, 1]
    assert [bool(digest) for digest in seen.pictures] == [size is not None for size in SIZES]
    assert len(set(seen.pictures.tolist())) == 6 and len(set(seen.captions.tolist())) == len(seen.captions) == 6
    assert [(bad.name, bad.reason) for bad in seen.bad] == [("1.png", "torn"), ("5.png", "torn")]


def test_sizes_alone_are_read_from_the_beginning_of_a_file():
    source = Pictures((400, 300))
    seen = look(source, digests=False)
    assert seen.sizes.tolist() == [[400, 300]] and not len(seen.captions)
    assert -1 not in source.limits


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_what_processes_see_of_their_shares_is_what_one_sees_of_all(count):
    source = Pictures(*SIZES)
    shares = [look(source, range(i, len(source), count)) for i in range(count)]
    sent = [Survey.from_bytes(share.to_bytes()) for share in shares]
    assert_same(Survey.joined(sent), look(source))


def test_a_digest_changes_with_the_bytes_alone():
    one, other = look(Pictures((4, 5), (6, 7))), look(Pictures((6, 7), (6, 7)))
    assert one.pictures[0] != other.pictures[0] and one.pictures[1] == other.pictures[1]
    assert one.captions.tolist() == other.captions.tolist()
