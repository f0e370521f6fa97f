"""`merge`: rows of a source that take the place of those with the same key, and join where there are none.

The rows of the source are held in memory, the table goes by one data file at a time. The same merge a second time
changes nothing and makes no version.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.cleaning import KEY, Cleaner
from lepton_ray.data.commits import retried
from lepton_ray.data.edits import Change, Draft, carried_out, check_values, part_rows, with_values
from lepton_ray.data.evolution import fitted, joined_schema
from lepton_ray.data.ingest_checks import check_share
from lepton_ray.data.row_hash import hash_rows
from lepton_ray.data.sources import open_source
from lepton_ray.data.tables import Progress
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.reading import ReadingSettings
from lepton_ray.settings.tree import CleaningSettings
from lepton_ray.storage import Store

Matched = Literal["update", "keep", "delete"]
"""What becomes of a row of the table whose key the source has."""
Unmatched = Literal["insert", "skip"]
"""What becomes of a row of the source whose key the table has not."""

Positions = npt.NDArray[np.int64]


def merge(
    store: Store,
    name: str,
    source: Any,
    *,
    on: str = KEY,
    matched: Matched = "update",
    unmatched: Unmatched = "insert",
    evolve: bool = False,
    drop_missing: bool = True,
    dry_run: bool = False,
    reading: ReadingSettings = ReadingSettings(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> Change:
    """Merge the rows of a source into a table by a column that both have.

    Args:
        store: where the table is.
        name: of the table.
        source: what `sources.open_source` takes; no value of `on` twice, none missing.
        on: the column; where it is not `key`, rows that are there keep their key.
        matched: for rows that the table has: `update` gives them the source's values, `delete` takes them away.
        unmatched: for rows that it has not.
        evolve: the source may have new columns, lack some (these keep their values) and have narrower numbers.
        drop_missing: rows of the source with a missing value are left out, as by an ingest.
        dry_run: count, and write nothing.
        reading: format, types and limits of the source.
        progress: told how far the reading of the source is.

    Raises UsageError for a source that does not fit, ConflictError where others wrote meanwhile in each of 20 tries.
    Nothing is written then.
    """

    def once() -> Change:
        draft = Draft.on(store, name, dry_run=dry_run)
        incoming = _incoming(source, on, drop_missing, reading, progress)
        _check_on(draft.base.schema, incoming, on, draft.base.ref)
        schema = joined_schema(draft.base.schema, incoming.schema, draft.base.ref, evolve=evolve)
        told = pa.schema([field for field in schema if field.name in incoming.column_names])
        merging = _Merging(store, draft, fitted(incoming, told), schema, on)
        detail = f"{shown(source) if isinstance(source, str) else 'rows in memory'} on {on}: {matched}, {unmatched}"
        return carried_out(store, draft, "merge", detail, lambda: merging.run(matched, unmatched), schema)

    return retried(once)


def _incoming(
    source: Any, on: str, drop_missing: bool, reading: ReadingSettings, progress: Progress | None
) -> pa.Table:
    """The cleaned rows of the source. Raises UsageError for none, and for a key that was made."""
    cleaner, opened = Cleaner(CleaningSettings(drop_missing=drop_missing)), open_source(source, reading)
    pieces = []
    for rows in opened.batches:
        pieces.append(cleaner.clean(rows))
        if progress is not None:
            progress(cleaner.report.rows_read, opened.meter.share)
    check_share(opened, cleaner.report.rows_read, reading.limits.max_rejected_share, at_end=True)
    if not pieces or not cleaner.report.rows_written:
        reasons = ", ".join(f"{count} {reason}" for reason, count in cleaner.report.reasons.most_common(5))
        raise UsageError(f"source {shown(opened.name)}: no rows to merge{f' ({reasons})' if reasons else ''}")
    incoming = pa.concat_tables(pieces)
    if on == KEY and opened.made_keys:
        raise UsageError(
            f"source {shown(opened.name)}: has no column {KEY} to merge on; name another with --on, or append the rows"
        )
    return incoming


def _check_on(table: pa.Schema, incoming: pa.Table, on: str, ref: str) -> None:
    for whose, schema in ((f"table {ref}", table), ("source", incoming.schema)):
        if on not in schema.names:
            has = shown(", ".join(schema.names), 200)
            raise UsageError(f"{whose}: no column {shown(on)} to merge on; it has {has}")
    kind = incoming.schema.field(on).type
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind) or kind in (pa.date32(), pa.binary())):
        raise UsageError(f"column {shown(on)}: holds {kind}; rows are merged on text, bytes, whole numbers or dates")
    if incoming[on].null_count:
        raise UsageError(
            f"column {shown(on)} of the source: {incoming[on].null_count} rows without a value to merge on"
        )
    counts = pc.value_counts(incoming[on])
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        value = shown(twice[0]["values"].as_py())
        raise UsageError(f"column {shown(on)} of the source: {value} stands in several rows; which one is meant?")


class _Merging:
    """One merge under way."""

    def __init__(self, store: Store, draft: Draft, incoming: pa.Table, schema: pa.Schema, on: str) -> None:
        self._store, self._draft, self._incoming, self._schema, self._on = store, draft, incoming, schema, on
        self._there = np.zeros(incoming.num_rows, bool)
        """Rows of the source whose value of `on` the table has."""
        self._taken = np.zeros(incoming.num_rows, bool)
        """Rows of the source whose key the table has."""

    def run(self, matched: Matched, unmatched: Unmatched) -> None:
        """Go through the table and then add what is new."""
        for part in self._draft.files():
            rows = fitted(part_rows(self._store, self._draft.base, part), self._schema)
            found = self._found(rows, self._on)
            hits = np.flatnonzero(found >= 0)
            self._there[found[hits]] = True
            if self._on != KEY and KEY in rows.column_names:
                keys = self._found(rows, KEY)
                self._taken[keys[keys >= 0]] = True
            self._draft.count("matched", len(hits))
            if len(hits) and matched == "delete":
                self._draft.count("deleted", len(hits))
                self._draft.replace(part, _without(rows, hits))
            elif len(hits) and matched == "update":
                self._update(part, rows, hits, found[hits])
        if unmatched == "insert":
            self._insert()

    def _found(self, rows: pa.Table, column: str) -> Positions:
        """For each row the position of that of the source with the same value, -1 where there is none."""
        places = pc.index_in(rows[column], value_set=self._incoming[column].combine_chunks())
        found: Positions = pc.fill_null(places, -1).to_numpy().astype(np.int64)
        return found

    def _update(self, part: Any, rows: pa.Table, hits: Positions, sources: Positions) -> None:
        columns = [name for name in self._incoming.column_names if name not in (KEY, self._on)]
        before, after = (
            rows.select(columns).take(pa.array(hits)),
            self._incoming.select(columns).take(pa.array(sources)),
        )
        differs = (hash_rows(before) != hash_rows(after)).any(axis=1)
        self._draft.count("updated", int(differs.sum()))
        if not differs.any():
            return
        changed = with_values(rows, hits, after)
        check_values(changed.take(pa.array(hits[differs])), "merge")
        by = [name for name in self._draft.base.log.partition_by if name in columns]
        moves = (hash_rows(before.select(by)) != hash_rows(after.select(by))).any(axis=1) if by else None
        if moves is not None and moves.any():  # into the file of another partition, at the end
            self._draft.writer.add(changed.take(pa.array(hits[moves])))
            changed = _without(changed, hits[moves])
        self._draft.replace(part, changed)

    def _insert(self) -> None:
        new = ~self._there
        if (clash := new & self._taken).any():
            key = shown(self._incoming[KEY][int(np.argmax(clash))].as_py())
            raise UsageError(
                f"merge on {self._on}: {KEY} {key} of a new row stands in the table already; a key names one row"
            )
        self._draft.count("inserted", int(new.sum()))
        self._draft.writer.add(fitted(self._incoming.filter(pa.array(new)), self._schema))


def _without(rows: pa.Table, positions: Positions) -> pa.Table:
    stays = np.ones(rows.num_rows, bool)
    stays[positions] = False
    return rows.filter(pa.array(stays))
