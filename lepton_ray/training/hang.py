"""Whether a worker group hangs, and through which rank. Pure: readings in, a verdict out.

A rank that stands still makes all others stand still within a step, since each waits for it in its next collective. So
that nobody does anything is no evidence against anybody. What is, in this order:

1. a process that is stopped (state T), or gone;
2. a process whose interpreter does not run: it is frozen, or native code keeps the interpreter's lock;
3. the rank that is behind: fewer steps done, or an earlier phase of the same step, while the others wait for it.

Where all wait at the same place nobody in particular is to blame (a connection, say), and all are started again.

How long is too long: `factor` median steps, at least `floor_s`. For 3 it is three times that, and twice the longest
step that this group has done, since the rank may only be slow; and twice that again while it uses the processor. What
takes its time by nature is given a multiple of the floor (`PATIENCE`); while any rank is within that, 2 and 3 do not
apply to anybody.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lepton_ray.training.beat import EXCHANGE
from lepton_ray.training.beat_reading import Sighting

PATIENCE = {
    "starting": 360.0, "loading": 360.0, "first step": 360.0, "validation": 360.0, "stopping": 360.0,
    "checkpoint": 90.0, "data_wait": 30.0,
}  # fmt: skip
"""How often the floor a rank may stand still in a phase that takes its time: with 10 s an hour to load rows and weights
or to evaluate, 15 minutes to hand over a checkpoint (storage may be away), 5 minutes to wait for data."""
FROZEN_PATIENCE = 12.0
"""The same for an interpreter that does not run in such a phase: some native code keeps its lock for a while."""
GONE_PATIENCE = 30.0
"""The same for a process that is gone while others of its group are there: Ray Train sees that and makes a new group,
for which there may be no room for a while."""
BEHIND_PATIENCE = 3.0
"""How much longer a rank is waited for against which nothing speaks but that it is behind: a loop of one's own may
write a file somewhere in its step."""
BUSY_PATIENCE = 2.0
"""How much longer still if it computes."""
BUSY = 0.5
"""Share of a processor that a rank uses at least which counts as computing."""
LONGEST = 2.0
"""Times the longest step so far that a step may take."""
JUMP_S = 5.0
"""Seconds between two looks after which all that was seen before says nothing: the watcher itself was stopped."""

Evidence = Literal["stopped", "gone", "interpreter", "behind", "same place"]


@dataclass(frozen=True)
class Limits:
    """`training.watchdog`: see there."""

    floor_s: float = 10.0
    factor: float = 10.0


@dataclass(frozen=True)
class Reading:
    """One rank at one moment; spans are in seconds."""

    rank: int
    step: int = 0
    """Steps that are done."""
    phase: str = "forward"
    place: int = 0
    """Grows as the rank goes on; equal for ranks that are at the same place."""
    still_s: float = 0.0
    """How long it has been there, as far as it was watched."""
    silent_s: float = 0.0
    """How long its interpreter has not run."""
    stopped_s: float = 0.0
    """How long its process has been stopped."""
    gone_s: float = 0.0
    """How long its process has been gone."""
    busy: float = 0.0
    """Share of a processor that it has used since it is there."""
    steps: int = 10
    """Steps of this worker group beyond the first; 0 while it sets things up."""
    median_s: float = 0.0
    """Median of its newest steps."""
    longest_s: float = 0.0
    """The longest of all."""


@dataclass(frozen=True)
class Verdict:
    """That a group hangs."""

    ranks: tuple[int, ...]
    """Who is to blame; empty where nobody is in particular."""
    evidence: Evidence
    words: str
    """One sentence with figures."""
    limit_s: float
    """What was too long."""


def decide(readings: Sequence[Reading], world_size: int, limits: Limits) -> Verdict | None:
    """Whether the group hangs; see the module for the rules.

    Args:
        readings: of the ranks that can be seen; where some are missing, only what is wrong by itself counts.
        world_size: ranks of the group.
        limits: of the run's settings.
    """
    if not readings:
        return None
    base = max(limits.floor_s, limits.factor * max(each.median_s for each in readings))
    lost = _lost(readings, limits, base)
    if lost is not None or len(readings) < world_size or any(each.gone_s > 0 for each in readings):
        return lost
    slow = any(each.still_s < _patience(each, limits, base) for each in readings)
    still_s = min(each.still_s for each in readings)
    if not slow and still_s < base:
        return None
    frozen_s = max(base, FROZEN_PATIENCE * limits.floor_s) if slow else base
    if frozen := [each for each in readings if min(each.silent_s, each.still_s) >= frozen_s]:
        silent = _span(max(each.silent_s for each in frozen))
        words = f"{_named(frozen)} not running its interpreter for {silent}: frozen, or native code keeps its lock"
        return _verdict(frozen, "interpreter", f"{words}, {_where(frozen[0])}", frozen_s)
    longest = max(each.longest_s for each in readings)
    return None if slow else _behind(readings, still_s, max(BEHIND_PATIENCE * base, LONGEST * longest))


def _lost(readings: Sequence[Reading], limits: Limits, base: float) -> Verdict | None:
    """Processes that can do nothing any more, whatever the others do."""
    # all three: a tool that slows a process down by stopping it again and again is no reason
    if stopped := [each for each in readings if min(each.stopped_s, each.silent_s, each.still_s) >= base]:
        words = f"{_named(stopped)} stopped (state T) for {_span(max(each.stopped_s for each in stopped))}"
        return _verdict(stopped, "stopped", f"{words}, {_where(stopped[0])}", base)
    unnoticed = max(base, GONE_PATIENCE * limits.floor_s)
    gone = [each for each in readings if each.gone_s > 0]
    if gone and len(gone) < len(readings) and all(each.gone_s >= unnoticed for each in gone):
        words = f"{_named(gone)} gone, and nobody has noticed for {_span(min(each.gone_s for each in gone))}"
        return _verdict(gone, "gone", f"{words}, {_where(gone[0])}", unnoticed)
    return None


def _behind(readings: Sequence[Reading], still_s: float, limit: float) -> Verdict | None:
    """All interpreters run and nobody has moved for `still_s`: who is behind."""
    first = min(each.place for each in readings)
    behind = [each for each in readings if each.place == first]
    if any(each.busy >= BUSY for each in behind):
        limit *= BUSY_PATIENCE
    if still_s < limit:
        return None
    if len(behind) == len(readings):
        words = f"all ranks have stood still for {_span(still_s)} at the same place, {_where(behind[0])}"
        return Verdict((), "same place", words, limit)
    ahead = [each for each in readings if each.place > first]
    words = f"{_named(behind)} standing still for {_span(still_s)} {_where(behind[0])}"
    others = f"{_ranks(ahead)} {'waits' if len(ahead) == 1 else 'wait'} {_where(ahead[0])}"
    return _verdict(behind, "behind", f"{words}; {others}", limit)


def _patience(reading: Reading, limits: Limits, base: float) -> float:
    """How long a rank may stand still where it is before anybody is blamed; 0 where nothing special goes on."""
    times = PATIENCE.get("first step" if reading.steps == 0 else reading.phase, 0.0)
    return max(base, times * limits.floor_s) if times else 0.0


def _verdict(ranks: Sequence[Reading], evidence: Evidence, words: str, limit_s: float) -> Verdict:
    return Verdict(tuple(each.rank for each in ranks), evidence, words, limit_s)


def _ranks(readings: Sequence[Reading]) -> str:
    listed = ", ".join(str(each.rank) for each in readings[:8])
    more = f" and {len(readings) - 8} more" if len(readings) > 8 else ""
    return f"rank {listed}" if len(readings) == 1 else f"ranks {listed}{more}"


def _named(readings: Sequence[Reading]) -> str:
    return f"{_ranks(readings)} {'is' if len(readings) == 1 else 'are'}"


def _where(reading: Reading) -> str:
    doing = "the gradient exchange" if reading.phase == EXCHANGE else reading.phase
    return f"after step {reading.step} in {doing}"


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s"


@dataclass
class _Known:
    """What is remembered of one rank."""

    pulse: int
    pulsed_at: float
    mark: tuple[int, float]
    """Where the rank was, and since when."""
    marked_at: float
    cpu_s: float
    """CPU time that its process had used by then."""
    at: float
    stopped_at: float | None = None
    gone_at: float | None = None


@dataclass
class Observation:
    """Sightings in, readings out: how long each rank has been where it is, as far as it was watched all the time."""

    _known: dict[tuple[int, int, int], _Known] = field(default_factory=dict)

    def see(self, sightings: Sequence[Sighting]) -> list[Reading]:
        """The readings of a group's ranks from what is seen now; forgets all after a pause of the watcher."""
        before = self._known
        keys = [(each.generation, each.rank, each.ticks) for each in sightings]
        if any(key in before and each.at - before[key].at > JUMP_S for key, each in zip(keys, sightings, strict=True)):
            before = {}
        self._known = {
            key: _updated(before.get(key), each) for key, each in zip(keys, sightings, strict=True)
        }  # the ranks that are not seen any more are forgotten
        return [_reading(known, each) for known, each in zip(self._known.values(), sightings, strict=True)]


def _updated(known: _Known | None, seen: Sighting) -> _Known:
    mark = (seen.place, seen.since)
    if known is None:
        known = _Known(seen.pulse, seen.at, mark, seen.at, seen.cpu_s, seen.at)
    if seen.pulse != known.pulse:
        known.pulse, known.pulsed_at = seen.pulse, seen.at
    if mark != known.mark:
        known.mark, known.marked_at, known.cpu_s = mark, seen.at, seen.cpu_s
    stopped, gone = seen.state in ("T", "t"), seen.state in ("", "Z", "X")
    known.stopped_at = (known.stopped_at or seen.at) if stopped else None
    known.gone_at = (known.gone_at or seen.at) if gone else None
    known.at = seen.at
    return known


def _reading(known: _Known, seen: Sighting) -> Reading:
    def span(start: float | None) -> float:
        return 0.0 if start is None else max(0.0, seen.at - start)

    still_s = span(known.marked_at)
    times = [each.whole_s for each in seen.times]
    return Reading(
        rank=seen.rank, step=seen.step, phase=seen.phase, place=seen.place, still_s=still_s,
        silent_s=span(known.pulsed_at), stopped_s=span(known.stopped_at), gone_s=span(known.gone_at),
        busy=(seen.cpu_s - known.cpu_s) / still_s if still_s >= 1.0 else 0.0,
        steps=seen.noted, median_s=statistics.median(times) if times else 0.0, longest_s=seen.longest_s,
    )  # fmt: skip
