"""Pictures of a subject beside those of its class: how often each comes, and what it weighs."""

import itertools

import numpy as np
import pytest

from sdxl_eqx.data.bad import BadItems, BadSample
from sdxl_eqx.data.dreambooth import beside_class
from sdxl_eqx.data.loader import make_stream, weighted
from sdxl_eqx.data.order import Order
from sdxl_eqx.data.sources import Source

NOBODY = np.zeros(0, int)


class Pictures(Source):
    """So many pictures of one caption."""

    def __init__(self, count: int, caption: str):
        self.count, self.caption = count, caption

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{self.caption} {index}"

    def captions(self, index):
        return (self.caption,)

    def picture(self, index, limit=-1):
        return b"%d" % index


def names(source: Source, indices) -> list[str]:
    return [source.name(int(i)) for i in indices]


@pytest.mark.parametrize(("own", "other"), [(3, 8), (8, 3), (4, 4), (1, 5)])
def test_of_the_larger_set_each_comes_once_and_of_the_other_as_many(own, other):
    source, held, weights = beside_class(Pictures(own, "sks dog"), NOBODY, Pictures(other, "dog"), 0.25)
    count = max(own, other)
    assert len(source) == len(weights) == 2 * count and len(held) == 0
    for begin, size, kind, weight in ((0, own, "sks dog", 1.0), (1, other, "dog", 0.25)):
        part = range(begin, 2 * count, 2)
        assert {source.captions(i) for i in part} == {(kind,)}
        assert (weights[begin::2] == weight).all() and weights.dtype == np.float32
        times = np.bincount([int(source.picture(i)) for i in part], minlength=size)
        assert set(times.tolist()) <= {count // size, -(-count // size)}
        assert times.sum() == count and times.min() >= 1


def test_what_is_held_out_are_pictures_of_the_subject_that_are_not_trained_on():
    source, held, weights = beside_class(Pictures(5, "sks dog"), np.array([1, 4]), Pictures(7, "dog"), 2.0)
    assert names(source, held) == ["held out: sks dog 1", "held out: sks dog 4"]
    trained = names(source, np.setdiff1d(np.arange(len(source)), held))
    assert len(trained) == 14
    assert {name for name in trained if "sks" in name} == {f"instance: sks dog {i}" for i in (0, 2, 3)}
    assert (weights[held] == 1).all()


def test_each_sample_of_a_batch_has_the_weight_of_its_set_and_so_has_what_takes_a_bad_one_s_place():
    source, _, weights = beside_class(Pictures(3, "sks dog"), NOBODY, Pictures(8, "dog"), 0.5)

    def read(sample, rng):
        if source.name(sample) in ("class: dog 2", "instance: sks dog 1"):
            raise BadSample(source.name(sample), "torn")
        return {"caption": np.array(source.captions(sample)[0] == "dog")}

    bad = BadItems(len(source), 0.0)
    order = Order(np.zeros(len(source), int), batch_size=4, seed=0, shuffle=True)
    stream = make_stream(order, weighted(read, weights), seed=0, num_threads=2, bad=bad)
    for batch in itertools.islice(stream, 12):
        assert batch["weight"].dtype == np.float32
        np.testing.assert_array_equal(batch["weight"], np.where(batch["caption"], 0.5, 1.0))
    assert sorted(bad.reasons) == ["class: dog 2", "instance: sks dog 1"], "all copies count as one"


def test_half_of_an_epoch_is_of_the_class():
    source, _, weights = beside_class(Pictures(2, "sks dog"), NOBODY, Pictures(6, "dog"), 0.0)
    order = Order(np.zeros(len(source), int), batch_size=3, seed=0, shuffle=True)
    for epoch in range(3):
        samples = np.concatenate([order.batch(4 * epoch + i).samples for i in range(4)])
        assert weights[samples].sum() == 6
