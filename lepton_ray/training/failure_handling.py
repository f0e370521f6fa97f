"""What Ray Train's controller asks when a worker group failed: our policy, with the run's history and its progress."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from ray.train import FailureConfig  # noqa: TID251 - a part of the door
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy  # noqa: TID251

from lepton_ray.errors import escaped
from lepton_ray.monitoring.incidents import Incident, IncidentKind, incidents, report
from lepton_ray.storage import open_store
from lepton_ray.training.failure_policy import Decision, Failure, Limits, decide
from lepton_ray.training.failures import classify, words_of_ranks
from lepton_ray.training.memory_evidence import MemoryWitness
from lepton_ray.training.progress import newest_step

_log = logging.getLogger(__name__)
READ_S = 3.0
"""Seconds that the store is given to say how far the run is; after that it is not known."""
WRITE_S = 5.0
"""Seconds that the last incident of a run is given to be written."""


@dataclass
class _Known:
    """What the store says at a failure."""

    step: int | None = None
    told: list[Incident] = field(default_factory=list)
    """New incidents of this attempt that others wrote."""


class RunFailurePolicy(FailurePolicy):  # type: ignore[misc] # Ray is untyped here
    """Decides after each failure of a run's ranks, keeps the history, and writes incidents.

    Args:
        store_uri: where the run is kept.
        run: its name.
        attempt: the driver's attempt at it.
        limits: how much it may fail.
        workers: ranks that it has.
        minimum: ranks that it may go down to; None where their number is fixed.
        clock: seconds, forward only.
        draw: gives a random number, 0 <= x < 1.
        read_s: seconds that the store is given to answer.
    """

    def __init__(
        self,
        store_uri: str,
        run: str,
        attempt: int,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        minimum: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        read_s: float = READ_S,
    ) -> None:
        self.limits = limits or Limits()
        super().__init__(FailureConfig(max_failures=self.limits.max_failures))
        self.run, self.attempt, self.workers, self.minimum = run, attempt, workers, minimum
        self.room: Callable[[], int] | None = None
        """Gives the ranks that the cluster has room for, where their number may change."""
        self.history: list[Failure] = []
        """Of this driver, oldest first."""
        self.last: Decision | None = None
        self.gave_up: str | None = None
        """Once the run has ended by this policy: why, for the user."""
        self._store_uri, self._read_s, self._clock, self._draw = store_uri, read_s, clock, draw
        self._witness = MemoryWitness()
        self._step: int | None = None
        self._used: set[tuple[str, float]] = set()
        self._writers: list[threading.Thread] = []

    @property
    def pause_s(self) -> float:
        """Seconds to wait before what was decided last is done."""
        return self.last.after_s if self.last is not None else 0.0

    def watch_memory(self, pids: Mapping[int, int]) -> None:
        """Name the ranks of this node (rank to process id), whenever a worker group has started."""
        self._witness.watch(pids)

    def make_decision(self, training_failed_error: BaseException) -> FailureDecision:
        """What Ray Train's controller calls, with the errors of all ranks."""
        known = self._known()
        failure = self._failure(training_failed_error, known)
        self.history.append(failure)
        decision = decide(
            self.history, self.limits, self._clock(), jitter=self._draw(), workers=self.workers, fit=self._fit(),
            minimum=self.minimum,
        )  # fmt: skip
        self.last = decision
        over = decision.action == "give_up"
        if over:
            self.gave_up = decision.why
        _log.warning(
            "run %s: %s: %s%s", self.run, decision.action.replace("_", " "), decision.why,
            f" (in {decision.after_s:.1f} s)" if decision.after_s else "",
        )  # fmt: skip
        self._report(failure, decision, known, words_of_ranks(training_failed_error))
        if over:
            self.settle(WRITE_S)
        return FailureDecision.RAISE if over else FailureDecision.RETRY

    def _fit(self) -> int | None:
        """Ranks that there is room for; None where that is not known or of no use."""
        try:
            return self.room() if self.room is not None else None
        except Exception as error:  # noqa: BLE001 - the next group finds out anyway
            _log.warning("run %s: what is free is not known: %s", self.run, escaped(str(error)))
            return None

    def settle(self, within_s: float) -> None:
        """Wait for incidents that are being written, so long at most."""
        until = time.monotonic() + within_s
        for writer in self._writers:
            writer.join(max(0.0, until - time.monotonic()))
        self._writers = [writer for writer in self._writers if writer.is_alive()]

    def _failure(self, error: BaseException, known: _Known) -> Failure:
        failure = classify(error, step=known.step, at=self._clock(), out_of_memory=self._witness.killed())
        # the watchdog ends a hung rank, which then looks like any that was killed; it has told before it did
        hangs = [each for each in known.told if each.kind == "hang"]
        hung = [each for each in hangs if each.rank is None or failure.rank in (each.rank, None)]
        if failure.kind != "worker_lost" or not hung:
            return failure
        return replace(failure, kind="hang", rank=hung[-1].rank, words=escaped(hung[-1].reason, 300))

    def _known(self) -> _Known:
        """Ask the store, for so long as the ranks may wait; called at a failure only."""
        answers: list[_Known] = []

        def ask() -> None:
            with contextlib.suppress(Exception):  # storage is away: then it is not known
                store = open_store(self._store_uri)
                step = newest_step(store, self.run)
                answers.append(_Known(step, [each for each in incidents(store, self.run) if self._by_others(each)]))

        asking = threading.Thread(target=ask, name="progress", daemon=True)
        asking.start()
        asking.join(self._read_s)
        if not answers:
            return _Known()
        known = answers[0]
        self._step = max(known.step or 0, self._step or 0)
        new = [each for each in known.told if (each.kind, each.at) not in self._used]
        self._used.update((each.kind, each.at) for each in new)
        return _Known(self._step, new)

    def _by_others(self, incident: Incident) -> bool:
        """Whether somebody closer to it wrote an incident of this attempt: ranks that leave, the watchdog."""
        return incident.attempt == self.attempt and "decision" not in incident.evidence

    def _report(self, failure: Failure, decision: Decision, known: _Known, ranks: dict[str, str]) -> None:
        """Write what happened, beside the run, while it goes on."""
        if failure.kind in ("waiting", "resize"):
            return
        made = Incident(
            kind=cast("IncidentKind", failure.kind), reason=failure.words, attempt=self.attempt, rank=failure.rank,
            step=failure.step,
            evidence={
                "ranks": ranks, "decision": decision.action, "after_s": decision.after_s, "why": decision.why,
                "charged": decision.charged, "failures": len(self.history),
            },
        )  # fmt: skip
        found = [] if any(each.kind == made.kind for each in known.told) else [made]
        if decision.action == "give_up" and decision.why.startswith("no progress"):
            found.append(replace(made, kind="no_progress", reason=decision.why))

        def write() -> None:
            with contextlib.suppress(Exception):  # monitoring never stops training
                store = open_store(self._store_uri)
                for incident in found:
                    report(store, self.run, incident)

        writer = threading.Thread(target=write, name="incident", daemon=True)
        writer.start()
        self._writers.append(writer)
