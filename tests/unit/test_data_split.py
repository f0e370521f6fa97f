"""The split puts every row on exactly one side, the same one for everybody."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray.data.split import split_rows
from lepton_ray.errors import UsageError
from lepton_ray.settings.tree import SplitSettings

HELD_OUT_STRATIFIED = [0, 2, 5, 11, 12, 13]
HELD_OUT_HASH = [2]


def rows_of(labels: list[object], prefix: str = "k") -> pa.Table:
    return pa.table({"key": [f"{prefix}{index}" for index in range(len(labels))], "label": labels})


LABELS = st.lists(st.integers(0, 3), min_size=4, max_size=120)


@given(labels=LABELS, by=st.sampled_from(["hash", "stratified"]), share=st.floats(0.05, 0.95), seed=st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_every_row_is_on_exactly_one_side(labels, by, share, seed):
    """Whatever the rows, no row is lost, none is on both sides, and the positions ascend."""
    try:
        split = split_rows(rows_of(labels), SplitSettings(by=by, held_out=share, seed=seed))
    except UsageError as error:
        assert "is left to" in str(error) or "needs 2 of each" in str(error)  # noqa: PT017 - both outcomes are right
        return
    both = np.concatenate([split.train, split.held_out])
    assert np.array_equal(np.sort(both), np.arange(len(labels)))
    for side in (split.train, split.held_out):
        assert side.dtype == np.int64
        assert len(side)
        assert (np.diff(side) > 0).all()


def test_stratified_holds_out_the_exact_share_of_each_label():
    """500 digits of each class give 100 held-out ones of each, and a class of 3 gives 1."""
    rows = rows_of([*np.repeat(range(10), 500).tolist(), 10, 10, 10])
    held_out = rows.take(split_rows(rows, SplitSettings(by="stratified", held_out=0.2)).held_out)
    counts = {entry["values"]: entry["counts"] for entry in held_out["label"].value_counts().to_pylist()}
    assert counts == {**dict.fromkeys(range(10), 100), 10: 1}


@pytest.mark.parametrize("by", ["stratified", "hash"])
def test_order_of_rows_does_not_matter(by):
    """The same keys are held out when the table is read in another order."""
    rows = rows_of(["a", "b"] * 200)
    shuffled = rows.take(np.random.default_rng(0).permutation(400))
    chosen = [
        set(table.take(split_rows(table, SplitSettings(by=by)).held_out)["key"].to_pylist())
        for table in (rows, shuffled)
    ]
    assert chosen[0] == chosen[1]


def test_hash_split_keeps_rows_when_the_table_grows():
    """Rows decided before stay where they were: nothing leaks from training to evaluation. This is the default."""
    small, large = rows_of([0] * 500), rows_of([0] * 900)
    before, after = (split_rows(table, SplitSettings()).held_out for table in (small, large))
    assert np.array_equal(before, after[after < 500])
    assert 0.15 < len(after) / 900 < 0.25


def test_split_never_changes_between_releases():
    """A resumed run and an evaluation months later need the same rows."""
    stratified = SplitSettings(by="stratified", held_out=0.3)
    assert split_rows(rows_of([0, 1] * 10), stratified).held_out.tolist() == HELD_OUT_STRATIFIED
    assert split_rows(rows_of([0] * 20), SplitSettings(by="hash", seed=3)).held_out.tolist() == HELD_OUT_HASH


def test_seed_gives_another_split():
    """Seeds 0 and 1 hold out unrelated rows."""
    rows = rows_of([0] * 1000)
    first, second = (set(split_rows(rows, SplitSettings(seed=seed)).held_out.tolist()) for seed in (0, 1))
    assert 10 < len(first & second) < 80  # 40 expected by chance


def test_column_decides_where_the_table_says_so():
    """The official split of a data set is taken as it is."""
    rows = rows_of([0, 1, 2]).append_column("split", pa.array(["test", "train", "test"]))
    split = split_rows(rows, SplitSettings(by="column"))
    assert split.held_out.tolist() == [0, 2]
    assert split.train.tolist() == [1]


@pytest.mark.parametrize(
    ("rows", "by", "message"),
    [
        (rows_of([0, 0, 1]), "stratified", r"label '1' has 1 row|label 1 has 1 row"),
        (rows_of([0, 0]).append_column("split", pa.array(["train", "valid"])), "column", "row 1 .*'valid'"),
        (rows_of([0, 0]).append_column("split", pa.array(["train", None])), "column", "row 1 has no 'split'"),
        (rows_of([0, 0]).append_column("split", pa.array([0, 1])), "column", "holds int64"),
        (rows_of([0, 0]).append_column("split", pa.array(["train", "train"])), "column", "left to hold out"),
        (rows_of([0, 0]).append_column("split", pa.array(["test", "test"])), "column", "left to train on"),
        (rows_of([0, 0]), "column", "no column 'split'"),
        (rows_of([0, None]), "stratified", "row 1 has no 'label'"),
        (pa.table({"key": ["a", "a", "b"], "label": [0, 0, 0]}), "hash", "key 'a' stands in several rows"),
        (pa.table({"label": [0, 0]}), "hash", "no column 'key'"),
        (rows_of([0]), "hash", "left to"),
    ],
)
def test_rows_that_cannot_be_split_are_named(rows, by, message):
    """The fault, the row and what to do, in one line, before anything starts."""
    with pytest.raises(UsageError, match=message):
        split_rows(rows, SplitSettings(by=by))


@pytest.mark.parametrize("by", ["hash", "stratified", "group", "time"])
def test_a_test_side_is_kept_from_training(by):
    """Three sides, each with about its share; taking a test off leaves who is held out as it was."""
    rows = rows_of([index % 4 for index in range(2000)]).append_column(
        "g", pa.array([f"g{n // 2}" for n in range(2000)])
    )
    told = {"by": by, "column": "g" if by == "group" else "n", "held_out": 0.2}
    rows = rows.append_column("n", pa.array(np.random.default_rng(0).permutation(2000)))
    split = split_rows(rows, SplitSettings(**told, test=0.1))
    every = np.concatenate(list(split.sides().values()))
    assert np.array_equal(np.sort(every), np.arange(2000))
    assert len(split.held_out) == pytest.approx(400, rel=0.2)
    assert len(split.test) == pytest.approx(200, rel=0.3)
    if by != "time":  # there the test is the newest rows, which without one are held out
        assert np.array_equal(split.held_out, split_rows(rows, SplitSettings(**told)).held_out)


def test_rows_of_a_group_stay_together():
    """All recordings of a speaker are on one side, also of speakers who come later."""
    speakers = np.random.default_rng(0).integers(0, 60, 900)
    rows = rows_of([0] * 900).append_column("speaker", pa.array([f"s{number}" for number in speakers]))
    split = split_rows(rows, SplitSettings(by="group", column="speaker"))
    assert not set(speakers[split.train]) & set(speakers[split.held_out])
    before = split_rows(rows.slice(0, 500), SplitSettings(by="group", column="speaker")).held_out
    assert np.array_equal(before, split.held_out[split.held_out < 500])


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.date32(), pa.timestamp("s"), pa.timestamp("ns", "UTC")])
def test_by_time_the_newest_rows_are_held_out(kind):
    """Rows of one time stay on one side, the older one."""
    days = pa.array([5, 1, 9, 9, 3, 7, 2, 8, 4, 6], pa.int32())
    times = days.cast(pa.date32()).cast(kind) if pa.types.is_temporal(kind) else days.cast(kind)
    rows = rows_of([0] * 10).append_column("day", times)
    split = split_rows(rows, SplitSettings(by="time", column="day", held_out=0.3, test=0.2))
    assert sorted(days.take(pa.array(split.test)).to_pylist()) == [9, 9]
    assert sorted(days.take(pa.array(split.held_out)).to_pylist()) == [6, 7, 8]
    late = split_rows(rows, SplitSettings(by="time", column="day", held_out=0.1 + 0.3))
    assert sorted(days.take(pa.array(late.held_out)).to_pylist()) == [7, 8, 9, 9]


def test_a_split_column_can_name_three_sides():
    """`validation` is held out then, and `test` is left alone."""
    rows = rows_of([0] * 4).append_column("split", pa.array(["test", "train", "validation", "test"]))
    split = split_rows(rows, SplitSettings(by="column"))
    assert {name: side.tolist() for name, side in split.sides().items()} == {
        "train": [1], "held_out": [2], "test": [0, 3]
    }  # fmt: skip


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match=r"held_out 0\.6 and test 0\.4 leave no rows to train on"):
        SplitSettings(held_out=0.6, test=0.4)


def test_what_cannot_be_split_by_time_is_told():
    rows = (
        rows_of([0] * 3).append_column("word", pa.array(list("abc"))).append_column("x", pa.array([1.0, np.nan, 2.0]))
    )
    with pytest.raises(UsageError, match="column 'word' holds string; expected dates, times or numbers"):
        split_rows(rows, SplitSettings(by="time", column="word"))
    with pytest.raises(UsageError, match="'x' of row 1 is nan; expected a number"):
        split_rows(rows, SplitSettings(by="time", column="x"))


def test_seventy_thousand_rows_split_quickly():
    """Well under a second of processor time, so that each rank can do it for itself."""
    rows = rows_of([index % 10 for index in range(70_000)])
    begun = time.process_time()
    split_rows(rows, SplitSettings())
    assert time.process_time() - begun < 1.0
