"""Versioned tables: open one at a version, read it, query it, and fill it from a source.

A table lies under `datasets/<name>` of the store. Each ingest that writes something makes a new version, at once or not
at all; a version never changes, so `digits@3` names the same rows for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import pyarrow as pa

from lepton_ray.data.cleaning import Cleaner, CleaningReport
from lepton_ray.data.delta import TOKEN, Log, commit, open_log
from lepton_ray.data.ingest_checks import check_share, check_strict
from lepton_ray.data.parts import PartWriter, decode_part, read_part
from lepton_ray.data.sources import Rejected, Source, arrow_of, open_source
from lepton_ray.errors import LeptonError, NotFoundError, UnavailableError, UsageError, shown
from lepton_ray.settings.reading import ReadingSettings
from lepton_ray.settings.tree import CleaningSettings, check_name
from lepton_ray.storage import Store

Mode = Literal["create", "append", "overwrite"]
Progress = Callable[[int, float | None], None]
"""Called with the rows read so far and the share of the source that they are, None where nobody knows."""
REJECTED_TOLD = 100
"""Rejected rows that a report names one by one."""


class Table:
    """One version of a table."""

    def __init__(self, store: Store, name: str, log: Log) -> None:
        self._store, self._log = store, log
        self._digests: dict[str, str] = {}  # SHA-256 of data files read so far
        self.name = name
        self.version: int = log.version
        self.schema: pa.Schema = log.schema
        self.num_rows: int = sum(part.rows for part in log.parts)

    @property
    def ref(self) -> str:
        """`name@version`, as `open_table` takes it."""
        return f"{self.name}@{self.version}"

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows, in the order they were written, with the columns asked for (all where None).

        Raises UsageError for a column that is not there, IntegrityError naming a data file that is gone or damaged,
        RefusedError for Arrow extension types.
        """
        return pa.concat_tables(self.batches(columns)) if self._log.parts else self._columns(columns).empty_table()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows as `read` gives them, one data file at a time."""
        schema = self._columns(columns)
        for part in self._log.parts:
            data, digest = read_part(self._store, f"datasets/{self.name}", part.name)
            self._digests[part.name] = digest
            yield decode_part(data, f"data file {part.name}", schema.names).select(schema.names).cast(schema)

    def _columns(self, names: Sequence[str] | None) -> pa.Schema:
        if names is None:
            return self.schema
        for name in names:
            if name not in self.schema.names:
                has = ", ".join(self.schema.names)
                raise UsageError(f"table {self.ref}: no column {shown(name)}; it has {shown(has, 200)}")
        return pa.schema([self.schema.field(name) for name in names])

    def query(self, sql: str, limit: int | None = None) -> pa.Table:
        """The result of one SELECT over this table, which goes by the names `t` and its own (quoted if it has a '-').

        Args:
            sql: the statement; one that could write is refused.
            limit: rows of the result at most; the query ends when it has them.

        Raises RefusedError for a statement that is no SELECT, UsageError for one that fails.
        """
        found: list[pa.RecordBatch] = []
        missing = limit
        for batch in self._log.query(sql):
            found.append(batch if missing is None else batch.slice(0, missing))
            if missing is not None:
                missing -= len(found[-1])
                if missing <= 0:
                    break
        return pa.Table.from_batches(found) if found else pa.table({})

    def history(self) -> list[dict[str, Any]]:
        """The versions up to this one, newest first.

        Each with `version`, `time` (unix seconds), `mode`, `source`, `source_sha256` and `rows` (written by it). What
        another program wrote into the log has its operation as `mode`, and None for the last three.
        """
        return [
            {
                "version": entry["version"],
                "time": entry.get("timestamp", 0) / 1000,
                "mode": entry.get("lepton_mode", str(entry.get("operation", "")).lower()),
                "source": entry.get("lepton_source"),
                "source_sha256": entry.get("lepton_source_sha256"),
                "rows": int(entry["lepton_rows"]) if "lepton_rows" in entry else None,
            }
            for entry in self._log.history()
        ]

    def fingerprint(self) -> str:
        """SHA-256 over the schema and the SHA-256 of each data file's bytes, in order.

        The same version has the same fingerprint wherever and whenever it is opened; the same rows ingested the same
        way have it in every store. Data files not read yet are read now, so a damaged one is found.
        """
        digest = hashlib.sha256(self._log.schema_json.encode())
        for part in self._log.parts:
            if part.name not in self._digests:
                _, self._digests[part.name] = read_part(self._store, f"datasets/{self.name}", part.name)
            digest.update(bytes.fromhex(self._digests[part.name]))
        return digest.hexdigest()


def open_table(store: Store, ref: str, version: int | None = None) -> Table:
    """A table at a version.

    Args:
        store: where it is.
        ref: `name` or `name@version`.
        version: the version, where `ref` has none; the newest where neither says.

    Raises NotFoundError for a table or version that does not exist, UsageError for what is no name.
    """
    name, at, number = ref.partition("@")
    _check_name(name)
    if at:
        if not re.fullmatch(r"[0-9]{1,18}", number) or (version is not None and version != int(number)):
            raise UsageError(f"table {shown(ref)}: expected name@version, with one version, e.g. digits@3")
        version = int(number)
    return Table(store, name, open_log(store, name, version))


def list_tables(store: Store) -> list[str]:
    """The names of the tables of a store, sorted."""
    return [name for name in store.list_names("datasets") if store.list(f"datasets/{name}/_delta_log")]


def _check_name(name: str) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise UsageError(f"table {shown(name)}: {error}") from error


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
    reading: ReadingSettings = ReadingSettings(),  # noqa: B008 - frozen
    strict: bool = False,
    progress: Progress | None = None,
) -> IngestReport:
    """Clean the rows of a source and write them as a new version of a table.

    Args:
        store: where the table is or will be.
        name: of the table.
        source: what `sources.open_source` takes.
        mode: `create` makes the table; `append` adds rows of the same schema, leaving out those that are in the table
            already; `overwrite` makes a version of the new rows alone, of whatever schema.
        cleaning: what is left out.
        reading: format, types and limits of the source.
        strict: a row that would be left out, or a warning, is an error.
        progress: told how far it is.

    Raises UsageError for a source, rows or mode that do not fit, NotFoundError where there is no table to append to,
    ConflictError when somebody else wrote to the table meanwhile. Nothing is written then: data files of a failed
    ingest are removed, and what a killed one leaves belongs to no version.
    """
    _check_name(name)
    base = _base(store, name, mode)
    cleaner, opened = Cleaner(cleaning), open_source(source, reading)
    store.check_writable()
    if base is not None and mode == "append":
        for rows in base.batches():
            cleaner.remember(rows)
    writer = PartWriter(store, f"datasets/{name}", 0 if base is None else base.version + 1)
    try:
        schema = _write(opened, cleaner, writer, base if mode == "append" else None, progress, reading)
        if strict:
            check_strict(opened, cleaner.report)
    except BaseException:
        with contextlib.suppress(LeptonError):  # the first error is the one to tell
            writer.discard()
        raise
    if not writer.parts:
        return _nothing_written(opened, cleaner.report, base if mode == "append" else None)
    info = {
        TOKEN: writer.token,
        "lepton_mode": mode,
        "lepton_source": opened.name,
        "lepton_source_sha256": opened.digest,
        "lepton_rows": str(cleaner.report.rows_written),
    }
    log = None if base is None else base._log  # noqa: SLF001 - same file
    try:
        version = commit(
            store, name, schema, writer.parts, base=log, mode="append" if mode == "create" else mode, info=info
        )
    except UnavailableError:
        raise  # the version may have been written after all: then its files must stay
    except LeptonError:
        writer.discard()
        raise
    return _report(open_table(store, name, version), opened, cleaner.report)


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


def _write(
    opened: Source,
    cleaner: Cleaner,
    writer: PartWriter,
    appended_to: Table | None,
    progress: Progress | None,
    reading: ReadingSettings,
) -> pa.Schema:
    """Clean and write all batches; returns their schema."""
    batches, most = opened.batches, reading.limits.max_rejected_share
    first = next(batches, None)
    cleaner.keys_are_distinct = opened.made_keys and appended_to is None
    schema = appended_to.schema if appended_to is not None else first.schema if first is not None else pa.schema([])
    if appended_to is not None and first is not None and not first.schema.equals(schema):
        raise UsageError(
            f"table {appended_to.ref}: rows with other columns, {shown(_columns_of(first.schema), 200)}; "
            f"expected {shown(_columns_of(schema), 200)}; use another table, or --overwrite"
        )
    for rows in chain([] if first is None else [first], batches):
        writer.add(cleaner.clean(rows))
        check_share(opened, cleaner.report.rows_read, most, at_end=False)
        if progress is not None:
            progress(cleaner.report.rows_read, opened.meter.share)
    check_share(opened, cleaner.report.rows_read, most, at_end=True)
    writer.flush()
    if cleaner.report.rows_read == 0:
        raise UsageError(f"source {shown(opened.name)}: no rows in it; give one with rows")
    return schema


def _columns_of(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _nothing_written(opened: Source, found: CleaningReport, appended_to: Table | None) -> IngestReport:
    """All rows of an append were there already: fine. A new version without rows: an error."""
    if appended_to is not None and found.duplicates:
        return _report(appended_to, opened, found)
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.reasons.most_common(5))
    raise UsageError(f"source {shown(opened.name)}: none of {found.rows_read} rows is left after cleaning ({reasons})")


def _report(table: Table, opened: Source, found: CleaningReport) -> IngestReport:
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
    )
