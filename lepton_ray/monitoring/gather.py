"""Gathering: what the store holds about runs and endpoints, read again and again at bounded cost.

Read-only. A file that is damaged or foreign is skipped and counted. Counters of a run go on over restarts of its
workers, since the snapshots of all generations stay and are added up.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lepton_ray.errors import IntegrityError, NotFoundError
from lepton_ray.monitoring.catalogue import LABELS, RUN_STATES
from lepton_ray.monitoring.goodput import goodput
from lepton_ray.monitoring.incidents import count_incidents
from lepton_ray.monitoring.ledger import RankEntry
from lepton_ray.monitoring.runs import driver_alive_at, is_name, read_json
from lepton_ray.monitoring.snapshot import Joined, Snapshot, parse_snapshot
from lepton_ray.storage import Entry, Store

LIVE_S = 60.0
"""A process whose snapshot is older than this no longer reports."""
RECHECK_S = 30.0
"""How often what has come to rest is looked at again."""
MAX_SERIES = 10_000
"""Series of all runs and endpoints together; sources beyond it are left out, the oldest first."""
MAX_NEW_RECORDS = 200
"""Records of unknown runs that one refresh reads; a store with more is taken in over several."""
MAX_FILES = 4_096
"""Snapshots and ledger entries of one run or endpoint."""

Parsed = TypeVar("Parsed", Snapshot, RankEntry)


@dataclass
class _File:
    """What was last read of a file."""

    size: int
    read_at: float
    moved_at: float
    content: Snapshot | RankEntry | None


@dataclass
class _Source:
    """What is known of one run or endpoint."""

    files: dict[str, _File] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    checked_at: float = 0.0
    alive_at: float = 0.0
    incidents: dict[str, int] = field(default_factory=dict)

    @property
    def moved_at(self) -> float:
        """Its newest sign of life."""
        record = self.record.get("updated_at")
        known = float(record) if isinstance(record, int | float) else 0.0
        return max(known, self.alive_at, *(file.moved_at for file in self.files.values()), 0.0)


class Gatherer:
    """Reads the store and joins what it holds; keeps what it read, so that the next refresh is cheap.

    Args:
        store: where runs and endpoints are.
        retain_s: how long a run or endpoint is shown after its last sign of life.
        now: wall clock, unix seconds.
    """

    def __init__(self, store: Store, *, retain_s: float = 3600.0, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._retain_s = retain_s
        self._now = now
        self._runs: dict[str, _Source] = {}
        self._endpoints: dict[str, _Source] = {}
        self.errors: Counter[str] = Counter()
        """Skipped files and samples by cause, since the start."""

    def refresh(self) -> Joined:
        """Read what may have changed and join everything that is shown.

        Raises the store's errors where it is away; what was read before is kept.
        """
        self._look_for("runs", self._runs)
        self._look_for("endpoints", self._endpoints)
        joined, series = Joined(), 0
        for kind, sources, show in (("run", self._runs, self._show_run), ("endpoint", self._endpoints, self._show)):
            for name, source in sources.items():
                self._update(kind, name, source)
            newest = sorted(sources.items(), key=lambda item: (-item[1].moved_at, item[0]))
            shown = [item for item in newest if self._now() - item[1].moved_at <= self._retain_s]
            shown = shown[: LABELS[kind].bound]
            joined.put("lepton_exporter_sources", len(shown), kind)
            ages = [self._now() - source.moved_at for _, source in shown if self._reports(kind, source)]
            if ages:
                joined.put("lepton_exporter_source_age_seconds", max(0.0, *ages), kind)
            for name, source in shown:
                part = show(name, source)
                series += part.series
                if series > MAX_SERIES:
                    self.errors["limit"] += 1
                    break
                joined.samples.update(part.samples)
        return joined

    def _reports(self, kind: str, source: _Source) -> bool:
        return kind == "endpoint" or source.record.get("state") == "running"

    def _look_for(self, folder: str, sources: dict[str, _Source]) -> None:
        """Learn new names and forget those that are gone."""
        names = {name for name in self._store.list_names(folder) if is_name(name)}
        for gone in sources.keys() - names:
            del sources[gone]
        for new in sorted(names - sources.keys(), reverse=True)[:MAX_NEW_RECORDS]:
            sources[new] = _Source()

    def _update(self, kind: str, name: str, source: _Source) -> None:
        """Read a source again where it may have changed."""
        now = self._now()
        resting = now - source.moved_at > LIVE_S or (kind == "run" and not self._reports(kind, source))
        if resting and now - source.checked_at < RECHECK_S:
            return
        source.checked_at = now
        if kind == "endpoint":
            self._read_files(source, f"endpoints/{name}/metrics", lambda value: _snapshot(value, {"endpoint": name}))
            return
        record = self._read(f"runs/{name}/record.json", _record)
        if record is None:
            return
        source.record = record
        if self._reports(kind, source):
            source.alive_at = driver_alive_at(self._store, name, record)
        elif now - source.moved_at > self._retain_s:
            return  # over for long: nothing of it is shown
        self._read_files(source, f"runs/{name}/metrics", lambda value: _snapshot(value, {"run": name}))
        self._read_files(source, f"runs/{name}/ledger", _entry)
        source.incidents = count_incidents(self._store, name)

    def _read_files(
        self,
        source: _Source,
        folder: str,
        parse: Callable[[Mapping[str, Any]], tuple[Snapshot | RankEntry, float]],
    ) -> None:
        """Read the JSON files of a folder that are new or may have moved."""
        found = [entry for entry in self._store.list(folder) if _is_snapshot(entry, folder)][:MAX_FILES]
        for key in source.files.keys() - {entry.key for entry in found}:
            if key.startswith(f"{folder}/"):
                del source.files[key]
        now = self._now()
        for entry in found:
            known = source.files.get(entry.key)
            if known and known.size == entry.size and now - known.moved_at > LIVE_S and now - known.read_at < RECHECK_S:
                continue
            read = self._read(entry.key, parse)
            if read is not None:
                source.files[entry.key] = _File(entry.size, now, min(read[1], now), read[0])
                if isinstance(read[0], Snapshot):
                    self.errors.update(read[0].dropped)
            else:  # keep what was good before; look again when it changes, or after a while
                source.files[entry.key] = (
                    replace(known, size=entry.size) if known else _File(entry.size, now, 0.0, None)
                )

    def _read(self, key: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
        try:
            return parse(read_json(self._store, key))
        except NotFoundError:
            return None  # deleted, or not written yet
        except (IntegrityError, ValueError):
            self.errors["damaged"] += 1
            return None

    def _show(self, _name: str, source: _Source) -> Joined:
        joined = Joined()
        now = self._now()
        for file in source.files.values():
            if isinstance(file.content, Snapshot):
                joined.add(file.content, live=now - file.moved_at <= LIVE_S)
        return joined

    def _show_run(self, run: str, source: _Source) -> Joined:
        joined = self._show(run, source)
        record = source.record
        table = f"{record.get('table', '')}@{record.get('table_version', '')}"
        published = str(record.get("model_version") or "")
        joined.put("lepton_run_info", 1, run, _task_name(record.get("task")), table, published)
        for state in RUN_STATES:
            joined.put("lepton_run_state", float(record.get("state") == state), run, state)
        joined.put("lepton_run_updated_timestamp_seconds", source.moved_at, run)
        joined.put("lepton_run_attempts", len(record["attempts"]), run)
        joined.put("lepton_run_failures", record["failures"], run)
        for kind, count in source.incidents.items():
            joined.put("lepton_incidents_total", count, run, kind)
        entries = [file.content for file in source.files.values() if isinstance(file.content, RankEntry)]
        found = goodput(record, entries, self._now(), source.alive_at)
        for bucket, spent in found.buckets.items():
            joined.put("lepton_goodput_seconds", spent, run, bucket)
        joined.put("lepton_goodput_ratio", found.ratio, run)
        return joined


_SHOWN = (
    "state",
    "created_at",
    "started_at",
    "finished_at",
    "updated_at",
    "workers",
    "task",
    "table",
    "table_version",
    "model_version",
)


def _record(value: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of a record, checked. ValueError."""
    goodput(value, ())
    attempts, failures = value.get("attempts") or [], value.get("failures") or 0
    if not isinstance(failures, int):
        raise ValueError("failures: expected a whole number")  # noqa: TRY004 - one error class for all damage
    return {**{name: value.get(name) for name in _SHOWN}, "attempts": attempts, "failures": failures}


def _task_name(task: Any) -> str:
    return str(task.get("name", "") if isinstance(task, Mapping) else task or "")


def _is_snapshot(entry: Entry, folder: str) -> bool:
    name = entry.key.removeprefix(f"{folder}/")
    return name.endswith(".json") and "/" not in name and not name.startswith(("evaluations-", "history-"))


def _snapshot(value: Mapping[str, Any], owner: Mapping[str, str]) -> tuple[Snapshot, float]:
    snapshot = parse_snapshot(value, owner)
    return snapshot, snapshot.written_at


def _entry(value: Mapping[str, Any]) -> tuple[RankEntry, float]:
    entry = RankEntry.parse(value)
    return entry, entry.updated_at
