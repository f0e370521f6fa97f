"""Versioned tables, and how they are filled from a source.

A table lies under `datasets/<name>` of the store. Each change makes a new version, at once or not at all; a version
never changes, so `digits@3` names the same rows for ever. What else is done to tables is in `edits` (update, delete),
`merging`, `upkeep` (restore, compact) and `retention` (vacuum).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import pyarrow as pa

from lepton_ray.data.cleaning import Cleaner, CleaningReport
from lepton_ray.data.commits import TOKEN, commit, retried
from lepton_ray.data.evolution import fitted, joined_schema
from lepton_ray.data.ingest_checks import check_share, check_strict
from lepton_ray.data.partitions import check_partition_columns
from lepton_ray.data.parts import PartWriter
from lepton_ray.data.sources import Rejected, Source, arrow_of, open_source
from lepton_ray.data.versions import Table, check_table_name, list_tables, open_table
from lepton_ray.errors import LeptonError, NotFoundError, UnavailableError, UsageError, shown
from lepton_ray.settings.reading import ReadingSettings
from lepton_ray.settings.tree import CleaningSettings
from lepton_ray.storage import Store

__all__ = ["IngestReport", "Mode", "Table", "arrow_of", "ingest", "list_tables", "open_table", "table_of"]

Mode = Literal["create", "append", "overwrite"]
Progress = Callable[[int, float | None], None]
"""Called with the rows read so far and the share of the source that they are, None where nobody knows."""
REJECTED_TOLD = 100
"""Rejected rows that a report names one by one."""


@dataclass(frozen=True)
class IngestReport:
    """What an ingest found and did. See CleaningReport for how rows are counted."""

    table: str
    version: int
    """The version written; the one that was there where no row was left to write."""
    source: str
    source_sha256: str
    rows_read: int
    rows_written: int
    duplicates: int
    missing: int
    invalid: int
    rejected: int
    """Rows or files that could not be read, or were beyond a limit."""
    reasons: dict[str, int]
    labels: dict[str, int]
    """Rows written by label."""
    rejected_rows: list[Rejected]
    """The first 100 of them: file, row, rule, reason."""
    ignored_files: dict[str, int]
    """Files of a folder that are not of its format, by ending."""
    warnings: list[str]
    fingerprint: str
    """Of the version."""
    rows_before: int = 0
    """In the newest version when the ingest began; an overwrite leaves them to the older versions."""
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def ingest(
    store: Store,
    name: str,
    source: Any,
    *,
    mode: Mode = "create",
    cleaning: CleaningSettings = CleaningSettings(),  # noqa: B008 - frozen
    evolve: bool = False,
    partition_by: Sequence[str] = (),
    dry_run: bool = False,
    reading: ReadingSettings = ReadingSettings(),  # noqa: B008 - frozen
    strict: bool = False,
    progress: Progress | None = None,
) -> IngestReport:
    """Clean the rows of a source and write them as a new version of a table.

    Args:
        store: where the table is or will be.
        name: of the table.
        source: what `sources.open_source` takes.
        mode: `create` makes the table; `append` adds rows of the same columns, leaving out those that are in the table
            already; `overwrite` makes a version of the new rows alone, of whatever columns.
        cleaning: what is left out.
        evolve: an append may bring new columns, lack some, and have narrower numbers; see `evolution`.
        partition_by: columns whose values get data files of their own, for queries that ask for some of them; an
            append keeps those of the table, an overwrite too where none are given.
        dry_run: read and clean, and report what would be written to a table that exists; the version is then the one
            that is there.
        reading: format, types and limits of the source.
        strict: a row that would be left out, or a warning, is an error.
        progress: told how far it is.

    Raises UsageError for a source, rows or mode that do not fit, NotFoundError where there is no table to append to,
    ConflictError when somebody else wrote to the table meanwhile (an append is then done anew, 20 times). Nothing is
    written then: data files of a failed ingest are removed, and what a killed one leaves belongs to no version.
    """
    check_table_name(name)
    by = tuple(partition_by)
    asked = _Asked(store, name, source, mode, cleaning, evolve, by, dry_run, reading, strict, progress)
    return retried(lambda: _ingest(asked)) if mode == "append" else _ingest(asked)


@dataclass(frozen=True)
class _Asked:
    """What `ingest` was asked for."""

    store: Store
    name: str
    source: Any
    mode: Mode
    cleaning: CleaningSettings
    evolve: bool
    partition_by: tuple[str, ...]
    dry_run: bool
    reading: ReadingSettings
    strict: bool
    progress: Progress | None


def _ingest(asked: _Asked) -> IngestReport:
    """One try on the newest version."""
    store, name, mode = asked.store, asked.name, asked.mode
    base = _base(store, name, mode)
    if asked.dry_run and base is None:
        raise UsageError(f"table {shown(name)}: a dry run of its creation destroys nothing; leave out --dry-run")
    cleaner, opened = Cleaner(asked.cleaning), open_source(asked.source, asked.reading)
    store.check_writable()
    appended_to = base if mode == "append" else None
    if appended_to is not None and asked.partition_by not in ((), appended_to.log.partition_by):
        raise UsageError(f"table {appended_to.ref}: rows are appended by its own partitions; leave out --partition-by")
    by = asked.partition_by or (base.log.partition_by if base is not None else ())
    writer = PartWriter(store, f"datasets/{name}", 0 if base is None else base.version + 1, by, dry=asked.dry_run)
    try:
        schema = _write(opened, cleaner, writer, appended_to, asked)
        if asked.strict:
            check_strict(opened, cleaner.report)
    except BaseException:
        with contextlib.suppress(LeptonError):  # the first error is the one to tell
            writer.discard()
        raise
    if not writer.parts:
        return _nothing_written(opened, cleaner.report, appended_to)
    if asked.dry_run and base is not None:
        return _report(base, opened, cleaner.report, base, dry_run=True)
    info = {
        TOKEN: writer.token,
        "lepton_source": opened.name,
        "lepton_source_sha256": opened.digest,
        "lepton_rows": str(cleaner.report.rows_written),
    }
    removes = base.log.parts if base is not None and mode == "overwrite" else []
    log = None if base is None else base.log
    try:
        version = commit(
            store, name, base=log, mode=mode, schema=schema, adds=writer.parts, removes=removes,
            partition_by=writer.partition_by, info=info,
        )  # fmt: skip
    except UnavailableError:
        raise  # the version may have been written after all: then its files must stay
    except LeptonError:
        writer.discard()
        raise
    return _report(open_table(store, name, version), opened, cleaner.report, base)


def table_of(store: Store, name: str, rows: Any) -> Table:
    """The version of a table that holds just these rows; written where no version does.

    Args:
        store: where the table is or will be.
        name: of the table.
        rows: an Arrow table, or what can become one: a pandas or polars frame, a Hugging Face or Ray data set.

    Raises UsageError for anything else.
    """
    source = open_source(arrow_of(rows))
    try:
        newest = open_table(store, name)
    except NotFoundError:
        return open_table(store, name, ingest(store, name, arrow_of(rows)).version)
    for entry in newest.history():
        if entry.get("source_sha256") == source.digest and entry.get("mode") != "append":
            return open_table(store, name, entry["version"])
    return open_table(store, name, ingest(store, name, arrow_of(rows), mode="overwrite").version)


def _base(store: Store, name: str, mode: Mode) -> Table | None:
    """The newest version of the table, None where `create` may make it."""
    try:
        base = open_table(store, name)
    except NotFoundError:
        if mode == "create":
            return None
        raise NotFoundError(f"table {shown(name)}: not in store {store.uri}; leave out --{mode} to create it") from None
    if mode == "create":
        raise UsageError(
            f"table {base.ref}: exists; use --append to add rows, --overwrite for a new version, or a new name"
        )
    return base


def _write(opened: Source, cleaner: Cleaner, writer: PartWriter, appended_to: Table | None, asked: _Asked) -> pa.Schema:
    """Clean and write all batches; returns their schema."""
    batches, most = opened.batches, asked.reading.limits.max_rejected_share
    first = next(batches, None)
    cleaner.keys_are_distinct = opened.made_keys and appended_to is None
    schema = first.schema if first is not None else pa.schema([])
    if asked.partition_by and first is not None:
        check_partition_columns(schema, asked.partition_by, f"table {shown(asked.name)}")
    elif not set(writer.partition_by) <= set(schema.names) and appended_to is None:
        writer.partition_by = ()  # those of the rows that are overwritten
    if appended_to is not None and first is not None:
        schema = joined_schema(appended_to.schema, schema, appended_to.ref, evolve=asked.evolve)
        told = [field for field in schema if field.name in first.column_names]
        for rows in appended_to.batches():
            # where the source has fewer columns, a row that equals one of the table in all of them is there already
            cleaner.remember(fitted(rows, pa.schema(told)))
    for rows in chain([] if first is None else [first], batches):
        # before columns are filled up: one that the source does not have is no missing value
        cleaned = cleaner.clean(rows.select([name for name in schema.names if name in rows.column_names]))
        writer.add(fitted(cleaned, schema))
        check_share(opened, cleaner.report.rows_read, most, at_end=False)
        if asked.progress is not None:
            asked.progress(cleaner.report.rows_read, opened.meter.share)
    check_share(opened, cleaner.report.rows_read, most, at_end=True)
    writer.flush()
    if cleaner.report.rows_read == 0:
        raise UsageError(f"source {shown(opened.name)}: no rows in it; give one with rows")
    return schema


def _nothing_written(opened: Source, found: CleaningReport, appended_to: Table | None) -> IngestReport:
    """All rows of an append were there already: fine. A new version without rows: an error."""
    if appended_to is not None and found.duplicates:
        return _report(appended_to, opened, found, appended_to)
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.reasons.most_common(5))
    raise UsageError(f"source {shown(opened.name)}: none of {found.rows_read} rows is left after cleaning ({reasons})")


def _report(
    table: Table, opened: Source, found: CleaningReport, base: Table | None, *, dry_run: bool = False
) -> IngestReport:
    rejects = opened.rejects
    return IngestReport(
        table=table.name,
        version=table.version,
        source=opened.name,
        source_sha256=opened.digest,
        rows_read=found.rows_read + rejects.total,
        rows_written=found.rows_written,
        duplicates=found.duplicates,
        missing=found.missing,
        invalid=found.invalid,
        rejected=rejects.total,
        reasons=dict((found.reasons + rejects.counts).most_common()),
        labels=dict(sorted(found.labels.items())),
        rejected_rows=rejects.rows[:REJECTED_TOLD],
        ignored_files=dict(sorted(opened.ignored.items(), key=lambda kind: (-kind[1], kind[0]))),
        warnings=opened.warnings,
        fingerprint=table.fingerprint(),
        rows_before=0 if base is None else base.num_rows,
        dry_run=dry_run,
    )
