"""One version of a table: opened by number or time, read, queried, told from others by its fingerprint."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from lepton_ray.data.delta import Log, log_folder, open_log, version_at
from lepton_ray.data.evolution import fitted
from lepton_ray.data.parts import decode_part, read_part
from lepton_ray.errors import NotFoundError, UsageError, shown
from lepton_ray.settings.tree import check_name
from lepton_ray.storage import Store


class Table:
    """One version of a table."""

    def __init__(self, store: Store, name: str, log: Log) -> None:
        self._store = store
        self.log = log
        """The log that it was opened from."""
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
        return pa.concat_tables(self.batches(columns)) if self.log.parts else self._columns(columns).empty_table()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows as `read` gives them, one data file at a time."""
        schema = self._columns(columns)
        for part in self.log.parts:
            data, digest = read_part(self._store, f"datasets/{self.name}", part.name)
            self._digests[part.name] = digest
            yield fitted(decode_part(data, f"data file {part.name}", schema.names), schema, part.partition)

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
        for batch in self.log.query(sql):
            found.append(batch if missing is None else batch.slice(0, missing))
            if missing is not None:
                missing -= len(found[-1])
                if missing <= 0:
                    break
        return pa.Table.from_batches(found) if found else pa.table({})

    def history(self) -> list[dict[str, Any]]:
        """The versions up to this one, newest first.

        Each with `version`, `time` (unix seconds), `mode`, `source`, `source_sha256`, `rows` (written, changed or taken
        away by it), `detail` (e.g. the condition of a delete) and `readable` (whether its data files are there). What
        another program wrote into the log has its operation as `mode`, and None for what it does not say.
        """
        return [
            {
                "version": entry["version"],
                "time": entry.get("timestamp", 0) / 1000,
                "mode": entry.get("lepton_mode", str(entry.get("operation", "")).lower()),
                "source": entry.get("lepton_source"),
                "source_sha256": entry.get("lepton_source_sha256"),
                "rows": int(entry["lepton_rows"]) if "lepton_rows" in entry else None,
                "detail": entry.get("lepton_detail"),
                "readable": entry["readable"],
            }
            for entry in self.log.history()
        ]

    def fingerprint(self) -> str:
        """SHA-256 over the schema and the SHA-256 of each data file's bytes, in order.

        The same version has the same fingerprint wherever and whenever it is opened; the same rows ingested the same
        way have it in every store. Data files not read yet are read now, so a damaged one is found.
        """
        digest = hashlib.sha256(self.log.schema_json.encode())
        for part in self.log.parts:
            if part.name not in self._digests:
                _, self._digests[part.name] = read_part(self._store, f"datasets/{self.name}", part.name)
            digest.update(bytes.fromhex(self._digests[part.name]))
        return digest.hexdigest()


def open_table(store: Store, ref: str, version: int | None = None) -> Table:
    """A table at a version.

    Args:
        store: where it is.
        ref: `name`, `name@version`, or `name@time` for what was the newest version then, e.g.
            `digits@2026-11-22T10:00:00Z` (UTC where it has no offset).
        version: the version, where `ref` has none; the newest where neither says.

    Raises NotFoundError for a table or version that does not exist, UsageError for what is no name.
    """
    name, at, when = ref.partition("@")
    check_table_name(name)
    if at and re.fullmatch(r"[0-9]{1,18}", when) and version in (None, int(when)):
        version = int(when)
    elif at and version is None and (time := _time(when)) is not None:
        if not store.list(log_folder(name)):
            raise NotFoundError(f"table {shown(name)}: not in store {store.uri}; see lepton-ray data list")
        version = version_at(store, name, time)
    elif at:
        raise UsageError(
            f"table {shown(ref)}: expected name@version or name@time, with one version, e.g. digits@3 or "
            "digits@2026-11-22T10:00:00Z"
        )
    return Table(store, name, open_log(store, name, version))


def _time(text: str) -> dt.datetime | None:
    """A date with or without a time of day, in UTC where it says nothing else; None for anything else."""
    if not re.match(r"\d{4}-\d{2}-\d{2}", text):
        return None
    try:
        time = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=dt.UTC)


def list_tables(store: Store) -> list[str]:
    """The names of the tables of a store, sorted."""
    return [name for name in store.list_names("datasets") if store.list(f"datasets/{name}/_delta_log")]


def check_table_name(name: str) -> None:
    """Raise UsageError unless it is a name that a table may have."""
    try:
        check_name(name)
    except ValueError as error:
        raise UsageError(f"table {shown(name)}: {error}") from error
