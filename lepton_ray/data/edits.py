"""Rows changed where they stand: `update` and `delete`, and what every change of a table has in common.

A change writes new data files in the places of those that hold changed rows, and then one entry in the log. The files
of before stay for the older versions; `retention` says for how long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.cleaning import KEY, Cleaner
from lepton_ray.data.commits import TOKEN, commit, retried
from lepton_ray.data.evolution import fitted
from lepton_ray.data.expressions import Expressions
from lepton_ray.data.parts import Part, PartWriter, decode_part, read_part
from lepton_ray.data.row_hash import hash_rows
from lepton_ray.data.versions import Table, check_table_name, open_table
from lepton_ray.errors import LeptonError, UnavailableError, UsageError, shown
from lepton_ray.settings.tree import CleaningSettings
from lepton_ray.storage import Store

Verb = Literal["update", "delete", "merge", "restore", "compact"]
Progress = Callable[[int, int], None]
"""Called with the data files done and all of them."""


@dataclass(frozen=True)
class Change:
    """What an operation did to a table, or would do."""

    table: str
    verb: Verb
    base: int
    """The version that it began from."""
    version: int
    """The version that it made; the base where nothing changed, and in a dry run."""
    rows_before: int
    rows_after: int
    matched: int = 0
    """Rows that the condition or the key found."""
    updated: int = 0
    """Rows of these whose values became others."""
    inserted: int = 0
    deleted: int = 0
    files_added: int = 0
    files_removed: int = 0
    """Data files that the new version has not; they stay for the older ones until a vacuum."""
    bytes_added: int = 0
    fingerprint: str = ""
    """Of the version."""
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass
class Draft:
    """A change while it is made: files written, files replaced, rows counted."""

    base: Table
    writer: PartWriter
    dry_run: bool
    removes: list[Part] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    progress: Progress | None = None

    @classmethod
    def on(cls, store: Store, name: str, *, dry_run: bool, progress: Progress | None = None) -> Draft:
        """A change of the newest version. Raises NotFoundError."""
        check_table_name(name)
        base = open_table(store, name)
        if not dry_run:
            store.check_writable()
        version, by = base.version + 1, base.log.partition_by
        return cls(base, PartWriter(store, f"datasets/{name}", version, by, dry=dry_run), dry_run, progress=progress)

    def files(self) -> Iterator[Part]:
        """The data files of the version that it began from, one after the other."""
        files = self.base.log.parts
        for done, part in enumerate(files, start=1):
            yield part
            if self.progress is not None:
                self.progress(done, len(files))

    def count(self, what: str, rows: int) -> None:
        """Add to a figure of the `Change`."""
        self.counts[what] = self.counts.get(what, 0) + rows

    def replace(self, part: Part, rows: pa.Table) -> None:
        """Have other rows in the place of a data file; none at all take it away."""
        self.removes.append(part)
        if rows.num_rows:
            self.writer.replace(part, rows)


def update(
    store: Store,
    name: str,
    assignments: Mapping[str, str],
    *,
    where: str,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Change:
    """Set columns of the rows that a condition holds for; the rows keep their places.

    Args:
        store: where the table is.
        name: of the table.
        assignments: column -> SQL expression over the row as it was, e.g. `{"label": "label + 1"}`.
        where: an SQL expression, e.g. `split = 'test'`; subqueries may read the table as `t`.
        dry_run: count, and write nothing.
        progress: see `Progress`.

    Raises UsageError for a column that is not there, is the key or a partition column, for expressions that fail or do
    not fit the column's type, and for values that a table never holds (not finite, an image of the wrong length);
    ConflictError where others wrote meanwhile in each of 20 tries. Nothing is written then.
    """
    if not assignments:
        raise UsageError("update: nothing to set; give column=expression")

    def once() -> Change:
        draft = Draft.on(store, name, dry_run=dry_run, progress=progress)
        _check_columns(draft.base, list(assignments))
        with Expressions(name, draft.base.log, where, assignments) as expressions:
            return carried_out(store, draft, "update", detail, lambda: _updated(store, draft, expressions, assignments))

    detail = f"{', '.join(f'{column} = {text}' for column, text in assignments.items())} where {where}"
    return retried(once)


def delete(store: Store, name: str, *, where: str, dry_run: bool = False, progress: Progress | None = None) -> Change:
    """Take away the rows that a condition holds for; the others keep their order.

    Args:
        store: where the table is.
        name: of the table.
        where: an SQL expression, e.g. `label = 3`; `true` takes away all rows.
        dry_run: count, and write nothing.
        progress: see `Progress`.

    Raises as `update` does.
    """

    def once() -> Change:
        draft = Draft.on(store, name, dry_run=dry_run, progress=progress)
        with Expressions(name, draft.base.log, where) as expressions:
            return carried_out(store, draft, "delete", f"where {where}", lambda: _deleted(store, draft, expressions))

    return retried(once)


def carried_out(
    store: Store, draft: Draft, verb: Verb, detail: str, act: Callable[[], None], schema: pa.Schema | None = None
) -> Change:
    """Have `act` fill the draft and make a version of it; on any error what was written is removed again.

    Raises ConflictError when somebody else committed first.
    """
    base, writer = draft.base, draft.writer
    try:
        act()
        writer.flush()
    except BaseException:
        with contextlib.suppress(LeptonError):  # the first error is the one to tell
            writer.discard()
        raise
    return committed(store, draft, verb, detail, writer.parts, schema or base.schema, base.log.partition_by)


def committed(
    store: Store, draft: Draft, verb: Verb, detail: str, adds: list[Part], schema: pa.Schema, by: tuple[str, ...]
) -> Change:
    """Make a version of a draft, with other columns and partitions where these are given."""
    base, writer = draft.base, draft.writer
    same = not draft.removes and not adds and schema == base.schema and by == base.log.partition_by
    opened = base
    if not same and not draft.dry_run:
        rows = sum(draft.counts.get(what, 0) for what in ("updated", "inserted", "deleted"))
        info = {TOKEN: writer.token, "lepton_detail": detail[:2000], "lepton_rows": str(rows)}
        try:
            version = commit(
                store, base.name, base=base.log, mode=verb, schema=schema, adds=adds, removes=draft.removes,
                partition_by=by, info=info,
            )  # fmt: skip
        except UnavailableError:
            raise  # the version may have been written after all: then its files must stay
        except LeptonError:
            writer.discard()
            raise
        opened = open_table(store, base.name, version)
    gone, came = sum(part.rows for part in draft.removes), sum(part.rows for part in adds)
    return Change(
        table=base.name, verb=verb, base=base.version, version=opened.version, rows_before=base.num_rows,
        rows_after=base.num_rows - gone + came, files_added=len(adds), files_removed=len(draft.removes),
        bytes_added=sum(part.size for part in adds), fingerprint=opened.fingerprint(), dry_run=draft.dry_run,
        **draft.counts,
    )  # fmt: skip


def part_rows(store: Store, base: Table, part: Part) -> pa.Table:
    """The checked rows of a data file, with the columns of the table."""
    data, _ = read_part(store, f"datasets/{base.name}", part.name)
    return fitted(decode_part(data, f"data file {part.name}"), base.schema, part.partition)


def check_values(rows: pa.Table, verb: Verb) -> None:
    """Raise UsageError where rows hold what a table never holds: see `Cleaner`."""
    if KEY not in rows.column_names:  # a table that another program made
        rows = rows.append_column(KEY, pa.array(range(rows.num_rows)).cast(pa.string()))
    cleaner = Cleaner(CleaningSettings(drop_duplicates=False, drop_missing=False))
    kept = cleaner.clean(rows)
    if cleaner.report.invalid:
        first = rows.filter(pc.invert(pc.is_in(rows[KEY], value_set=kept[KEY].combine_chunks())))[KEY][0].as_py()
        reasons = ", ".join(f"{count} x {reason}" for reason, count in cleaner.report.reasons.items())
        raise UsageError(f"{verb}: row {KEY} {shown(first)} would be invalid ({shown(reasons, 200)}); nothing is done")


def _check_columns(base: Table, names: list[str]) -> None:
    for name in names:
        if name not in base.schema.names:
            has = shown(", ".join(base.schema.names), 200)
            raise UsageError(f"table {base.ref}: no column {shown(name)}; it has {has}")
        if name == KEY:
            raise UsageError(f"table {base.ref}: {KEY} names a row and stays; delete the row and append it anew")
        if name in base.log.partition_by:
            raise UsageError(
                f"table {base.ref}: column {shown(name)} says which file a row is in and stays; merge the rows instead"
            )


def _updated(store: Store, draft: Draft, expressions: Expressions, assignments: Mapping[str, str]) -> None:
    columns = list(assignments)
    for part in draft.files():
        rows = part_rows(store, draft.base, part)
        picked = expressions.pick(rows)
        draft.count("matched", len(picked.positions))
        if not len(picked.positions):
            continue
        before = rows.select(columns).take(pa.array(picked.positions))
        after = pa.table(picked.values, schema=before.schema)
        differs = (hash_rows(before) != hash_rows(after)).any(axis=1)
        draft.count("updated", int(differs.sum()))
        if not differs.any():
            continue
        changed = with_values(rows, picked.positions, after)
        check_values(changed.take(pa.array(picked.positions[differs])), "update")
        draft.replace(part, changed)


def with_values(rows: pa.Table, positions: np.ndarray[Any, np.dtype[np.int64]], values: pa.Table) -> pa.Table:
    """Rows with the columns of `values` in place of theirs at some positions."""
    take = np.arange(rows.num_rows)
    take[positions] = rows.num_rows + np.arange(len(positions))
    for name in values.column_names:
        both = pa.chunked_array([*rows[name].chunks, *values[name].chunks], rows[name].type)
        rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), both.take(pa.array(take)))
    return rows


def _deleted(store: Store, draft: Draft, expressions: Expressions) -> None:
    for part in draft.files():
        rows = part_rows(store, draft.base, part)
        picked = expressions.pick(rows)
        draft.count("matched", len(picked.positions))
        draft.count("deleted", len(picked.positions))
        if len(picked.positions):
            stays = np.ones(rows.num_rows, bool)
            stays[picked.positions] = False
            draft.replace(part, rows.filter(pa.array(stays)))
