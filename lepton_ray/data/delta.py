"""The log of a table: which data files make up which version. The only file that knows the Delta Lake library.

The log is Delta Lake's, so other tools read these tables; the data files are written and read by `parts`, so that their
bytes are checked. A version exists from the moment its log entry does, and that is written at once or not at all.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, QueryBuilder, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from lepton_ray.data.parts import Part
from lepton_ray.errors import (
    ConflictError,
    IntegrityError,
    LeptonError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
    shown,
)
from lepton_ray.storage import Store

TOKEN = "lepton_token"  # noqa: S105 - names an ingest, opens nothing
"""The entry of a commit by which a writer knows its own."""
MAX_SQL = 100_000
"""Characters of a query at most."""
# possessive, so that a thousand comments do not take for ever
_FIRST_WORD = re.compile(r"(?:\s|--[^\n]*+\n?|/\*.*?\*/|\()*+([A-Za-z]+)", re.DOTALL)
_WRITING_WORD = re.compile(r"\b(insert|update|delete|merge|copy|create|drop|alter|truncate|into)\b", re.IGNORECASE)
_READABLE_FEATURES = {"timestampNtz"}
# the library's own patience with a server that hangs is three minutes and more
_PATIENCE = {"timeout": "30s", "connect_timeout": "5s", "max_retries": "5", "retry_timeout": "30s"}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
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
            actions = pa.table(table.get_add_actions()).to_pylist()
        files = sorted((action["path"], action["num_records"], action["size_bytes"]) for action in actions)
        if any(rows is None for _, rows, _ in files):
            raise RefusedError(f"table {name}: a data file without a row count; ingest the table with this program")
        self.parts = [Part(path, size, rows) for path, rows, size in files]

    def _refuse_foreign_features(self) -> None:
        """What another program may have written and this reader would read wrongly, e.g. deleted rows as present."""
        protocol, metadata = self._table.protocol(), self._table.metadata()
        beyond = set(protocol.reader_features or ()) - _READABLE_FEATURES
        if protocol.min_reader_version == 2:
            beyond.add("columnMapping")
        if metadata.partition_columns:
            beyond.add("partition columns")
        if beyond:
            raise RefusedError(f"table {self._name}: uses {', '.join(sorted(beyond))}; ingest it with this program")

    def write(self, adds: Sequence[AddAction], mode: str, schema: Schema, properties: CommitProperties) -> None:
        """Write the next version of the log; for `commit` alone, which knows what an error means."""
        actions: list[AddAction | RemoveAction] = [*adds]
        self._table.create_write_transaction(actions, mode, schema, commit_properties=properties)

    def history(self) -> list[dict[str, Any]]:
        """What the log says about each commit up to this version, newest first, with the `version` it made.

        Read entry by entry: the library numbers them wrongly where somebody commits meanwhile.
        """
        folder = _log_folder(self._name)
        names = sorted(re.findall(r"^(\d{20})\.json$", "\n".join(self._store.list_names(folder)), re.MULTILINE))
        versions = [int(name) for name in reversed(names) if int(name) <= self.version]
        return [{**(commit_info(self._store, self._name, at) or {}), "version": at} for at in versions]

    def query(self, sql: str) -> Iterator[pa.RecordBatch]:
        """The result of a SELECT in which the table goes by its name and `t`, batch by batch."""
        refuse_writing(sql)
        try:
            builder = QueryBuilder()
            for name in {"t", self._name}:
                builder.register(name, self._table)
            yield from pa.RecordBatchReader.from_stream(builder.execute(sql))
        except (DeltaError, pa.ArrowException, OSError) as error:
            raise _query_error(self._name, error) from error
        except BaseException as error:
            # a panic of the engine is no Exception in its binding; Ctrl-C and the like pass
            if type(error).__name__ != "PanicException":
                raise
            raise UsageError(f"query: the engine failed, {shown(str(error), 200)}; put it another way") from error


def open_log(store: Store, name: str, version: int | None = None) -> Log:
    """The log of a table at a version (the newest where none is given).

    Raises NotFoundError for a table or version that does not exist, IntegrityError for a log that cannot be read.
    """
    folder = f"datasets/{name}"
    if not store.list(_log_folder(name)):  # asked of the store first: it says at once when a remote is away
        raise NotFoundError(f"table {shown(name)}: not in store {store.uri}; see lepton-ray data list")
    with errors_of(name):
        uri, options = store.delta_uri(folder), _options(store)
        table = DeltaTable(uri, storage_options=options)
        newest = table.version()
        if version is not None and not 0 <= version <= newest:
            raise NotFoundError(f"table {shown(name)}: no version {version}; it has 0 to {newest}")
        if version is not None and version != newest:
            table = DeltaTable(uri, version=version, storage_options=options)
    return Log(store, name, table)


def commit(
    store: Store,
    name: str,
    schema: pa.Schema,
    parts: Sequence[Part],
    *,
    base: Log | None,
    mode: str,
    info: dict[str, str],
) -> int:
    """Make data files a new version of a table.

    Args:
        store: where the table is.
        name: its name.
        schema: of the data files.
        parts: the files, which must be there already.
        base: the version on which they were prepared; None makes the table.
        mode: `append` or `overwrite`; nothing else where base is None.
        info: kept in the log beside the version; holds a `TOKEN` that no other commit has.

    Returns:
        The number of the version.

    Raises ConflictError when somebody else committed since `base`, UnavailableError when a remote is away and it is
    not known whether the commit went through.
    """
    now_ms = int(time.time() * 1000)
    adds = [AddAction(part.name, part.size, {}, now_ms, True, json.dumps({"numRecords": part.rows})) for part in parts]
    version = 0 if base is None else base.version + 1
    try:
        with errors_of(name):
            delta_schema = Schema.from_arrow(schema)
            # no retry on top of others' commits: duplicates and keys were checked against `base`
            properties = CommitProperties(custom_metadata=dict(info), max_commit_retries=0)
            if base is None:
                uri, options = store.delta_uri(f"datasets/{name}"), _options(store)
                create_table_with_add_actions(
                    uri, delta_schema, adds, name=name, storage_options=options, commit_properties=properties
                )
            else:
                base.write(adds, mode, delta_schema, properties)
    except LeptonError as error:
        # the answer to a commit that went through may be lost, and its second try then meets the first
        committed = commit_info(store, name, version)
        if committed is None:
            raise
        if committed.get(TOKEN) != info[TOKEN]:
            raise ConflictError(
                f"table {shown(name)}: somebody else wrote version {version} first; try again"
            ) from error
    return version


def commit_info(store: Store, name: str, version: int) -> dict[str, Any] | None:
    """What the log says about the commit that made a version; None where there is no such version.

    Raises UnavailableError when a remote is away.
    """
    try:
        entry = store.get(f"{_log_folder(name)}/{version:020d}.json")
    except NotFoundError:
        return None
    for line in entry.splitlines():
        with contextlib.suppress(ValueError, AttributeError):
            info = json.loads(line).get("commitInfo")
            if isinstance(info, dict):
                return info
    return {}


def _log_folder(name: str) -> str:
    return f"datasets/{name}/_delta_log"


def refuse_writing(sql: str) -> None:
    """Raise RefusedError for a statement that could write: the engine would copy rows to any file of this machine."""
    if len(sql) > MAX_SQL:
        raise UsageError(f"query of {len(sql)} characters: at most {MAX_SQL}")
    word = _FIRST_WORD.match(sql)
    first = word[1].lower() if word else ""
    if first not in ("select", "with"):
        raise RefusedError(f"query {shown(sql)}: only SELECT is carried out; rows are changed by ingesting them anew")
    # SELECT cannot contain a writing statement, WITH can begin one; quotes and comments are not looked into, since
    # what this would take for quoted the engine might not
    if first == "with" and (writing := _WRITING_WORD.search(sql)):
        raise RefusedError(f"query {shown(sql)}: the word {writing[0].upper()} may not stand in a WITH query")


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """The library's errors in the house's own words."""
    try:
        yield
    except TableNotFoundError as error:
        raise NotFoundError(f"table {shown(name)}: no such table or version; see lepton-ray data list") from error
    except CommitFailedError as error:
        raise ConflictError(f"table {shown(name)}: somebody else changed it at the same time; try again") from error
    except (DeltaError, OSError, ValueError, pa.ArrowException) as error:
        reason = _reason(error, 200)
        if _DENIED.search(str(error)):
            raise UsageError(f"table {shown(name)}: not allowed, {reason}; check the rights of this user") from error
        if _AWAY.search(str(error)):
            raise UnavailableError(f"table {shown(name)}: the store does not answer, {reason}; try again") from error
        raise IntegrityError(f"table {shown(name)}: its log cannot be used, {reason}") from error


def _reason(error: BaseException, limit: int) -> str:
    """The library's words in one line, without its colours."""
    return shown(" ".join(_COLOUR.sub("", str(error)).split()), limit)


def _options(store: Store) -> dict[str, str]:
    options = store.delta_options()
    return {**_PATIENCE, **options} if options else {}  # a local store takes none


def _query_error(name: str, error: BaseException) -> LeptonError:
    """A query fails through its own words, or through what lies beneath the table."""
    text, reason = str(error), _reason(error, 300)
    if _AWAY.search(text):
        return UnavailableError(f"table {shown(name)}: the store does not answer, {reason}; try again")
    if re.search(r"parquet|object.?store|No such file", text, re.IGNORECASE):
        return IntegrityError(f"table {shown(name)}: a data file cannot be read, {reason}")
    return UsageError(f"query: {reason}; the table is called {shown(name)} or t")
