"""The log of a table: which data files make up which version, as the Delta Lake library reads it.

The log is Delta Lake's, so other tools read these tables; the data files are written and read by `parts`, so that their
bytes are checked. New versions are written by `commits`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError

from lepton_ray.data.partitions import bounds_from, values_of
from lepton_ray.data.parts import Part
from lepton_ray.data.query import one_line, select
from lepton_ray.errors import (
    IntegrityError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
    shown,
)
from lepton_ray.storage import Store

_READABLE_FEATURES = {"timestampNtz"}
# the library's own patience with a server that hangs is three minutes and more
_PATIENCE = {"timeout": "30s", "connect_timeout": "5s", "max_retries": "5", "retry_timeout": "30s"}
_DENIED = re.compile(r"privileges|AccessDenied|Forbidden|Permission denied|SignatureDoesNotMatch", re.IGNORECASE)
_AWAY = re.compile(
    r"error sending request|Error performing [A-Z]+|connection (refused|closed)|timed out", re.IGNORECASE
)


class Log:
    """The log of one version of a table."""

    def __init__(self, store: Store, name: str, table: DeltaTable) -> None:
        self._store, self._name, self._table = store, name, table
        with errors_of(name):
            self.version: int = table.version()
            self.schema_json: str = table.schema().to_json()
            if "ARROW:extension:name" in self.schema_json:
                raise RefusedError(f"table {name}: its log announces an Arrow extension type, which may run code")
            self.schema = pa.schema(table.schema())
            self._refuse_foreign_features()
            self.metadata = table.metadata()
            self.protocol = table.protocol()
            self.partition_by: tuple[str, ...] = tuple(self.metadata.partition_columns)
            actions = pa.table(table.get_add_actions()).to_pylist()
        if any(action["num_records"] is None for action in actions):
            raise RefusedError(f"table {name}: a data file without a row count; ingest the table with this program")
        parts = [
            Part(
                action["path"], action["size_bytes"], action["num_records"], values_of(action.get("partition") or {}),
                bounds_from(action),
            )
            for action in actions
        ]  # fmt: skip
        self.parts = sorted(parts, key=lambda part: part.name)

    def _refuse_foreign_features(self) -> None:
        """What another program may have written and this reader would read wrongly, e.g. deleted rows as present."""
        protocol = self._table.protocol()
        beyond = set(protocol.reader_features or ()) - _READABLE_FEATURES
        if protocol.min_reader_version == 2:
            beyond.add("columnMapping")
        if beyond:
            raise RefusedError(f"table {self._name}: uses {', '.join(sorted(beyond))}; ingest it with this program")

    def history(self) -> list[dict[str, Any]]:
        """What the log says about each commit up to this version, newest first.

        Each with the `version` it made, and whether all data files of that are there (`readable`; None where another
        program took away the beginning of the log). Read entry by entry: the library numbers them wrongly where
        somebody commits meanwhile.
        """
        there = {entry.key.rpartition("/")[2] for entry in self._store.list(f"datasets/{self._name}")}
        found: list[dict[str, Any]] = []
        lost: set[str] = set()
        for at in versions_in(self._store, self._name):
            if at > self.version:
                break
            actions = entry_of(self._store, self._name, at) or []
            for action in actions:
                lost -= {action["remove"]["path"]} if "remove" in action else set()
                added = action["add"]["path"] if "add" in action else None
                lost |= {added} if added is not None and added.rpartition("/")[2] not in there else set()
            about: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
            begun = not found and at == 0
            known = begun or (found and found[-1]["readable"] is not None)
            found.append({**about, "version": at, "readable": not lost if known else None})
        return found[::-1]

    def query(self, sql: str) -> Iterator[pa.RecordBatch]:
        """The result of a SELECT in which the table goes by its name and `t`, batch by batch."""
        yield from select(self.named(), sql, self._name, self.schema)

    def named(self) -> dict[str, DeltaTable]:
        """The table by the names that statements may use."""
        return {"t": self._table, self._name: self._table}

    def unused_files(self, kept: Collection[int], hours: int) -> list[str]:
        """Names of files that neither this version nor a kept one needs and that are older than so many hours.

        The age of a file that some version had is counted from the version that left it out, that of one that no
        version has from when it was written.
        """
        with errors_of(self._name):
            return sorted(
                self._table.vacuum(
                    hours, dry_run=True, enforce_retention_duration=False, full=True, keep_versions=sorted(kept)
                )
            )


def open_log(store: Store, name: str, version: int | None = None) -> Log:
    """The log of a table at a version (the newest where none is given).

    Raises NotFoundError for a table or version that does not exist, IntegrityError for a log that cannot be read.
    """
    if not store.list(log_folder(name)):  # asked of the store first: it says at once when a remote is away
        raise NotFoundError(f"table {shown(name)}: not in store {store.uri}; see lepton-ray data list")
    with errors_of(name):
        uri, options = store.delta_uri(f"datasets/{name}"), _options(store)
        table = DeltaTable(uri, storage_options=options)
        newest = table.version()
        if version is not None and not 0 <= version <= newest:
            raise NotFoundError(f"table {shown(name)}: no version {version}; it has 0 to {newest}")
        if version is not None and version != newest:
            table = DeltaTable(uri, version=version, storage_options=options)
    return Log(store, name, table)


def write_checkpoint(store: Store, name: str) -> None:
    """Sum up the log so far in one file, so that opening a table with many versions stays fast."""
    with errors_of(name):
        DeltaTable(store.delta_uri(f"datasets/{name}"), storage_options=_options(store)).create_checkpoint()


def delta_schema(name: str, schema: pa.Schema) -> str:
    """A schema as the log has it."""
    with errors_of(name):
        found: str = Schema.from_arrow(schema).to_json()
        return found


def log_folder(name: str) -> str:
    """Where the log of a table lies."""
    return f"datasets/{name}/_delta_log"


def versions_in(store: Store, name: str) -> list[int]:
    """The versions that have an entry in the log, ascending."""
    found = [re.fullmatch(r"(\d{20})\.json", entry) for entry in store.list_names(log_folder(name))]
    return sorted(int(match[1]) for match in found if match)


def version_at(store: Store, name: str, time: dt.datetime) -> int:
    """The version that was the newest at a time, by the clock of whoever wrote it.

    Raises NotFoundError where the table did not exist then.
    """
    versions = versions_in(store, name)
    low, high = 0, len(versions)
    while low < high:  # the first that is later; versions are made one after the other
        middle = (low + high) // 2
        info = commit_info(store, name, versions[middle]) or {}
        if info.get("timestamp", 0) / 1000 > time.timestamp():
            high = middle
        else:
            low = middle + 1
    if low == 0:
        raise NotFoundError(f"table {shown(name)}: no version at {time.isoformat()}; see lepton-ray data history")
    return versions[low - 1]


def commit_info(store: Store, name: str, version: int) -> dict[str, Any] | None:
    """What the log says about the commit that made a version; None where there is no such version.

    Raises UnavailableError when a remote is away.
    """
    actions = entry_of(store, name, version)
    if actions is None:
        return None
    return next((action["commitInfo"] for action in actions if isinstance(action.get("commitInfo"), dict)), {})


def entry_of(store: Store, name: str, version: int) -> list[dict[str, Any]] | None:
    """The actions of the log's entry for a version; None where there is none, and without what is no JSON."""
    try:
        entry = store.get(f"{log_folder(name)}/{version:020d}.json")
    except NotFoundError:
        return None
    actions = []
    for line in entry.splitlines():
        with contextlib.suppress(ValueError):
            action = json.loads(line)
            if isinstance(action, dict):
                actions.append(action)
    return actions


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """The library's errors in the house's own words."""
    try:
        yield
    except TableNotFoundError as error:
        raise NotFoundError(f"table {shown(name)}: no such table or version; see lepton-ray data list") from error
    except (DeltaError, OSError, ValueError, pa.ArrowException) as error:
        reason = one_line(error, 200)
        if _DENIED.search(str(error)):
            raise UsageError(f"table {shown(name)}: not allowed, {reason}; check the rights of this user") from error
        if _AWAY.search(str(error)):
            raise UnavailableError(f"table {shown(name)}: the store does not answer, {reason}; try again") from error
        raise IntegrityError(f"table {shown(name)}: its log cannot be used, {reason}") from error


def _options(store: Store) -> dict[str, str]:
    options = store.delta_options()
    return {**_PATIENCE, **options} if options else {}  # a local store takes none
