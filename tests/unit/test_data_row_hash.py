"""Equal rows have equal hashes and different ones have not, whatever the types and chunks."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray.data import row_hash
from lepton_ray.data.row_hash import SeenRows, hash_rows

ROWS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.binary(max_size=20)),
        st.one_of(st.none(), st.integers(-3, 3)),
        st.one_of(st.none(), st.sampled_from(["", "a", "aa", "ä"])),
        st.one_of(st.none(), st.booleans()),
    ),
    max_size=40,
)


def table_of(rows: list[tuple[object, ...]]) -> pa.Table:
    kinds = [pa.binary(), pa.int64(), pa.string(), pa.bool_()]
    columns = list(zip(*rows, strict=True)) or [()] * 4
    return pa.table({str(index): pa.array(list(columns[index]), kind) for index, kind in enumerate(kinds)})


@given(rows=ROWS, cut=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_hashes_are_equal_where_rows_are(rows, cut):
    """Over random rows with many repeats, cut into chunks anywhere."""
    table = table_of(rows)
    chunked = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    hashes = [tuple(pair) for pair in hash_rows(chunked).tolist()]
    assert hashes == [tuple(pair) for pair in hash_rows(table).tolist()]
    for row, pair in zip(rows, hashes, strict=True):
        for other, other_pair in zip(rows, hashes, strict=True):
            assert (row == other) == (pair == other_pair)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([0.0, 1.0, float("inf"), None, 5e-324]),
        pa.array([1, 2, 2**64 - 1], pa.uint64()),
        pa.array([b"", b"\0", b"\0\0", b"\0" * 8, b"\0" * 9]),
        pa.array([1, 2], pa.timestamp("us")),
        pa.array([date(2020, 1, 1), date(2020, 1, 2)]),
        pa.array([Decimal("1.0"), Decimal("1.1")]),
        pa.array([[1], [1, 2], [], None]),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array(["x", "y", None]).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_different_values_differ_in_each_type(values):
    """Also those that only differ in zero bytes or in being null, in both halves of the hash."""
    hashes = hash_rows(pa.table({"a": values}))
    for half in range(2):
        assert len(np.unique(hashes[:, half])) == len(values)
    assert np.array_equal(hash_rows(pa.table({"a": values})), hashes)


def test_numbers_that_compare_equal_hash_equal():
    """Both zeros, and every NaN."""
    strange_nan = np.array([0x7FF8000000000001, 0xFFF8000000000000], np.uint64).view(np.float64)
    hashes = hash_rows(pa.table({"a": np.array([0.0, -0.0, *strange_nan])}))
    assert (hashes[0] == hashes[1]).all()
    assert (hashes[2] == hashes[3]).all()


def test_values_in_other_columns_differ():
    """A swap of two columns is another row."""
    hashes = hash_rows(pa.table({"a": [1, 2], "b": [2, 1]}))
    assert (hashes[0] != hashes[1]).all()


def test_many_rows_have_no_collision_in_either_half():
    """Consecutive numbers: the expected number of collisions in 64 bits is 2e-9."""
    hashes = hash_rows(pa.table({"a": np.arange(300_000)}))
    assert all(len(np.unique(hashes[:, half])) == 300_000 for half in range(2))


@given(calls=st.lists(st.lists(st.integers(0, 30), max_size=30), max_size=12))
@settings(max_examples=60, deadline=None)
def test_seen_rows_tell_the_first_of_each_kind(calls):
    """As a plain set does, over any number of calls."""
    seen, known = SeenRows(), set()
    for values in calls:
        expected = []
        for value in values:
            expected.append(value not in known)
            known.add(value)
        assert seen.add(hash_rows(pa.table({"a": pa.array(values, pa.int64())}))).tolist() == expected


def test_long_runs_are_left_apart(monkeypatch):
    """What bounds the memory of a merge changes no answer."""
    monkeypatch.setattr(row_hash, "LONGEST_RUN", 100)
    seen, random = SeenRows(), np.random.default_rng(0)
    known: set[tuple[int, int]] = set()
    for _ in range(40):
        hashes = random.integers(0, 1000, (30, 1), np.uint64) * np.array([[1, 7]], np.uint64)
        expected = []
        for pair in map(tuple, hashes.tolist()):
            expected.append(pair not in known)
            known.add(pair)
        assert seen.add(hashes).tolist() == expected
    assert max(len(first) for first, _ in seen._runs) <= 100
    assert len(seen._runs) > 5
