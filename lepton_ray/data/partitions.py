"""What the log of a table says about a data file beside its name: its partition, and the bounds of its columns.

A query leaves out files whose partition or bounds cannot hold what it asks for. The forms are those of the Delta
protocol (https://github.com/delta-io/delta/blob/master/PROTOCOL.md, "Partition Value Serialization" and "Per-file
Statistics"), so that other programs read them too.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.errors import UsageError, shown

Values: TypeAlias = tuple[tuple[str, str | None], ...]
"""Partition columns and their values, in the order of the table's partition columns."""
BOUNDED_COLUMNS = 32
"""Columns from the left that get bounds, as is the custom of Delta tables."""
LONGEST_BOUND = 64
"""Characters of a text that serves as a bound; a column with a longer smallest or largest value gets none."""


def check_partition_columns(schema: pa.Schema, names: Sequence[str], where: str) -> None:
    """Raise UsageError unless each name is a column whose values can name a partition, and others are left."""
    for name in names:
        if name not in schema.names:
            has = shown(", ".join(schema.names), 200)
            raise UsageError(f"{where}: cannot be partitioned by {shown(name)}, which is no column; it has {has}")
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or kind in (pa.bool_(), pa.date32())):
            raise UsageError(
                f"{where}: cannot be partitioned by {shown(name)} of {kind}; expected text, whole numbers, true or "
                "false, or dates"
            )
    if len(set(names)) != len(names) or len(names) >= len(schema.names):
        raise UsageError(f"{where}: partition columns {', '.join(names)}; name each once and leave a column over")


def split(rows: pa.Table, by: Sequence[str]) -> Iterator[tuple[Values, pa.Table]]:
    """The rows of each partition, in their order; partitions in the order of their first row."""
    if not by or not rows.num_rows:
        yield (), rows
        return
    codes = np.zeros(rows.num_rows, np.int64)
    for name in by:
        encoded = rows[name].combine_chunks().dictionary_encode(null_encoding="encode")
        codes = codes * len(encoded.dictionary) + encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")  # rows of one partition stay in their order
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    for group in sorted(groups, key=lambda group: int(group[0])):
        values = tuple((name, _text(rows[name][int(group[0])].as_py(), name)) for name in by)
        yield values, rows if len(groups) == 1 else rows.take(pa.array(group))


def _text(value: Any, name: str) -> str | None:
    """A value as the log has it."""
    if value == "":
        raise UsageError(f"column {shown(name)}: empty text names no partition; give it a word or leave it missing")
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)


def values_of(partition: dict[str, Any]) -> Values:
    """Partition values that the library read from the log."""
    return tuple((name, _text(value, name)) for name, value in partition.items())


class Bounds:
    """The smallest and the largest value and the number of missing ones, for columns that a query may compare.

    Of rows of one schema that come some at a time.
    """

    def __init__(self) -> None:
        self._nulls: dict[str, int] = {}
        self._ends: dict[str, tuple[Any, Any] | None] = {}
        """None for a column that has no bounds for good; a column that has only missing values so far is not in it."""

    def add(self, rows: pa.Table) -> None:
        """Take rows into account."""
        for name in rows.column_names[:BOUNDED_COLUMNS]:
            column, kind = rows[name], rows.schema.field(name).type
            self._nulls[name] = self._nulls.get(name, 0) + column.null_count
            if not (
                pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_string(kind)
                or kind == pa.date32()
            ):  # fmt: skip
                continue
            if pa.types.is_floating(kind) and not pc.all(pc.is_finite(column), min_count=0).as_py():
                self._ends[name] = None  # a bound says nothing about NaN, and infinity is no JSON
                continue
            found = pc.min_max(column).as_py()
            if found["min"] is None or self._ends.get(name, ()) is None:
                continue
            low, high = self._ends.get(name) or (found["min"], found["max"])
            self._ends[name] = min(low, found["min"]), max(high, found["max"])

    def told(self) -> dict[str, Any]:
        """As the log has them."""
        ends = {
            name: pair
            for name, pair in self._ends.items()
            if pair is not None and not (isinstance(pair[0], str) and max(map(len, pair)) > LONGEST_BOUND)
        }
        return {
            "minValues": {name: _plain(low) for name, (low, _) in ends.items()},
            "maxValues": {name: _plain(high) for name, (_, high) in ends.items()},
            "nullCount": self._nulls,
        }


def bounds_of(rows: pa.Table) -> dict[str, Any]:
    """The bounds of some rows, as the log has them."""
    bounds = Bounds()
    bounds.add(rows)
    return bounds.told()


def bounds_from(action: dict[str, Any]) -> dict[str, Any]:
    """Bounds that the library read from the log, as the log has them."""
    named = {"minValues": "min", "maxValues": "max", "nullCount": "null_count"}
    return {
        theirs: {name: _plain(value) for name, value in (action.get(ours) or {}).items() if _is_plain(value)}
        for theirs, ours in named.items()
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | str | dt.date) or (isinstance(value, float) and math.isfinite(value))


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, dt.date) else value
