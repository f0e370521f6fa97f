"""What is done to rows before they enter a table, and the account of it. Pure: Arrow in, Arrow and figures out.

Each row is judged by one rule after the other and counted under the first that catches it: a value is missing, a value
is not valid, the row stood there before.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.images import SHAPE_COLUMNS, is_image_table
from lepton_ray.data.row_hash import SeenRows, hash_rows
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.tree import CleaningSettings

KEY = "key"
"""The column that names a row."""
LABEL = "label"
"""The column that holds what a row is, where it is known."""
MAX_LABELS = 1000
"""Labels are counted up to this many different ones; a column with more is no class label."""

Mask = npt.NDArray[np.bool_]


@dataclass
class CleaningReport:
    """What was found and what was kept."""

    rows_read: int = 0
    rows_written: int = 0
    missing: int = 0
    """Rows with a null in any column."""
    invalid: int = 0
    """Rows with a value that cannot be: never kept."""
    duplicates: int = 0
    """Rows equal in every column but the key to an earlier one."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows by what exactly was found, e.g. `no label`, `image of the wrong length`, `duplicate`."""
    labels: Counter[str] = field(default_factory=Counter)
    """Rows kept by label; empty without a label column or with more than 1000 different labels."""


class Cleaner:
    """Cleans a stream of tables of one schema; what it saw before counts for what comes after.

    Memory: 32 bytes per row kept (16 for the hash of its content, 16 for that of its key, unless it was made).
    """

    def __init__(self, settings: CleaningSettings) -> None:
        self._settings = settings
        self._contents, self._keys = SeenRows(), SeenRows()
        self._labels_bounded = True
        self.keys_are_distinct = False
        """Whoever made the keys vouches that each stands once: they need not be remembered."""
        self.report = CleaningReport()

    def remember(self, rows: pa.Table) -> None:
        """Rows that are in the table already: a later row equal to one of them is a duplicate."""
        self._contents.add(hash_rows(rows.drop_columns([KEY])))
        self._keys.add(hash_rows(rows.select([KEY])))

    def clean(self, rows: pa.Table) -> pa.Table:
        """The rows that stay, in order.

        Raises UsageError where a key stands twice on rows that differ (a key names one row), or where a key is missing
        and missing values are to be kept.
        """
        self.report.rows_read += rows.num_rows
        rows = self._without_missing(rows)
        rows = self._without_invalid(rows)
        rows = self._without_duplicates(rows)
        self._check_keys(rows)
        self._count_labels(rows)
        self.report.rows_written += rows.num_rows
        return rows

    def _without_missing(self, rows: pa.Table) -> pa.Table:
        missing = np.zeros(rows.num_rows, bool)
        for name in rows.column_names:
            if rows[name].null_count:
                here = rows[name].is_null().to_numpy()
                self._found(f"no {name}", here & ~missing)
                missing |= here
        self.report.missing += int(missing.sum())
        if self._settings.drop_missing:
            return _kept(rows, ~missing)
        if rows[KEY].null_count:
            raise UsageError(f"column {KEY}: {rows[KEY].null_count} rows without one; give each row a key or drop them")
        return rows

    def _without_invalid(self, rows: pa.Table) -> pa.Table:
        invalid = np.zeros(rows.num_rows, bool)
        for reason, wrong in _faults(rows):
            here = pc.fill_null(wrong, False).to_numpy() & ~invalid  # a missing value is not an invalid one
            self._found(reason, here)
            invalid |= here
        self.report.invalid += int(invalid.sum())
        return _kept(rows, ~invalid)

    def _without_duplicates(self, rows: pa.Table) -> pa.Table:
        new = self._contents.add(hash_rows(rows.drop_columns([KEY])))
        self.report.duplicates += int((~new).sum())
        self._found("duplicate", ~new)
        return _kept(rows, new) if self._settings.drop_duplicates else rows

    def _check_keys(self, rows: pa.Table) -> None:
        if self.keys_are_distinct:
            return
        new = self._keys.add(hash_rows(rows.select([KEY])))
        if not new.all():
            key = rows[KEY][int(np.argmin(new))].as_py()
            raise UsageError(
                f"column {KEY}: {shown(key)} stands in more than one row; a key names one row: make them unique "
                f"or leave the column out to have keys made"
            )

    def _count_labels(self, rows: pa.Table) -> None:
        if LABEL not in rows.column_names or not self._labels_bounded:
            return
        kind = rows.schema.field(LABEL).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_boolean(kind)):
            return
        counts = pc.value_counts(rows[LABEL])
        if len(counts) + len(self.report.labels) > 2 * MAX_LABELS:
            self._labels_bounded = False
        else:
            for entry in counts.to_pylist():
                if entry["values"] is not None:
                    self.report.labels[str(entry["values"])] += entry["counts"]
            self._labels_bounded = len(self.report.labels) <= MAX_LABELS
        if not self._labels_bounded:
            self.report.labels.clear()

    def _found(self, reason: str, rows: Mask) -> None:
        if count := int(rows.sum()):
            self.report.reasons[reason] += count


def _kept(rows: pa.Table, mask: Mask) -> pa.Table:
    """The rows of the mask; the table itself, uncopied, where that is all."""
    return rows if mask.all() else rows.filter(pa.array(mask))


def _faults(rows: pa.Table) -> list[tuple[str, pa.ChunkedArray]]:
    """What is wrong, and a boolean (or null) for each row."""
    faults = [
        (f"{name} is not finite", pc.invert(pc.is_finite(rows[name])))
        for name in rows.column_names
        if pa.types.is_floating(rows.schema.field(name).type)
    ]
    if is_image_table(rows.schema):
        sizes = [rows[name].cast(pa.int64()) for name in SHAPE_COLUMNS]
        faults += [(f"{name} below 1", pc.less(rows[name], 1)) for name in SHAPE_COLUMNS]
        # sides far beyond any image could overflow their product
        faults += [(f"{name} above 65536", pc.greater(rows[name], 65_536)) for name in SHAPE_COLUMNS]
        expected = pc.multiply(pc.multiply(sizes[0], sizes[1]), sizes[2])
        faults.append(("image of the wrong length", pc.not_equal(pc.binary_length(rows["image"]), expected)))
        if LABEL in rows.column_names:
            if not pa.types.is_integer(rows.schema.field(LABEL).type):
                kind = rows.schema.field(LABEL).type
                raise UsageError(f"column {LABEL}: holds {kind}; labels of images are whole numbers from 0")
            faults.append(("label below 0", pc.less(rows[LABEL], 0)))
    return faults
