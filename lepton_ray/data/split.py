"""Which rows train and which are held out: decided by stable hashes, so that every run and every rank agrees.

No random generator is involved: the hash of a row's key and the seed (BLAKE2b, RFC 7693) decides, so the split does not
depend on the order of the rows, the machine or a library's version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.tree import SplitSettings

Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

TRAIN, TEST = "train", "test"
"""The values that a split column may hold."""


@dataclass(frozen=True)
class Split:
    """The two sides; every row is on exactly one of them."""

    train: Positions
    """Row positions, int64, ascending."""
    held_out: Positions
    """Row positions, int64, ascending."""


def split_rows(rows: pa.Table, settings: SplitSettings, *, key: str = "key", label: str = "label") -> Split:
    """Split the rows of a table.

    Args:
        rows: needs the column `key` (and `label` for `stratified`), or the settings' own column for `column`.
        settings: how; see SplitSettings.
        key: the column that names a row: no value twice, none missing.
        label: the column whose classes keep their share in `stratified`.

    Raises UsageError where a column is missing or holds what it must not, or where a side stays empty.
    """
    if settings.by == "column":
        held_out = _by_column(rows, settings.column)
    else:
        hashes = _key_hashes(_column(rows, key), settings.seed)
        if settings.by == "hash":
            held_out = hashes < np.uint64(min(int(settings.held_out * 2**64), 2**64 - 1))
        else:
            held_out = _stratified(_column(rows, label), hashes, settings.held_out)
    split = Split(np.flatnonzero(~held_out), np.flatnonzero(held_out))
    for side, positions in (("train on", split.train), ("hold out", split.held_out)):
        if len(positions) == 0:
            raise UsageError(
                f"data.split.by {settings.by}: none of the {rows.num_rows} rows is left to {side}; "
                "give more rows or another share in data.split.held_out"
            )
    return split


def _column(rows: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in rows.column_names:
        raise UsageError(f"data.split: no column {shown(name)}; the table has {', '.join(rows.column_names)}")
    column = rows[name]
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise UsageError(f"data.split: row {row} has no {shown(name)}; ingest with missing values dropped")
    return column


def _key_hashes(keys: pa.ChunkedArray, seed: int) -> npt.NDArray[np.uint64]:
    """64 bits for each key, decided by key and seed alone: about 1 microsecond per key."""
    texts = keys.cast(pa.string()).to_pylist()
    if len(set(texts)) != len(texts):
        counts = pc.value_counts(keys.cast(pa.string()))
        twice = counts.filter(pc.greater(counts.field(1), 1))[0]["values"].as_py()
        raise UsageError(f"data.split: key {shown(twice)} stands in several rows; a key names one row")
    seeded = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))
    digests = bytearray()
    for text in texts:
        state = seeded.copy()
        state.update(text.encode())
        digests += state.digest()
    return np.frombuffer(bytes(digests), "<u8").astype(np.uint64)


def _stratified(labels: pa.ChunkedArray, hashes: npt.NDArray[np.uint64], share: float) -> Mask:
    """In each class the rows with the smallest hashes: the share rounded to whole rows, one at least on each side."""
    encoded = labels.combine_chunks().dictionary_encode()
    classes = encoded.indices.to_numpy(zero_copy_only=False)
    counts = np.bincount(classes, minlength=len(encoded.dictionary))
    if (counts < 2).any():
        rare = encoded.dictionary[int(np.argmax(counts < 2))].as_py()
        raise UsageError(f"data.split: label {shown(rare)} has 1 row; stratified needs 2 of each, or use by: hash")
    wanted = np.clip(np.floor(counts * share + 0.5).astype(np.int64), 1, counts - 1)
    order = np.lexsort((hashes, classes))  # class by class, in each by hash
    rank_in_class = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    held_out = np.zeros(len(order), bool)
    held_out[order] = rank_in_class < wanted[classes[order]]
    return held_out


def _by_column(rows: pa.Table, name: str) -> Mask:
    column = _column(rows, name)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UsageError(f"data.split: column {shown(name)} holds {kind}; expected the words {TRAIN} and {TEST}")
    known = pc.is_in(column, value_set=pa.array([TRAIN, TEST], kind)).to_numpy()
    if not known.all():
        row = int(np.argmin(known))
        value = shown(column[row].as_py())
        raise UsageError(f"data.split: row {row} has {shown(name)} {value}; expected {TRAIN} or {TEST}")
    held_out: Mask = pc.equal(column, TEST).to_numpy()
    return held_out
