"""Rows that are equal: found by a 128-bit hash of what is in them, so that 24 bytes of a row travel and not the row.

Polars and pandas do this for tables that lie in one memory; here the hashes of a bucket meet in one place, wherever
their rows lie, and which row stays (the first of the table) does not depend on who found it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lepton_ray.data.row_hash import hash_rows

Int64Array = npt.NDArray[np.int64]


def hashed(rows: pa.Table, places: Int64Array, part: int, buckets: int, others: pa.Table | None = None) -> pa.Table:
    """The hash of each row, the bucket in which equal rows meet, and where the row is.

    Args:
        rows: the columns that must be equal.
        places: row numbers within the data file: int64 of shape [rows].
        part: number of the data file.
        buckets: how many there are.
        others: columns of which another hash (64 bits, `other`) is wanted.
    """
    hashes = hash_rows(rows)
    said = {
        "bucket": (hashes[:, 0] % np.uint64(buckets)).astype(np.int32),
        "first": hashes[:, 0],
        "second": hashes[:, 1],
        "part": np.full(len(places), part, np.int32),
        "row": places,
    }
    if others is not None:
        said["other"] = hash_rows(others)[:, 0]
    return pa.table(said)


def _groups(bucket: pa.Table) -> tuple[pa.Table, npt.NDArray[np.bool_]]:
    """The rows of a bucket with equal ones together, in the order of the table, and where a group begins."""
    columns = [bucket[name].to_numpy() for name in ("row", "part", "second", "first")]
    order = np.lexsort(columns)
    ordered = bucket.take(pa.array(order))
    first, second = columns[3][order], columns[2][order]
    begins = np.ones(len(order), bool)
    begins[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return ordered, begins


def later_ones(bucket: pa.Table) -> pa.Table:
    """The rows of a bucket that equal an earlier one: `part`, `row`, and `of_part`, `of_row` of the first of them."""
    ordered, begins = _groups(bucket)
    leader = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
    later = np.flatnonzero(~begins)
    found = ordered.select(["part", "row"])
    return pa.table(
        {
            "part": found["part"].to_numpy()[later],
            "row": found["row"].to_numpy()[later],
            "of_part": found["part"].to_numpy()[leader[later]],
            "of_row": found["row"].to_numpy()[leader[later]],
        }
    )


def conflicting(bucket: pa.Table) -> pa.Table:
    """The rows of a bucket that are equal but for `other`: all of such a group, each with the first of the rest."""
    ordered, begins = _groups(bucket)
    group = np.cumsum(begins) - 1
    other = ordered["other"].to_numpy()
    lead = np.flatnonzero(begins)
    differs = other != other[lead][group]
    mixed = np.zeros(len(lead), bool)
    mixed[group[differs]] = True
    # the first row that differs from the leader stands for what the leader's side is in conflict with
    first_other = np.zeros(len(lead), np.int64)
    places = np.flatnonzero(differs)[::-1]
    first_other[group[places]] = places
    chosen = np.flatnonzero(mixed[group])
    against = np.where(differs[chosen], lead[group[chosen]], first_other[group[chosen]])
    part, row = ordered["part"].to_numpy(), ordered["row"].to_numpy()
    return pa.table({"part": part[chosen], "row": row[chosen], "of_part": part[against], "of_row": row[against]})
