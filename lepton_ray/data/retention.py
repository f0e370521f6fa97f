"""`vacuum`: removes data files that no version needs which somebody may still want to read.

Kept are the newest version, each that was the newest within the retention, and each that a run, a model version or an
evaluation names: what was trained on a version can be trained on it again. Files of an ingest that is under way belong
to no version yet; files without a version are left alone for a day at least.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from lepton_ray.data.commits import retried
from lepton_ray.data.delta import Log, entry_of, versions_in
from lepton_ray.data.versions import check_table_name, open_table
from lepton_ray.errors import ConflictError, IntegrityError, NotFoundError, UsageError, shown
from lepton_ray.storage import Store

DAYS = 7.0
"""Days for which a version that was followed by another stays readable, unless said otherwise."""
UNKNOWN_HOURS = 24
"""Hours for which a file that no version names is left alone: somebody may be about to name it."""
_LONGEST_DAYS = 36_500


@dataclass(frozen=True)
class VacuumReport:
    """What a vacuum removed, or would remove."""

    table: str
    version: int
    """The newest, which stays as it is: a vacuum makes no version."""
    keep_days: float
    files_removed: int
    bytes_removed: int
    protected: dict[int, list[str]] = field(default_factory=dict)
    """Versions that are named elsewhere, and by what: `run digits`, `model digits:3`."""
    lost: list[int] = field(default_factory=list)
    """Versions that cannot be read any more after this."""
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "protected": {str(version): by for version, by in self.protected.items()}}


def vacuum(store: Store, name: str, *, keep_days: float = DAYS, dry_run: bool = False) -> VacuumReport:
    """Remove the data files of a table that nobody can want any more.

    A vacuum that is killed leaves a table that is as readable as after a whole one; the next goes on.

    Args:
        store: where the table is.
        name: of the table.
        keep_days: how long a version stays readable after another followed it; 0 keeps what is named elsewhere alone.
        dry_run: say what would be removed, and remove nothing.

    Raises UsageError for a table or retention that is none, IntegrityError for a damaged record of a run or model, of
    which is not known what it names.
    """
    check_table_name(name)
    if not 0 <= keep_days <= _LONGEST_DAYS:
        raise UsageError(f"keep days {keep_days:g}: expected 0 to {_LONGEST_DAYS}")
    return retried(lambda: _vacuum(store, name, keep_days, dry_run))


def _vacuum(store: Store, name: str, keep_days: float, dry_run: bool) -> VacuumReport:
    newest = open_table(store, name)
    protected = {at: by for at, by in references(store, name).items() if at <= newest.version}
    doomed = _doomed(store, name, newest.log, {newest.version, *protected}, keep_days)
    sizes = {entry.key.removeprefix(f"datasets/{name}/"): entry.size for entry in store.list(f"datasets/{name}")}
    doomed = [path for path in doomed if path in sizes]
    lost = _lost(store, name, newest.version, set(doomed), set(sizes))
    if not dry_run:
        store.check_writable()
        if open_table(store, name).version != newest.version:  # a restore may need again what was doomed
            raise ConflictError(f"table {shown(name)}: somebody wrote to it meanwhile; try again")
        for path in doomed:
            store.delete(f"datasets/{name}/{path}")
    size = sum(sizes[path] for path in doomed)
    return VacuumReport(name, newest.version, keep_days, len(doomed), size, protected, lost, dry_run)


def references(store: Store, name: str) -> dict[int, list[str]]:
    """The versions of a table that runs, model versions and evaluations name, and which of them do.

    Raises IntegrityError for a record that is no JSON.
    """
    found: dict[int, list[str]] = {}
    for key, who in _records(store):
        try:
            record = json.loads(store.get(key))
        except NotFoundError:
            continue  # removed while we looked
        except ValueError as error:
            raise IntegrityError(
                f"{key}: not JSON, so the versions of {shown(name)} that it names are not known; restore or remove it"
            ) from error
        for version in sorted(_named(record, name)):
            found.setdefault(version, []).append(who)
    return dict(sorted(found.items()))


def _records(store: Store) -> Iterator[tuple[str, str]]:
    """Where the versions of tables are named, and by whom."""
    for run in store.list_names("runs"):
        yield f"runs/{run}/record.json", f"run {run}"
    for entry in store.list("models"):
        match entry.key.split("/"):
            case [_, model, "versions", number, "model.json"]:
                yield entry.key, f"model {model}:{number}"
            case [_, model, "evaluations", number, _]:
                yield entry.key, f"evaluation of {model}:{number}"


def _named(record: Any, name: str) -> set[int]:
    """Versions that a record names at any depth: `table` beside `table_version`, or `table` as name@version."""
    if isinstance(record, list):
        return set().union(*(_named(item, name) for item in record)) if record else set()
    if not isinstance(record, dict):
        return set()
    found: set[int] = set()
    table, version = record.get("table"), record.get("table_version")
    if table == name and isinstance(version, int):
        found.add(version)
    elif isinstance(table, str) and table.startswith(f"{name}@") and table.removeprefix(f"{name}@").isdecimal():
        found.add(int(table.removeprefix(f"{name}@")))
    return found.union(*(_named(value, name) for value in record.values()))


def _doomed(store: Store, name: str, log: Log, kept: set[int], keep_days: float) -> list[str]:
    """Names of the files to remove."""
    hours = int(keep_days * 24)
    unused = log.unused_files(kept, hours)
    if hours >= UNKNOWN_HOURS:
        return unused
    old = set(log.unused_files(kept, UNKNOWN_HOURS))
    known = {
        action["add"]["path"]
        for version in versions_in(store, name)
        for action in entry_of(store, name, version) or []
        if "add" in action
    }
    return [path for path in unused if path in old or path in known]


def _lost(store: Store, name: str, newest: int, doomed: set[str], there: set[str]) -> list[int]:
    """The versions that have a file among the doomed and had all until now."""
    lost, files = [], set[str]()
    for version in versions_in(store, name):
        for action in entry_of(store, name, version) or []:
            files -= {action["remove"]["path"]} if "remove" in action else set()
            files |= {action["add"]["path"]} if "add" in action else set()
        if version <= newest and files & doomed and files <= there:
            lost.append(version)
    return lost
