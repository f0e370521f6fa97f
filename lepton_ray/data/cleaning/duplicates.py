"""Rows that are equal: found by a 128-bit hash of what is in them, so that 32 bytes of a row travel and not the row.

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


def _groups(bucket: pa.Table) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The lines of a bucket with equal ones together.

    Rows that share the first half of their hash and not the second are one in 2**64; at worst a duplicate stays.

    Returns:
        The order; the group of each line in that order; of each group the line (in that order) that comes first in
        the table.
    """
    first, second = bucket["first"].to_numpy(), bucket["second"].to_numpy()
    order = np.argsort(first)  # not stable, and several times faster for it
    begins = np.ones(len(order), bool)
    begins[1:] = (first[order][1:] != first[order][:-1]) | (second[order][1:] != second[order][:-1])
    group = np.cumsum(begins) - 1
    place = (bucket["part"].to_numpy().astype(np.int64) << 40 | bucket["row"].to_numpy())[order]
    lead = np.minimum.reduceat(place, np.flatnonzero(begins)) if len(place) else place
    leader = np.zeros(len(lead), np.int64)
    heads = np.flatnonzero(place == lead[group])
    leader[group[heads]] = heads
    return order, group, leader


def _told(bucket: pa.Table, order: Int64Array, chosen: Int64Array, others: Int64Array) -> pa.Table:
    part, row = bucket["part"].to_numpy()[order], bucket["row"].to_numpy()[order]
    return pa.table({"part": part[chosen], "row": row[chosen], "of_part": part[others], "of_row": row[others]})


def later_ones(bucket: pa.Table) -> pa.Table:
    """The rows of a bucket that equal an earlier one: `part`, `row`, and `of_part`, `of_row` of the first of them."""
    order, group, leader = _groups(bucket)
    later = np.flatnonzero(leader[group] != np.arange(len(order)))
    return _told(bucket, order, later, leader[group[later]])


def conflicting(bucket: pa.Table) -> pa.Table:
    """The rows of a bucket that are equal but for `other`: all of such a group, each with one it contradicts.

    Those that differ from the first row of the group name that; the others name the first that differs from it.
    """
    order, group, leader = _groups(bucket)
    other = bucket["other"].to_numpy()[order]
    place = (bucket["part"].to_numpy().astype(np.int64) << 40 | bucket["row"].to_numpy())[order]
    differs = np.flatnonzero(other != other[leader][group])
    against = np.full(len(leader), -1, np.int64)
    latest_first = differs[np.argsort(-place[differs])]
    against[group[latest_first]] = latest_first  # of several the last one written stays: the first of the table
    chosen = np.flatnonzero(against[group] >= 0)
    same = other[chosen] == other[leader][group[chosen]]
    return _told(bucket, order, chosen, np.where(same, against[group[chosen]], leader[group[chosen]]))
