import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_eqx.data import order as module
from sdxl_eqx.data.order import Order

BUCKETS = st.lists(st.integers(-1, 3), min_size=1, max_size=40).filter(lambda of: max(of) >= 0)
GIVEN = {"of": BUCKETS, "batch_size": st.integers(1, 7), "shuffle": st.booleans()}

GOLDEN_SORTED = [(0, [1340, 378, 1160, 1632], [0, 0, 0, 0]), (1, [1369, 605, 451, 2695], [1333, 1333, 1333, 1333])]
GOLDEN_CIPHER = [(1, [1131, 1205, 891, 113], [0, 0, 0, 0]), (0, [1000, 1428, 728, 1284], [1333, 1333, 1333, 1333])]


def order(of, batch_size=4, seed=3, shuffle=True) -> Order:
    return Order(np.array(of), batch_size=batch_size, seed=seed, shuffle=shuffle)


def taken(one: Order, batches):
    return [(b.bucket, b.samples.tolist(), b.epochs.tolist()) for b in map(one.batch, batches)]


@settings(deadline=None)
@given(epochs=st.integers(1, 4), **GIVEN)
def test_every_sample_is_visited_once_in_each_epoch_and_none_else(of, batch_size, shuffle, epochs):
    one = order(of, batch_size, shuffle=shuffle)
    visits = Counter()
    for _, samples, of_epochs in taken(one, range(one.batches_in(epochs))):
        visits.update(zip(samples, of_epochs, strict=True))
    assert set(visits.values()) <= {1}
    for bucket in set(of) - {-1}:
        members = [i for i, b in enumerate(of) if b == bucket]
        assert one.members(bucket).tolist() == members
        whole = epochs * len(members) // batch_size * batch_size // len(members)
        for epoch in range(whole):  # of the last one, what does not fill a batch is left for the next
            assert all(visits[i, epoch] == 1 for i in members)
        assert (
            sum(n for (i, _), n in visits.items() if i in members) == epochs * len(members) // batch_size * batch_size
        )


@settings(deadline=None)
@given(**GIVEN)
def test_a_batch_is_of_one_bucket_and_lies_in_the_epoch_of_its_last_sample(of, batch_size, shuffle):
    one = order(of, batch_size, shuffle=shuffle)
    for i in range(one.batches_in(3)):
        batch = one.batch(i)
        assert len(batch.samples) == batch_size
        assert {of[sample] for sample in batch.samples} == {batch.bucket}
        assert batch.epochs[-1] == one.epoch_of(i) and (np.diff(batch.epochs) >= 0).all()
        assert one.batches_in(one.epoch_of(i)) <= i < one.batches_in(one.epoch_of(i) + 1)


def test_the_same_arguments_give_the_same_order_at_once_and_from_threads():
    of = np.arange(60) % 3
    alone = taken(order(of), range(50))
    one = order(of)
    with ThreadPoolExecutor(8) as pool:
        threads = list(pool.map(lambda i: taken(one, [i])[0], [*range(50)] * 4))
    assert threads == alone * 4
    assert taken(order(of), reversed(range(50))) == alone[::-1]


def test_another_seed_gives_another_order_of_samples_and_of_batches():
    of = np.arange(60) % 3
    one, other = taken(order(of), range(15)), taken(order(of, seed=4), range(15))
    assert [b for b, _, _ in one] != [b for b, _, _ in other]
    assert one[0][1] != other[0][1]


def test_each_epoch_and_each_bucket_has_an_order_of_its_own():
    one = order([0] * 24)
    epochs = [[s for _, samples, _ in taken(one, range(6 * e, 6 * e + 6)) for s in samples] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(24))
    two = order([0] * 24 + [1] * 24)
    places = [[] for _ in range(2)]
    for bucket, samples, _ in taken(two, range(12)):
        places[bucket] += [sample % 24 for sample in samples]
    assert places[0] != places[1]


def test_without_shuffling_samples_come_in_their_order_and_a_batch_where_its_last_sample_does():
    assert taken(order([0] * 6, shuffle=False), range(3)) == [
        (0, [0, 1, 2, 3], [0] * 4),
        (0, [4, 5, 0, 1], [0, 0, 1, 1]),
        (0, [2, 3, 4, 5], [1] * 4),
    ]
    of = [0, 1, 1, 0, 1, 0, 0, 1, 0]
    assert [(b, s) for b, s, _ in taken(order(of, 2, shuffle=False), range(9))] == [
        (1, [1, 2]), (0, [0, 3]), (0, [5, 6]), (1, [4, 7]),
        (0, [8, 0]), (1, [1, 2]), (0, [3, 5]), (1, [4, 7]), (0, [6, 8]),
    ]  # fmt: skip


def test_a_bucket_smaller_than_a_batch_has_one_when_its_epochs_fill_it():
    one = order([0] * 8 + [1], 4)
    batches = taken(one, range(one.batches_in(8)))
    assert [i for i, (bucket, _, _) in enumerate(batches) if bucket == 1] != []
    assert [samples for bucket, samples, _ in batches if bucket == 1] == [[8] * 4] * 2
    assert [epochs for bucket, _, epochs in batches if bucket == 1] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_batches_far_away_cost_no_more():
    one = order(np.arange(1000) % 7, 64)
    index = 10**15
    batch = one.batch(index)
    assert one.batches_in(one.epoch_of(index)) <= index < one.batches_in(one.epoch_of(index) + 1)
    assert batch.epochs[-1] == one.epoch_of(index)


@settings(deadline=None)
@given(of=BUCKETS, batch_size=st.integers(1, 7))
def test_without_shuffling_batches_come_as_a_walk_through_the_samples_completes_them(of, batch_size):
    one = order(of, batch_size, shuffle=False)
    waiting, walked = {bucket: [] for bucket in of}, []
    for epoch in range(3):
        for sample, bucket in enumerate(of):
            waiting[bucket].append((sample, epoch))
            if bucket >= 0 and len(waiting[bucket]) == batch_size:
                samples, epochs = zip(*waiting.pop(bucket), strict=True)
                waiting[bucket] = []
                walked.append((bucket, list(samples), list(epochs)))
    assert taken(one, range(one.batches_in(3))) == walked


@pytest.mark.parametrize(("shuffle", "seed"), [(False, 0), (True, 0), (True, 1), (True, 2), (True, 3)])
def test_one_bucket_ends_an_epoch_within_a_batch_where_the_next_one_begins(shuffle, seed):
    one = order([0] * 22, shuffle=shuffle, seed=seed)
    rows = [row for _, samples, epochs in taken(one, range(11)) for row in zip(samples, epochs, strict=True)]
    assert [sorted(rows[22 * e : 22 * e + 22]) for e in range(2)] == [[(i, e) for i in range(22)] for e in range(2)]


def test_long_orders_keep_nothing_and_visit_every_sample_once(monkeypatch):
    monkeypatch.setattr(module, "SORTED_UP_TO", 0)
    one = order(np.arange(4200) % 2, 700)
    monkeypatch.setattr(module, "_sorted", None)
    batches = taken(one, range(6))
    assert sorted(s for _, samples, _ in batches for s in samples) == list(range(4200))
    assert taken(one, [3]) == [batches[3]]


@pytest.mark.parametrize(("bound", "expected"), [(1 << 20, GOLDEN_SORTED), (0, GOLDEN_CIPHER)])
def test_the_order_is_the_same_in_every_version(monkeypatch, bound, expected):
    monkeypatch.setattr(module, "SORTED_UP_TO", bound)
    assert taken(order(np.arange(3000) % 2, 4), [2, 10**6]) == expected


def test_a_bucket_of_few_samples_costs_little():
    one = order([0] * 64, 256)
    began = time.perf_counter()
    taken(one, range(1, 41))
    assert time.perf_counter() - began < 1  # 0.01 s; grain's cipher takes 5


def test_a_negative_number_is_an_error():
    with pytest.raises(ValueError, match="numbered from 0, not -1"):
        order([0]).batch(-1)


def test_samples_without_a_bucket_alone_are_an_error():
    with pytest.raises(ValueError, match="of 3 samples none can be used"):
        order([-1, -1, -1])
