"""Which rows train and which are held out: decided by stable hashes, so that every run and every rank agrees.

No random generator is involved: the hash of a row's key and the seed (BLAKE2b, RFC 7693) decides, so the split does not
depend on the order of the rows, the machine or a library's version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.tree import SplitSettings

Positions = npt.NDArray[np.int64]
Sides = npt.NDArray[np.int8]

TRAIN, VALIDATION, TEST = "train", "validation", "test"
"""The values that a split column may hold."""
_TRAIN, _HELD_OUT, _TEST = 0, 1, 2


@dataclass(frozen=True)
class Split:
    """The sides; every row is on exactly one of them."""

    train: Positions
    """Row positions, int64, ascending."""
    held_out: Positions
    """Row positions, int64, ascending: what training evaluates on."""
    test: Positions = field(default_factory=lambda: np.empty(0, np.int64))
    """Row positions, int64, ascending: what training does not look at."""

    def sides(self) -> dict[str, Positions]:
        """By name; `test` only where there is one."""
        named = {"train": self.train, "held_out": self.held_out}
        return named | ({"test": self.test} if len(self.test) else {})


def split_rows(rows: pa.Table, settings: SplitSettings, *, key: str = "key", label: str = "label") -> Split:
    """Split the rows of a table.

    Args:
        rows: needs the column `key` (and `label` for `stratified`), or the settings' own column.
        settings: how; see SplitSettings.
        key: the column that names a row: no value twice, none missing.
        label: the column whose classes keep their share in `stratified`.

    Raises UsageError where a column is missing or holds what it must not, or where a side stays empty.
    """
    if settings.by == "column":
        side = _by_column(rows, settings.column)
    elif settings.by == "time":
        side = _by_time(rows, settings)
    elif settings.by == "group":
        side = _by_hash(_group_hashes(_column(rows, settings.column), settings.seed), settings)
    else:
        hashes = _key_hashes(_column(rows, key), settings.seed)
        stratified = settings.by == "stratified"
        side = _stratified(_column(rows, label), hashes, settings) if stratified else _by_hash(hashes, settings)
    split = Split(*(np.flatnonzero(side == which) for which in (_TRAIN, _HELD_OUT, _TEST)))
    wanted = [("train on", split.train), ("hold out", split.held_out)]
    if settings.test and settings.by != "column":
        wanted.append(("test on", split.test))
    for purpose, positions in wanted:
        if len(positions) == 0:
            raise UsageError(
                f"data.split.by {settings.by}: none of the {rows.num_rows} rows is left to {purpose}; "
                "give more rows or other shares in data.split.held_out and data.split.test"
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
    return _hashes(texts, seed)


def _group_hashes(groups: pa.ChunkedArray, seed: int) -> npt.NDArray[np.uint64]:
    """The same for values that stand in several rows."""
    encoded = groups.cast(pa.string()).combine_chunks().dictionary_encode()
    places: Positions = encoded.indices.to_numpy(zero_copy_only=False)
    return _hashes(encoded.dictionary.to_pylist(), seed)[places]


def _hashes(texts: Sequence[str], seed: int) -> npt.NDArray[np.uint64]:
    seeded = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))
    digests = bytearray()
    for text in texts:
        state = seeded.copy()
        state.update(text.encode())
        digests += state.digest()
    return np.frombuffer(bytes(digests), "<u8").astype(np.uint64)


def _by_hash(hashes: npt.NDArray[np.uint64], settings: SplitSettings) -> Sides:
    """The lowest hashes are held out, the next ones are the test: each row is decided by its own hash alone."""
    held_out, test = (_below(share) for share in (settings.held_out, settings.held_out + settings.test))
    return np.where(hashes < held_out, _HELD_OUT, np.where(hashes < test, _TEST, _TRAIN)).astype(np.int8)


def _below(share: float) -> np.uint64:
    return np.uint64(min(int(share * 2**64), 2**64 - 1))


def _stratified(labels: pa.ChunkedArray, hashes: npt.NDArray[np.uint64], settings: SplitSettings) -> Sides:
    """In each class the rows with the smallest hashes: the shares rounded to whole rows, one at least on each side."""
    encoded = labels.combine_chunks().dictionary_encode()
    classes = encoded.indices.to_numpy(zero_copy_only=False)
    counts = np.bincount(classes, minlength=len(encoded.dictionary))
    needed = 3 if settings.test else 2
    if (counts < needed).any():
        place = int(np.argmax(counts < needed))
        rows = f"{counts[place]} row" + ("s" if counts[place] > 1 else "")
        raise UsageError(
            f"data.split: label {shown(encoded.dictionary[place].as_py())} has {rows}; stratified needs {needed} of "
            "each, or use by: hash"
        )
    held_out = np.clip(_rounded(counts * settings.held_out), 1, counts - (needed - 1))
    test = np.clip(_rounded(counts * settings.test), 1, counts - 1 - held_out) if settings.test else 0 * counts
    order = np.lexsort((hashes, classes))  # class by class, in each by hash
    rank_in_class = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    side = np.zeros(len(order), np.int8)
    mine = classes[order]
    side[order] = np.where(
        rank_in_class < held_out[mine], _HELD_OUT, np.where(rank_in_class < (held_out + test)[mine], _TEST, _TRAIN)
    )
    return side


def _rounded(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
    whole: npt.NDArray[np.int64] = np.floor(values + 0.5).astype(np.int64)
    return whole


def _by_time(rows: pa.Table, settings: SplitSettings) -> Sides:
    """The newest rows; rows of one time stay together, on the older side."""
    column = _column(rows, settings.column)
    kind = column.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        times = (column.cast(pa.timestamp("us")) if pa.types.is_date(kind) else column).cast(pa.int64())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        times = column
    else:
        raise UsageError(f"data.split: column {shown(settings.column)} holds {kind}; expected dates, times or numbers")
    at = times.to_numpy()
    if at.dtype.kind == "f" and not np.isfinite(at).all():
        row = int(np.argmin(np.isfinite(at)))
        raise UsageError(f"data.split: {shown(settings.column)} of row {row} is {at[row]}; expected a number")
    ordered = np.sort(at)
    side = np.zeros(len(at), np.int8)
    for share, which in ((settings.held_out + settings.test, _HELD_OUT), (settings.test, _TEST)):
        first = len(at) - round(len(at) * share)
        if share and 0 < first < len(at):
            side[at > ordered[first - 1]] = which
    return side


def _by_column(rows: pa.Table, name: str) -> Sides:
    column = _column(rows, name)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UsageError(f"data.split: column {shown(name)} holds {kind}; expected the words {TRAIN} and {TEST}")
    places = pc.index_in(column, value_set=pa.array([TRAIN, VALIDATION, TEST], kind))
    found: npt.NDArray[np.int64] = pc.fill_null(places, -1).to_numpy().astype(np.int64)
    if (found < 0).any():
        row = int(np.argmax(found < 0))
        value = shown(column[row].as_py())
        raise UsageError(f"data.split: row {row} has {shown(name)} {value}; expected {TRAIN}, {VALIDATION} or {TEST}")
    test = _TEST if (found == 1).any() else _HELD_OUT
    return np.array([_TRAIN, _HELD_OUT, test], np.int8)[found]
