"""Cleaning keeps the right rows and counts the others under what is wrong with them."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest

from lepton_ray.data.cleaning import MAX_LABELS, Cleaner
from lepton_ray.data.images import pack_images
from lepton_ray.errors import UsageError
from lepton_ray.settings.tree import CleaningSettings


def table_of(**columns: list[object]) -> pa.Table:
    count = len(next(iter(columns.values())))
    return pa.table({"key": [f"k{index}" for index in range(count)], **columns})


def test_each_row_is_counted_under_one_rule():
    """Missing before invalid before duplicate; what is read is what is written plus what was left out."""
    cleaner = Cleaner(CleaningSettings())
    rows = table_of(a=[1.0, None, float("inf"), 1.0, float("nan"), 2.0, None], b=["x", "x", "x", "x", "y", None, "x"])
    assert cleaner.clean(rows)["key"].to_pylist() == ["k0"]
    report = cleaner.report
    assert (report.rows_read, report.rows_written) == (7, 1)
    assert (report.missing, report.invalid, report.duplicates) == (3, 2, 1)
    assert report.reasons == {"no a": 2, "no b": 1, "a is not finite": 2, "duplicate": 1}


def test_duplicates_are_found_across_batches_and_the_table():
    """The first row stays; rows remembered from the table count as earlier ones; the key does not matter."""
    cleaner = Cleaner(CleaningSettings())
    cleaner.remember(pa.table({"key": ["old"], "a": [5]}))
    first = cleaner.clean(pa.table({"key": ["a", "b", "c"], "a": [1, 1, 2]}))
    second = cleaner.clean(pa.table({"key": ["d", "e", "f"], "a": [2, 5, 3]}))
    assert first["key"].to_pylist() == ["a", "c"]
    assert second["key"].to_pylist() == ["f"]
    assert cleaner.report.duplicates == 3


def test_settings_keep_and_still_count():
    """Nothing is dropped that the user wants to keep, and the report says it is there."""
    cleaner = Cleaner(CleaningSettings(drop_duplicates=False, drop_missing=False))
    rows = table_of(a=[1, 1, None])
    assert cleaner.clean(rows).num_rows == 3
    assert (cleaner.report.duplicates, cleaner.report.missing, cleaner.report.rows_written) == (1, 1, 3)


def images(count: int) -> dict[str, pa.Array]:
    return pack_images(np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2))


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("image", pa.array([b"abcd", b"abc", b""]), "image of the wrong length"),
        ("height", pa.array([2, 0, -2], pa.int32()), "height below 1"),
        ("width", pa.array([2, 65_537, 2**31 - 1], pa.int32()), "width above 65536"),
        ("label", pa.array([0, -1, -2]), "label below 0"),
    ],
)
def test_images_that_cannot_be_are_left_out(column, values, reason):
    """Sides, lengths and labels no image can have, without an overflow in their product."""
    columns = {**images(3), "label": pa.array([0, 1, 2])}
    rows = table_of(**{**columns, column: values})
    cleaner = Cleaner(CleaningSettings())
    assert cleaner.clean(rows)["key"].to_pylist() == ["k0"]
    assert cleaner.report.invalid == 2
    assert cleaner.report.reasons[reason] == 2


def test_missing_label_is_not_an_invalid_one():
    """A kept row without a label is counted once, as missing."""
    cleaner = Cleaner(CleaningSettings(drop_missing=False))
    cleaner.clean(table_of(**images(2), label=[0, None]))
    assert (cleaner.report.missing, cleaner.report.invalid, cleaner.report.rows_written) == (1, 0, 2)


@pytest.mark.parametrize("labels", [["a", "b"], [0.0, 1.0]])
def test_labels_of_images_are_whole_numbers(labels):
    """Text or 2.0000001 would train something nobody meant."""
    with pytest.raises(UsageError, match="column label"):
        Cleaner(CleaningSettings()).clean(table_of(**images(2), label=labels))


def test_a_key_names_one_row():
    """Two rows that differ but share a key: told, wherever the second comes from."""
    with pytest.raises(UsageError, match="'x' stands in more than one row"):
        Cleaner(CleaningSettings()).clean(pa.table({"key": ["x", "x"], "a": [1, 2]}))
    cleaner = Cleaner(CleaningSettings())
    cleaner.remember(pa.table({"key": ["x"], "a": [1]}))
    with pytest.raises(UsageError, match="'x'"):
        cleaner.clean(pa.table({"key": ["x"], "a": [2]}))


def test_rows_without_a_key_are_never_kept():
    """They are dropped as missing, or an error where missing values are to be kept."""
    rows = pa.table({"key": ["x", None], "a": [1, 2]})
    assert Cleaner(CleaningSettings()).clean(rows).num_rows == 1
    with pytest.raises(UsageError, match="column key"):
        Cleaner(CleaningSettings(drop_missing=False)).clean(rows)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([1, 1, 0, None]), {"1": 2, "0": 1}),
        (pa.array(["cat", "dog", "cat", None]), {"cat": 2, "dog": 1}),
        (pa.array([True, False, True, None]), {"True": 2, "False": 1}),
        (pa.array([0.5, 0.25, 0.1, None]), {}),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_labels_kept_are_counted(labels, expected):
    """Rows that were dropped do not count, and what is no class label is not counted."""
    cleaner = Cleaner(CleaningSettings())
    cleaner.clean(table_of(label=labels, other=[0, 1, 2, 3]))
    assert dict(cleaner.report.labels) == expected


def test_label_counts_are_bounded():
    """A column of ids called label must not fill the report, in one batch or over many."""
    cleaner = Cleaner(CleaningSettings())
    for start in range(0, MAX_LABELS + 200, 100):
        keys = [f"{start}-{index}" for index in range(100)]
        cleaner.clean(pa.table({"key": keys, "label": list(range(start, start + 100))}))
    assert cleaner.report.labels == {}
    one = Cleaner(CleaningSettings())
    one.clean(table_of(label=list(range(10 * MAX_LABELS))))
    assert one.report.labels == {}


def test_seventy_thousand_digits_are_cleaned_in_seconds():
    """Images of the size of MNIST with 100 repeats: all found, in a few seconds of processor time."""
    pixels = np.random.default_rng(0).integers(0, 256, (70_000, 28, 28), np.uint8)
    pixels[-100:] = pixels[:100]
    rows = table_of(**pack_images(pixels), label=[0] * 70_000)
    begun = time.process_time()
    cleaner = Cleaner(CleaningSettings())
    assert cleaner.clean(rows).num_rows == 69_900
    assert time.process_time() - begun < 4.0
    assert cleaner.report.duplicates == 100
