"""How a new version comes to be: one entry in the log, written at once or not at all.

The entry has the form of the Delta protocol (https://github.com/delta-io/delta/blob/master/PROTOCOL.md). It is put
through the store's own door, where of any number of racing writers exactly one wins and a lost answer is looked after,
and not by the Delta Lake library, which can change the schema of a table only by replacing all of its rows.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from lepton_ray.data.delta import Log, delta_schema, log_folder, write_checkpoint
from lepton_ray.data.parts import Part
from lepton_ray.errors import ConflictError, LeptonError, RefusedError, shown
from lepton_ray.storage import Store

T = TypeVar("T")

TOKEN = "lepton_token"  # noqa: S105 - names a writer, opens nothing
"""The entry of a commit by which it differs from that of any other writer."""
CHECKPOINT_EVERY = 100
"""Versions after which the log is summed up."""
TRIES = 20
"""How often an operation is done anew because others wrote to the table meanwhile."""
_LONGEST_PAUSE_S = 1.0
_NTZ = "timestampNtz"
_WRITABLE_FEATURES = {"appendOnly", "invariants", _NTZ}
_OPERATIONS = {
    "create": "CREATE TABLE", "update": "UPDATE", "delete": "DELETE", "merge": "MERGE", "restore": "RESTORE",
    "compact": "OPTIMIZE",
}  # fmt: skip
"""What other programs call what was done; the rest is a WRITE."""


def commit(
    store: Store,
    name: str,
    *,
    base: Log | None,
    mode: str,
    schema: pa.Schema,
    adds: Sequence[Part],
    removes: Sequence[Part] = (),
    partition_by: Sequence[str] = (),
    info: Mapping[str, str],
) -> int:
    """Make the next version of a table.

    Args:
        store: where the table is.
        name: its name.
        base: the version that the new one was prepared on; None makes the table.
        mode: what is done, for the history.
        schema: of the rows in the new version.
        adds: data files that join, which must be there already.
        removes: data files of the base that leave; they stay in the store, for older versions.
        partition_by: columns whose values the added files have in their `partition`.
        info: kept in the log beside the version; holds a `TOKEN` that no other commit has.

    Returns:
        The number of the version.

    Raises ConflictError when somebody else committed since `base`, UnavailableError when a remote is away and it is
    not known whether the commit went through.
    """
    version, now_ms = 0 if base is None else base.version + 1, int(time.time() * 1000)
    about = {
        "timestamp": now_ms,
        "operation": _OPERATIONS.get(mode, "WRITE"),
        "operationParameters": {},
        "engineInfo": "lepton-ray",
        "lepton_mode": mode,
        **info,
    }
    actions: list[dict[str, Any]] = [{"commitInfo": about}]
    actions += _definition(name, base, schema, tuple(partition_by), now_ms, removing=bool(removes))
    moved = mode == "compact"  # the rows are those that were there
    actions += [{"remove": _removed(part, now_ms, changed=not moved)} for part in removes]
    actions += [{"add": _added(part, now_ms, changed=not moved)} for part in adds]
    entry = "".join(json.dumps(action) + "\n" for action in actions).encode()
    try:
        store.put_if_absent(f"{log_folder(name)}/{version:020d}.json", entry)
    except ConflictError as error:
        raise ConflictError(f"table {shown(name)}: somebody else wrote version {version} first; try again") from error
    if version and version % CHECKPOINT_EVERY == 0:
        with contextlib.suppress(LeptonError):  # the version is there; the next hundredth sums it up, too
            write_checkpoint(store, name)
    return version


def retried(act: Callable[[], T]) -> T:
    """What `act` returns, done anew as long as somebody else commits first: it opens the newest version each time.

    Raises ConflictError after 20 tries, in one line.
    """
    pause = 0.02
    for left in reversed(range(TRIES)):
        try:
            return act()
        except ConflictError as error:
            if not left:
                raise ConflictError(
                    f"{str(error).rpartition(';')[0]}; {TRIES} tries, others came first each time"
                ) from error
            time.sleep(random.uniform(0, pause))  # noqa: S311 - so that two losers do not meet again
            pause = min(2 * pause, _LONGEST_PAUSE_S)
    raise AssertionError("the last try returns or raises")


def _definition(
    name: str, base: Log | None, schema: pa.Schema, partition_by: tuple[str, ...], now_ms: int, *, removing: bool
) -> list[dict[str, Any]]:
    """The actions that define the table, as far as they change: its protocol, its columns and partitions."""
    schema_json = delta_schema(name, schema)
    needs_ntz = any(_has_local_time(field.type) for field in schema)
    if base is None:
        features = {"readerFeatures": [_NTZ], "writerFeatures": [_NTZ]} if needs_ntz else {}
        protocol = {"minReaderVersion": 3 if needs_ntz else 1, "minWriterVersion": 7 if needs_ntz else 2, **features}
        # versions that runs refer to must stay readable, so nobody shall clean the log of old ones
        configuration = {"delta.enableExpiredLogCleanup": "false"}
        defined = _metadata(str(uuid.uuid4()), name, schema_json, partition_by, now_ms, configuration)
        return [{"protocol": protocol}, {"metaData": defined}]
    _refuse_foreign_rules(name, base, removing=removing)
    actions: list[dict[str, Any]] = []
    if needs_ntz and _NTZ not in (base.protocol.writer_features or ()):
        writes = sorted({*(base.protocol.writer_features or ("appendOnly", "invariants")), _NTZ})
        reads = sorted({*(base.protocol.reader_features or ()), _NTZ})
        versions = {"minReaderVersion": 3, "minWriterVersion": 7}
        actions.append({"protocol": {**versions, "readerFeatures": reads, "writerFeatures": writes}})
    if schema_json != base.schema_json or partition_by != base.partition_by:
        old = base.metadata
        made_ms = old.created_time or now_ms
        actions.append(
            {"metaData": _metadata(str(old.id), name, schema_json, partition_by, made_ms, old.configuration)}
        )
    return actions


def _has_local_time(kind: pa.DataType) -> bool:
    """Whether values of a type have a time of day without a time zone, which is a feature that a table announces."""
    if pa.types.is_list(kind):
        return _has_local_time(kind.value_type)
    return pa.types.is_timestamp(kind) and kind.tz is None


def _refuse_foreign_rules(name: str, base: Log, *, removing: bool) -> None:
    """What another program demands of writers and this one would not do."""
    protocol = base.protocol
    beyond = set(protocol.writer_features or ()) - _WRITABLE_FEATURES
    if 2 < protocol.min_writer_version < 7:
        beyond.add(f"writer version {protocol.min_writer_version}")
    if removing and str(base.metadata.configuration.get("delta.appendOnly", "")).lower() == "true":
        beyond.add("delta.appendOnly")
    if beyond:
        raise RefusedError(
            f"table {shown(name)}: {', '.join(sorted(beyond))} is set, which this program does not write; change the "
            "table with the program that made it, or ingest its rows into another"
        )


def _metadata(
    identity: str, name: str, schema_json: str, partition_by: Sequence[str], made_ms: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "id": identity, "name": name, "description": None, "format": {"provider": "parquet", "options": {}},
        "schemaString": schema_json, "partitionColumns": list(partition_by), "createdTime": made_ms,
        "configuration": dict(settings),
    }  # fmt: skip


def _added(part: Part, now_ms: int, *, changed: bool) -> dict[str, Any]:
    stats = json.dumps({"numRecords": part.rows, **part.bounds})
    return {
        "path": part.name, "partitionValues": dict(part.partition), "size": part.size, "modificationTime": now_ms,
        "dataChange": changed, "stats": stats,
    }  # fmt: skip


def _removed(part: Part, now_ms: int, *, changed: bool) -> dict[str, Any]:
    return {
        "path": part.name, "deletionTimestamp": now_ms, "dataChange": changed, "extendedFileMetadata": True,
        "partitionValues": dict(part.partition), "size": part.size,
    }  # fmt: skip
