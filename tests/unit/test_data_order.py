"""The sample order is a seeded permutation per epoch, and the ledger tells whether each sample was used once."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray.data.order import MAX_ROWS, SampleLedger, SampleOrder, mix64
from lepton_ray.errors import UsageError

FIRST_TEN = [8, 4, 1, 0, 5, 6, 7, 3, 2, 9]
ACROSS_EPOCHS = [57234, 6130, 53958, 7334]
SEEDS = st.integers(0, 2**63 - 1)


@given(rows=st.integers(1, 5000), seed=SEEDS, epoch=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_each_epoch_is_a_permutation(rows, seed, epoch):
    """Every row exactly once, for any table size, seed and epoch."""
    ids = SampleOrder(rows, seed).sample_ids(epoch * rows, rows)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(rows))


@given(rows=st.integers(1, 200), seed=SEEDS, offset=st.integers(0, 600), count=st.integers(0, 400), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_slice_agrees_with_the_whole(rows, seed, offset, count, data):
    """Ranks that cut the stream elsewhere, also across epochs, see the same samples."""
    order = SampleOrder(rows, seed)
    whole = order.sample_ids(offset, count)
    cut = data.draw(st.integers(0, count))
    parts = [order.sample_ids(offset, cut), order.sample_ids(offset + cut, count - cut)]
    assert np.array_equal(np.concatenate(parts), whole)
    epochs = range(offset // rows, (offset + count) // rows + 1)
    one_by_one = np.concatenate([order.sample_ids(epoch * rows, rows) for epoch in epochs])
    assert np.array_equal(one_by_one[offset % rows :][:count], whole)
    assert np.array_equal(order.epochs_of(offset, count), np.arange(offset, offset + count) // rows)


def test_order_never_changes_between_releases():
    """A resumed run needs the order it started with; a changed figure here loses every running user's position."""
    assert SampleOrder(10, 0).sample_ids(0, 10).tolist() == FIRST_TEN
    assert SampleOrder(60_000, 7).sample_ids(60_000 * 3 - 2, 4).tolist() == ACROSS_EPOCHS


@pytest.mark.parametrize("rows", [2**20 + 1, 10**9, MAX_ROWS])
def test_ids_stay_below_rows_for_large_tables(rows):
    """Nothing wraps where tables are large; a window of an epoch has no repeats."""
    ids = SampleOrder(rows, 2**63 - 1).sample_ids(rows - 5000, 5000)
    assert ids.min() >= 0
    assert ids.max() < rows
    assert len(np.unique(ids)) == 5000


def test_epochs_and_seeds_shuffle_differently():
    """Another epoch or seed agrees with this one in about one position, as unrelated permutations do."""
    first = SampleOrder(4000, 1).sample_ids(0, 12_000).reshape(3, 4000)
    other_seed = SampleOrder(4000, 2).sample_ids(0, 4000)
    for left, right in [(first[0], first[1]), (first[1], first[2]), (first[0], other_seed)]:
        assert (left == right).sum() < 12  # Poisson with mean 1: 12 has a chance of 1e-9


def test_rows_fall_anywhere_evenly():
    """Chi-square over where each of 16 rows lands in 32,000 epochs, and over neighbouring pairs."""
    rows, epochs = 16, 32_000
    ids = SampleOrder(rows, 5).sample_ids(0, rows * epochs).reshape(epochs, rows)
    places = np.zeros((rows, rows))
    for position in range(rows):
        places[position] = np.bincount(ids[:, position], minlength=rows)
    expected = epochs / rows
    assert ((places - expected) ** 2 / expected).sum() < 225 + 6 * np.sqrt(2 * 225)  # 15 x 15 degrees of freedom
    pairs = np.bincount(ids[:, 0] * rows + ids[:, 1], minlength=rows * rows).reshape(rows, rows)
    assert np.trace(pairs) == 0
    apart = pairs[~np.eye(rows, dtype=bool)]
    expected = epochs / len(apart)
    assert ((apart - expected) ** 2 / expected).sum() < 239 + 6 * np.sqrt(2 * 239)


def test_batches_are_not_ordered_by_row():
    """Rows of one batch come from all over the table: neighbours in an epoch are unrelated."""
    ids = SampleOrder(60_000, 0).sample_ids(0, 60_000)
    correlation = np.corrcoef(ids[:-1], ids[1:])[0, 1]
    assert abs(correlation) < 6 / np.sqrt(60_000)
    assert abs(np.corrcoef(ids, np.arange(60_000))[0, 1]) < 6 / np.sqrt(60_000)


@pytest.mark.parametrize(("rows", "seed"), [(0, 0), (-1, 0), (MAX_ROWS + 1, 0), (5, -1), (5, 2**63)])
def test_impossible_orders_are_refused(rows, seed):
    """No order of nothing, and no seed that 64 bits would fold onto another."""
    with pytest.raises(UsageError):
        SampleOrder(rows, seed)


@pytest.mark.parametrize(("offset", "count"), [(-1, 1), (0, -1), (2**62, 1)])
def test_impossible_offsets_are_refused(offset, count):
    """A negative offset must not silently wrap to an epoch far away."""
    with pytest.raises(UsageError):
        SampleOrder(5, 0).sample_ids(offset, count)


def test_mixing_is_a_bijection_with_known_values():
    """The published first outputs of SplitMix64 for seed 0."""
    states = np.array([0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], np.uint64)  # seed + 1 and + 2 increments
    assert mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(rows=st.integers(1, 200), seed=SEEDS, ranks=st.integers(1, 5), batch=st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_ranks_ledgers_merge_to_exactly_once(rows, seed, ranks, batch):
    """However the stream is cut into batches and ranks, full epochs are told as exactly once."""
    order, ledgers, end = SampleOrder(rows, seed), [SampleLedger() for _ in range(ranks)], rows * 3
    for start in range(0, end, batch):
        count = min(batch, end - start)
        epochs, ids = order.epochs_of(start, count), order.sample_ids(start, count)
        for rank, ledger in enumerate(ledgers):
            ledger.add(epochs[rank::ranks], ids[rank::ranks])
    merged = SampleLedger()
    for ledger in ledgers:
        merged.merge(SampleLedger.from_json(json.loads(json.dumps(ledger.to_json()))))
    assert merged.epochs() == [0, 1, 2]
    assert all(merged.used_exactly_once(epoch, rows) for epoch in range(3))
    assert not merged.used_exactly_once(3, rows)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, 1, 2, 3, 3], [0, 1, 2, 4, 4], [0, 1, 2, 3, 5], [0, 1, 1, 1, 4]])
def test_ledger_tells_lost_and_repeated_samples(ids):
    """A lost row, a repeated one, one in another's place, a foreign one, a row three times."""
    ledger = SampleLedger()
    ledger.add(0, np.array(ids, np.int64))
    assert ledger.count(0) == len(ids)
    assert not ledger.used_exactly_once(0, 5)
    assert ledger != SampleLedger.expected(5)


@pytest.mark.parametrize("value", [None, [], {"x": {}}, {"0": {"count": 1, "sum": "zz", "xor": "0"}}, {"0": 3},
                                   {"0": {"count": -1, "sum": "0", "xor": "0"}},
                                   {"0": {"count": 1, "sum": "1" + "0" * 16, "xor": "0"}}])  # fmt: skip
def test_damaged_ledgers_are_refused(value):
    """A ledger read from storage is checked before it is believed."""
    with pytest.raises(UsageError, match="sample ledger"):
        SampleLedger.from_json(value)


def test_ledger_needs_an_epoch_for_each_id():
    """Arrays of unequal length are a programming error that must not be broadcast away."""
    with pytest.raises(UsageError, match="2 epochs for 3 ids"):
        SampleLedger().add(np.array([0, 1]), np.array([0, 1, 2]))


def test_a_step_costs_little():
    """Order and ledger run in every step: a batch of 64 stays far below a millisecond (best of 5, shared machine)."""
    order, ledger = SampleOrder(60_000, 0), SampleLedger()

    def seconds(call) -> float:
        begun = time.perf_counter()
        for step in range(100):
            call(step)
        return (time.perf_counter() - begun) / 100

    ids = order.sample_ids(0, 64)
    assert min(seconds(lambda _: ledger.add(0, ids)) for _ in range(5)) < 100e-6
    assert min(seconds(lambda step: order.sample_ids(step * 64, 64)) for _ in range(5)) < 1e-3
