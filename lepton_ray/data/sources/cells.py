"""Cells that are too large: their rows are rejected before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.sources.rejects import Rejects
from lepton_ray.errors import shown
from lepton_ray.settings.reading import LimitSettings

PIECE_BYTES = 64 * 2**20
Sizes = npt.NDArray[np.int64]


def within_limits(rows: pa.Table, limits: LimitSettings, file: str, first_row: int, rejects: Rejects) -> pa.Table:
    """The rows whose cells are all within the limits, in order; the others are entered in `rejects`.

    Args:
        rows: consecutive rows of a file.
        limits: of cells and of binary cells.
        file: path or URI, for the account.
        first_row: number of the first of them in the file, from 1.
        rejects: takes the account.
    """
    keep = np.ones(rows.num_rows, bool)
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        limit = limits.max_object_bytes if _is_binary(column.type) else limits.max_cell_bytes
        if column.nbytes <= limit:  # then no cell can be beyond it
            continue
        sizes = _sizes(column)
        for index in np.flatnonzero((sizes > limit) & keep):
            reason = f"column {shown(name)} holds {sizes[index]} bytes; expected at most {limit}"
            rejects.add(file, first_row + int(index), "cell too large", reason)
            keep[index] = False
    return rows if keep.all() else rows.filter(pa.array(keep))


def in_pieces(rows: pa.Table) -> Iterator[pa.Table]:
    """The rows in slices that stay small when their dictionaries are written out: one long text may stand for many."""
    written_out = sum(int(_sizes(column).sum()) for column in rows.columns if pa.types.is_dictionary(column.type))
    if written_out <= PIECE_BYTES or len(rows) < 2:
        yield rows
        return
    half = len(rows) // 2
    yield from in_pieces(rows.slice(0, half))
    yield from in_pieces(rows.slice(half))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _sizes(column: pa.ChunkedArray) -> Sizes:
    """Bytes of each cell; 0 for columns whose cells are all of one size."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = [_sizes(pa.chunked_array([chunk.dictionary])) for chunk in column.chunks]
        picked = [
            length[chunk.indices.fill_null(0).to_numpy(zero_copy_only=False)] if len(length) else np.zeros(len(chunk))
            for length, chunk in zip(lengths, column.chunks, strict=True)
        ]
        return np.concatenate(picked).astype(np.int64) if picked else np.zeros(0, np.int64)
    if _is_binary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _numbers(pc.binary_length(column))
    if pa.types.is_string_view(kind):
        return _numbers(pc.binary_length(column.cast(pa.large_string())))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if pa.types.is_primitive(kind.value_type):
            sizes: Sizes = _numbers(pc.list_value_length(column)) * max(1, kind.value_type.bit_width // 8)
            return sizes
        return np.array([column.slice(index, 1).nbytes for index in range(len(column))], np.int64)
    return np.zeros(len(column), np.int64)


def _numbers(lengths: pa.ChunkedArray) -> Sizes:
    numbers: Sizes = lengths.fill_null(0).to_numpy().astype(np.int64)
    return numbers
