"""Rows that are in memory already: Arrow tables and what can become one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from lepton_ray.data.column_types import refuse_extensions
from lepton_ray.errors import UsageError, shown

BATCH_ROWS = 65_536
"""Rows handed on at a time."""


def arrow_of(rows: Any) -> pa.Table:
    """Rows in memory as an Arrow table. Raises UsageError for what holds none."""
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if hasattr(rows, "to_arrow_refs"):  # Ray Data
        import ray

        return pa.concat_tables(ray.get(rows.to_arrow_refs()))
    if isinstance(rows, dict) and rows and all(hasattr(part, "features") for part in rows.values()):
        names = shown(", ".join(map(str, rows)), 120)
        raise UsageError(f"rows: several data sets in one ({names}); give one of them, e.g. data[{next(iter(rows))!r}]")
    inner = getattr(getattr(rows, "data", None), "table", None)  # a Hugging Face data set
    if isinstance(inner, pa.Table):
        if getattr(rows, "_indices", None) is not None:
            rows = rows.flatten_indices()
            inner = rows.data.table
        return pa.Table.from_batches(inner.to_batches(), inner.schema.remove_metadata())
    if hasattr(rows, "__arrow_c_stream__"):  # pandas, polars and others: the Arrow PyCapsule interface
        return _of_stream(rows)
    raise UsageError(
        f"rows: {shown(type(rows).__name__)} holds no table; expected an Arrow table, a pandas or polars frame, a "
        "Hugging Face or Ray data set"
    )


def _of_stream(rows: Any) -> pa.Table:
    try:
        return pa.table(rows).replace_schema_metadata()
    except (pa.ArrowException, TypeError, ValueError) as error:  # e.g. a column of objects of several kinds
        raise UsageError(f"rows: {shown(' '.join(str(error).split()), 200)}; give each column one type") from error


def digest_of_rows(rows: pa.Table) -> str:
    """SHA-256 of the rows as an Arrow stream. Raises RefusedError for Arrow extension types."""
    refuse_extensions(rows.schema, "rows")
    digest = hashlib.sha256(rows.schema.remove_metadata().serialize())
    for batch in rows.combine_chunks().to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()


def in_batches(rows: pa.Table) -> Iterator[pa.Table]:
    """The rows in slices."""
    for start in range(0, max(1, rows.num_rows), BATCH_ROWS):
        yield rows.slice(start, BATCH_ROWS)
