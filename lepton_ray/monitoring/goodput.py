"""Goodput: the run's record and its ranks' entries, joined into buckets that add up to wall time x workers.

Pure: values in, a `Goodput` out. Each rank is a lane through each attempt of the driver. In a lane, the time of an
entry goes to its phases, the time before the first entry is the start of the run (or the restart, in a later attempt),
the time between two generations is a restart. Time in which no driver held the run belongs to no lane, nor does that of
a generation of fewer ranks (elastic runs) belong to the lanes of those that it has not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lepton_ray.monitoring.ledger import COMPUTE_PHASES, RankEntry, seconds

BUCKETS: dict[str, str] = {
    "compute": "forward, backward (with the gradient all-reduce) and optimizer of steps that were new",
    "starting": "from the creation of the run to the first loop: placement, processes, imports, process group",
    "loading": "the table, the model and the checkpoint are brought into memory",
    "data_wait": "the rank waited for its next batch",
    "checkpoint": "training stood still for a checkpoint",
    "validation": "evaluation on the held-out rows",
    "logging": "reporting of progress",
    "replayed": "steps done again after a restart",
    "restarting": "no loop was running, between two generations or before the first loop of a later attempt",
    "stopping": "from the last step to the end of the attempt",
    "unreported": "not reported by the rank (yet): since its last entry, or a part of it that no phase covers",
}
"""Bucket -> what its worker-seconds were spent on. Only `compute` moves the model forward."""

SILENCE_S = 120.0
"""A running record without any sign of life for this long has no driver; its wall time ended with the last sign."""


@dataclass(frozen=True)
class Goodput:
    """Worker-seconds of a run by bucket.

    `buckets` has every name of BUCKETS and adds up to `total`; `total` is the wall time of each attempt times its
    workers, of elastic runs as many as there were at each time; `skipped` counts entries that were damaged or belong to
    no attempt.
    """

    buckets: dict[str, float]
    total: float
    wall: float
    workers: int
    """The most at any time."""
    generations: int
    replayed_steps: int
    skipped: int = 0

    @property
    def elastic(self) -> bool:
        """Whether there were fewer workers at times."""
        return self.total < self.wall * self.workers * 0.9999

    @property
    def ratio(self) -> float:
        """Compute / total, 0 for a run without any time."""
        return self.buckets["compute"] / self.total if self.total > 0 else 0.0

    def to_rows(self) -> list[tuple[str, float, float, str]]:
        """(bucket, worker-seconds, share of the total, meaning), in the order of BUCKETS."""
        whole = self.total or 1.0
        return [(name, self.buckets[name], self.buckets[name] / whole, BUCKETS[name]) for name in BUCKETS]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ratio": self.ratio,
            "worker_seconds": self.total,
            "wall_seconds": self.wall,
            "workers": self.workers,
            "elastic": self.elastic,
            "generations": self.generations,
            "replayed_steps": self.replayed_steps,
            "buckets": dict(self.buckets),
        }


@dataclass
class _Attempt:
    """A span in which one driver held the run. `open`: it still does."""

    start: float
    end: float
    open: bool
    entries: list[RankEntry] = field(default_factory=list)


def goodput(
    record: Mapping[str, Any],
    rank_entries: Iterable[Mapping[str, Any] | RankEntry],
    now: float | None = None,
    alive_at: float = 0.0,
) -> Goodput:
    """Where the worker-seconds of a run went.

    Args:
        record: the run's record; its times in unix seconds.
        rank_entries: the entries of all ranks and generations; damaged ones are counted in `skipped`.
        now: unix seconds; how far a running run's wall time reaches. Its last sign of life where not given.
        alive_at: unix seconds; a sign of life of the driver from elsewhere, such as the renewal of its lease.

    Raises ValueError for a record without usable times.
    """
    entries: list[RankEntry] = []
    skipped = 0
    for value in rank_entries:
        try:
            entries.append(value if isinstance(value, RankEntry) else RankEntry.parse(value))
        except ValueError:
            skipped += 1
    attempts, orphans = _spans(record, entries, now, alive_at)
    buckets = dict.fromkeys(BUCKETS, 0.0)
    total, workers = 0.0, _workers(record, entries)
    for index, attempt in enumerate(attempts):
        lanes = max((entry.world_size for entry in attempt.entries), default=workers)
        for rank in range(lanes):
            absent = _fill_lane(buckets, attempt, rank, "starting" if index == 0 else "restarting")
            total += attempt.end - attempt.start - absent
    return Goodput(
        buckets=buckets,
        total=total,
        wall=sum(attempt.end - attempt.start for attempt in attempts),
        workers=workers,
        generations=len({entry.generation for entry in entries}),
        replayed_steps=sum(entry.replayed_steps for entry in entries if entry.rank == 0),
        skipped=skipped + orphans,
    )


def _workers(record: Mapping[str, Any], entries: list[RankEntry]) -> int:
    """The run's workers; a record that was only just created may not name them yet."""
    workers = record.get("workers")
    if workers is None:
        return max((entry.world_size for entry in entries), default=1)
    if not isinstance(workers, int) or isinstance(workers, bool) or not 0 < workers <= 1_000_000:
        raise ValueError("workers: expected a whole number above 0")
    return workers


def _spans(
    record: Mapping[str, Any], entries: list[RankEntry], now: float | None, alive_at: float
) -> tuple[list[_Attempt], int]:
    """The attempts in time order with their entries, clamped so that no two overlap; and the entries of no attempt."""
    created = seconds(record, "created_at")
    listed = record.get("attempts") or [{"attempt": None, "started_at": created, "ended_at": None}]
    if not isinstance(listed, list) or not all(isinstance(each, Mapping) for each in listed):
        raise ValueError("attempts: expected a list of objects")
    listed = sorted(listed, key=lambda each: seconds(each, "started_at"))
    by_attempt: dict[int | None, list[RankEntry]] = {each.get("attempt"): [] for each in listed}
    anonymous = by_attempt.get(None)  # a record without attempts: all entries are of the one span
    orphans = 0
    for entry in entries:
        home = by_attempt.get(entry.attempt, anonymous)
        if home is None:
            orphans += 1
        else:
            home.append(entry)
    spans: list[_Attempt] = []
    for index, each in enumerate(listed):
        mine = by_attempt[each.get("attempt")]
        start = created if index == 0 else max(seconds(each, "started_at"), spans[-1].end)
        following = seconds(listed[index + 1], "started_at") if index + 1 < len(listed) else None
        end, is_open = _end(record, each, mine, following, now, alive_at)
        spans.append(_Attempt(start, max(start, end), is_open, mine))
    return spans, orphans


def _end(
    record: Mapping[str, Any],
    attempt: Mapping[str, Any],
    entries: list[RankEntry],
    following: float | None,
    now: float | None,
    alive_at: float,
) -> tuple[float, bool]:
    """When an attempt ended, and whether it still runs."""
    last_entry = max((entry.updated_at for entry in entries), default=0.0)
    if following is not None:  # superseded: a driver that was killed could not write its end
        end = seconds(attempt, "ended_at") if attempt.get("ended_at") is not None else last_entry
        return min(end, following), False
    running = record.get("state") == "running"
    ends = [seconds(attempt, "ended_at")] if attempt.get("ended_at") is not None else []
    if not running and record.get("finished_at") is not None:  # a resumed record may still hold its earlier end
        ends.append(seconds(record, "finished_at"))
    if ends:
        return max(ends), False
    sign = max(last_entry, alive_at, seconds(attempt, "started_at"))
    if record.get("updated_at") is not None:
        sign = max(sign, seconds(record, "updated_at"))
    if now is None:
        return sign, running
    if not running or now - sign > SILENCE_S:
        return sign, False
    return max(now, sign), True


def _fill_lane(buckets: dict[str, float], attempt: _Attempt, rank: int, before: str) -> float:
    """Add the time of one rank in one attempt to the buckets: each second once, whatever the clocks say.

    Returns the seconds in which there was no such rank: of generations with fewer.
    """
    cursor, gap, finished, absent = attempt.start, before, False, 0.0
    mine = [entry for entry in attempt.entries if entry.rank == rank]
    smaller = _smaller(attempt.entries, rank)
    for entry in sorted([*mine, *smaller], key=lambda entry: (entry.generation, entry.started_at)):
        start = min(max(entry.started_at, cursor), attempt.end)
        if entry.rank != rank:  # from the end of its own last generation, it is not there
            end = min(max(entry.updated_at, start), attempt.end)
            absent += end - cursor
            cursor, finished = end, entry.finished
            continue
        end = min(max(entry.updated_at, start), attempt.end)
        buckets[gap] += start - cursor
        reported = sum(entry.phases.values())
        share = min(1.0, (end - start) / reported) if reported > 0 else 0.0
        for phase, spent in entry.phases.items():
            buckets["compute" if phase in COMPUTE_PHASES else phase] += spent * share
        buckets["unreported"] += max(0.0, end - start - reported * share)
        cursor, gap, finished = end, "restarting", entry.finished
    if smaller and smaller[-1].generation > max((entry.generation for entry in mine), default=0):
        return absent + attempt.end - cursor
    if mine:
        gap = "unreported" if attempt.open and not finished else "stopping"
    buckets[gap] += attempt.end - cursor
    return absent


def _smaller(entries: list[RankEntry], rank: int) -> list[RankEntry]:
    """Of each generation that has no such rank, the entry of rank 0, ascending."""
    found = [entry for entry in entries if entry.rank == 0 and entry.world_size <= rank]
    return sorted(found, key=lambda entry: entry.generation)
