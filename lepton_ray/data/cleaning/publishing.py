"""How a cleaned table and its quarantine become versions: files first, then one commit each, or nothing.

The quarantine is committed first: a crash between the two leaves rows in quarantine that are in the table still, and
the next run of the same plan on the same version finds them there and does not enter them again.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.cleaning.ingesting import KEY
from lepton_ray.data.cleaning.pieces import FILE, FROM, REASON, ROW, RULE, Target
from lepton_ray.data.commits import TOKEN, commit
from lepton_ray.data.delta import Log, commit_info, open_log
from lepton_ray.data.parts import MAX_PARTITIONS, Part
from lepton_ray.data.tables import open_table
from lepton_ray.errors import NotFoundError, UsageError, shown
from lepton_ray.settings.tree import NAME_PATTERN
from lepton_ray.storage import Store

SUFFIX = "-quarantine"


@dataclass
class Found:
    """Files that the last pass wrote."""

    kept: list[Part]
    gone: list[Part]


def quarantine_of(name: str) -> str:
    """The name of a table's quarantine table."""
    return f"{name}{SUFFIX}"


def check_quarantine_name(name: str) -> None:
    """Raise UsageError where a table's name leaves no room for that of its quarantine, or is one itself."""
    if name.endswith(SUFFIX):
        raise UsageError(f"table {shown(name)}: is a quarantine; clean the table it belongs to")
    if not re.fullmatch(NAME_PATTERN, quarantine_of(name)):
        longest = 63 - len(SUFFIX)
        raise UsageError(f"table {shown(name)}: {len(name)} characters; a table that is cleaned has at most {longest}")


class Publication:
    """The versions that a cleaning will make."""

    def __init__(self, store: Store, name: str, log: Log, schema: pa.Schema, digest: str) -> None:
        self._store, self._name, self._log, self._schema, self._digest = store, name, log, schema, digest
        try:
            self._quarantine: Log | None = open_log(store, quarantine_of(name))
        except NotFoundError:
            self._quarantine = None
        for column in (FILE, ROW, RULE, REASON, FROM):
            if column in log.schema.names:
                raise UsageError(
                    f"table {shown(name)}: column {column} is what the quarantine calls its own; rename it"
                )
        self.target = Target(
            folder=f"datasets/{name}",
            version=log.version + 1,
            quarantine_folder=f"datasets/{quarantine_of(name)}",
            quarantine_version=0 if self._quarantine is None else self._quarantine.version + 1,
            token=secrets.token_hex(8),
            ref=f"{name}@{log.version}",
            schema=schema,
            partition_by=log.partition_by,
        )

    def commit(self, found: Found, rows: int) -> tuple[int, str | None]:
        """Make both versions; returns the number of the table's and the name of the quarantine's.

        Raises ConflictError when somebody else wrote first, UnavailableError when it is not known what happened,
        UsageError where the plan gave a partitioned table too many partitions.
        """
        if len({part.partition for part in found.kept}) > MAX_PARTITIONS:
            names = ", ".join(self.target.partition_by)
            raise UsageError(f"table {shown(self._name)}: more than {MAX_PARTITIONS} values of {names} after the plan")
        info = {TOKEN: self.target.token, "lepton_source": self.target.ref, "lepton_plan": self._digest}
        quarantined = self._commit_quarantine(found, info) if found.gone else None
        version = commit(
            self._store, self._name, base=self._log, mode="clean", schema=self._schema, adds=found.kept,
            removes=self._log.parts, partition_by=self.target.partition_by, info={**info, "lepton_rows": str(rows)},
        )  # fmt: skip
        return version, quarantined

    def _commit_quarantine(self, found: Found, info: dict[str, str]) -> str:
        name, base = quarantine_of(self._name), self._quarantine
        before = commit_info(self._store, name, base.version) if base is not None else None
        same = ("lepton_source", "lepton_plan")
        if base is not None and before and all(before.get(each) == info[each] for each in same):
            self._remove(self.target.quarantine_folder, found.gone)  # a run that was cut off had entered them
            found.gone = []
            return f"{name}@{base.version}"
        fields = [
            pa.field(each, pa.int64() if each == ROW else pa.string()) for each in (FILE, ROW, RULE, REASON, FROM)
        ]
        schema = pa.schema([*self._log.schema, *fields])
        goes_on = base is None or (base.schema.equals(schema) and not base.partition_by)
        version = commit(
            self._store, name, base=base, mode="quarantine", schema=schema, adds=found.gone,
            removes=[] if base is None or goes_on else base.parts,
            info={**info, "lepton_rows": str(sum(part.rows for part in found.gone))},
        )  # fmt: skip
        return f"{name}@{version}"

    def discard(self, found: Found) -> None:
        """Remove the files again, but for quarantined rows whose version is made."""
        self._remove(self.target.folder, found.kept)
        if self._quarantine_version() < self.target.quarantine_version:
            self._remove(self.target.quarantine_folder, found.gone)

    def discard_all(self) -> None:
        """Remove whatever the last pass may have written."""
        for folder in (self.target.folder, self.target.quarantine_folder):
            for entry in self._store.list(folder):
                if f"-{self.target.token}-" in entry.key:
                    self._store.delete(entry.key)

    def _quarantine_version(self) -> int:
        try:
            return open_log(self._store, quarantine_of(self._name)).version
        except NotFoundError:
            return -1

    def _remove(self, folder: str, parts: list[Part]) -> None:
        for part in parts:
            self._store.delete(f"{folder}/{part.name}")


def in_quarantine(store: Store, name: str, *, rule: str | None = None, limit: int = 20) -> dict[str, Any]:
    """What is in the quarantine of a table.

    Args:
        store: where the table is.
        name: of the table itself.
        rule: rows of this rule alone.
        limit: rows told at most, in the order in which they were entered.

    Returns:
        `quarantine` (`name@version`, None where there is none yet), `rules` (rows by rule, all of them) and `rows`
        (`key`, `from`, `file`, `row`, `rule`, `reason`).

    Raises NotFoundError for a table that does not exist.
    """
    check_quarantine_name(name)
    open_table(store, name)
    try:
        table = open_table(store, quarantine_of(name))
    except NotFoundError:
        return {"table": name, "quarantine": None, "rules": {}, "rows": []}
    names = {"key": KEY, "from": FROM, "file": FILE, "row": ROW, "rule": RULE, "reason": REASON}
    counts: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for batch in table.batches(list(names.values())):
        for entry in batch[RULE].value_counts().to_pylist():
            counts[entry["values"]] += entry["counts"]
        some = batch if rule is None else batch.filter(pc.equal(batch[RULE], rule))
        wanted = some.slice(0, max(0, limit - len(rows))).to_pylist()
        rows += [{told: row[column] for told, column in names.items()} for row in wanted]
    if rule is not None and rule not in counts:
        raise UsageError(f"rule {shown(rule)}: no row of {table.ref} failed it; those that did: {', '.join(counts)}")
    return {"table": name, "quarantine": table.ref, "rules": dict(counts.most_common()), "rows": rows}
