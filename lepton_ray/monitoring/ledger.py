"""The goodput ledger: every worker-second of a run in exactly one bucket.

A rank keeps a `PhaseClock`: exactly one phase at any time, so the phases add up to the time in the loop by
construction. `RankLedger` is the clock plus who and where the rank is; its `entry()` is what is stored under
`runs/<run>/ledger/`. `lepton_ray.monitoring.goodput` joins the entries of all ranks with the run's record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

PHASES = (
    "starting",
    "loading",
    "data_wait",
    "forward",
    "backward",
    "optimizer",
    "checkpoint",
    "validation",
    "logging",
    "replayed",
    "stopping",
)
"""What a rank can be doing, in the order of a run. `backward` holds the gradient all-reduce; `replayed` stands in for
forward, backward and optimizer while a rank repeats steps that an earlier generation had already done."""

COMPUTE_PHASES = ("forward", "backward", "optimizer")
"""The phases that move the model forward."""


class PhaseClock:
    """Time per phase: exactly one phase runs at any time, so the totals add up to the elapsed time.

    `switch` costs one reading of the clock and is called by one thread; `totals` may be called by another.
    """

    __slots__ = ("_now", "_origin", "_phase", "_since", "_totals")

    def __init__(self, phase: str, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._totals[phase]  # KeyError for a phase that is not declared
        self._phase = phase
        self._origin = self._since = now()

    @property
    def phase(self) -> str:
        """The phase that runs now."""
        return self._phase

    @property
    def closed(self) -> Mapping[str, float]:
        """Seconds per phase so far without the running phase; not a copy, and for the thread that calls `switch`."""
        return self._totals

    def switch(self, phase: str) -> None:
        """End the running phase and begin `phase`. KeyError for a phase that is not in PHASES."""
        totals = self._totals
        totals[phase]  # checked before anything changes
        now = self._now()
        totals[self._phase] += now - self._since
        self._phase = phase
        self._since = now

    def totals(self) -> dict[str, float]:
        """Seconds per phase (all PHASES) since the clock was made, the running phase included."""
        for _ in range(1000):
            phase, since = self._phase, self._since
            totals = dict(self._totals)
            now = self._now()
            # Another thread may be in the middle of `switch`; then the closed phases do not reach up to `since`.
            elapsed = since - self._origin
            whole = math.isclose(sum(totals.values()), elapsed, rel_tol=1e-9, abs_tol=1e-6)
            if whole and self._phase is phase and self._since == since:
                break
        totals[phase] += max(0.0, now - since)
        return totals


class Observer(Protocol):
    """Told at once what a rank's ledger is told."""

    def switched(self, phase: str) -> None:
        """The rank began a phase."""

    def resumed(self, step: int) -> None:
        """The run was at this step when the rank took it up."""

    def step_done(self, step: int, spent: Mapping[str, float]) -> None:
        """The rank has done `step` steps of the run; `spent` are its seconds by phase so far."""


class RankLedger:
    """The ledger of one rank in one generation of the worker group: its phases and the steps it did.

    Wall time is read once; later times are that plus the elapsed monotonic time, so a clock that is set while the
    run goes on cannot tear the phases from the wall time.

    Args:
        run: name of the run.
        attempt: number of the driver's attempt at the run.
        generation: number of the worker group, counted over all attempts.
        rank: this rank, 0 <= rank < world_size.
        world_size: ranks of the generation.
        phase: the phase to begin with.
        now: monotonic clock, seconds.
        wall: wall clock, unix seconds.
    """

    def __init__(
        self,
        run: str,
        attempt: int,
        generation: int,
        rank: int,
        world_size: int,
        *,
        phase: str = "loading",
        now: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.run = run
        self.attempt = attempt
        self.generation = generation
        self.rank = rank
        self.world_size = world_size
        self.clock = PhaseClock(phase, now)
        self.switch = self.clock.switch
        self.started_at = wall()
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.replayed_steps = 0
        self.finished = False
        self._observer: Observer | None = None
        self.left: str | None = None

    @property
    def key(self) -> str:
        """Where the entry belongs in the store."""
        return f"runs/{self.run}/ledger/g{self.generation}-rank{self.rank}.json"

    def resumed(self, step: int) -> None:
        """Note that the run was at this step when this group took it up."""
        self.last_step = step or None
        if self._observer is not None:
            self._observer.resumed(step)

    def step_done(self, step: int, *, replayed: bool = False) -> None:
        """Note that optimizer step `step` (counted over the whole run) is done."""
        if self.first_step is None:
            self.first_step = step
        self.last_step = step
        if self._observer is not None:
            self._observer.step_done(step, self.clock.closed)
        if replayed:
            self.replayed_steps += 1

    def observed_by(self, observer: Observer) -> None:
        """Tell an observer too, from now on: it is called in the loop, and must neither raise nor take its time."""
        note = self.clock.switch

        def switch(phase: str) -> None:
            note(phase)
            observer.switched(phase)

        self.switch = switch
        self._observer = observer
        observer.switched(self.clock.phase)

    def finish(self) -> None:
        """Note that the rank left its loop as planned; its time from here on is `stopping`."""
        self.switch("stopping")
        self.finished = True

    def leave(self, why: str) -> None:
        """Note that the rank left its loop before its end, and not by a failure (`preempted`)."""
        self.switch("stopping")
        self.left = why

    def entry(self) -> dict[str, Any]:
        """The JSON entry as of now."""
        phases = self.clock.totals()
        return {
            "run": self.run,
            "attempt": self.attempt,
            "generation": self.generation,
            "rank": self.rank,
            "world_size": self.world_size,
            "started_at": self.started_at,
            "updated_at": self.started_at + sum(phases.values()),
            "phases": phases,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "replayed_steps": self.replayed_steps,
            "finished": self.finished,
            "left": self.left,
        }


@dataclass(frozen=True)
class RankEntry:
    """One stored entry of a rank, checked."""

    attempt: int
    generation: int
    rank: int
    world_size: int
    started_at: float
    updated_at: float
    phases: dict[str, float]
    first_step: int | None
    last_step: int | None
    replayed_steps: int
    finished: bool

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> RankEntry:
        """The entry in a JSON object. ValueError naming the field that is missing or wrong."""
        phases = value.get("phases")
        if not isinstance(phases, Mapping) or not all(phase in PHASES for phase in phases):
            raise ValueError("phases: expected an object of known phases")
        entry = cls(
            attempt=_whole(value, "attempt"),
            generation=_whole(value, "generation"),
            rank=_whole(value, "rank"),
            world_size=_whole(value, "world_size"),
            started_at=seconds(value, "started_at"),
            updated_at=seconds(value, "updated_at"),
            phases={phase: seconds(phases, phase) for phase in phases},
            first_step=None if value.get("first_step") is None else _whole(value, "first_step"),
            last_step=None if value.get("last_step") is None else _whole(value, "last_step"),
            replayed_steps=_whole(value, "replayed_steps"),
            finished=value.get("finished") is True,
        )
        if not entry.rank < entry.world_size <= 1_000_000:
            raise ValueError(f"rank: {entry.rank} is not below world_size {entry.world_size}")
        return entry


def _whole(value: Mapping[str, Any], key: str) -> int:
    number = value.get(key)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{key}: expected a whole number")
    return number


def seconds(value: Mapping[str, Any], key: str) -> float:
    """A finite number of seconds, 0 or more, under `key`. ValueError otherwise."""
    number = value.get(key)
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number < 1e12:
        raise ValueError(f"{key}: expected seconds, 0 or more")
    return float(number)
