"""The watch: looks at all runs of a store again and again, and starts the driver of those that lost theirs.

Two watches of one store do not start two drivers: each start is claimed first by an object that only one of them can
make (`runs/<run>/resumptions/<attempt>-<number>.json`). And if they did, the run's lease would let only one of them in.
Whether a driver is gone is told as by one who wants the lease: it has stood still for its time to live, by this
process's clock, or its process was one of this host and is gone. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lepton_ray.errors import ConflictError, LeptonError, NotFoundError
from lepton_ray.monitoring.incidents import Incident, report
from lepton_ray.monitoring.runs import list_runs, read_json
from lepton_ray.orchestrator.decision import Action, Resumption, RunView, decide_run
from lepton_ray.orchestrator.submission import Submission
from lepton_ray.storage import Store
from lepton_ray.training.lease import LeaseView, look_at
from lepton_ray.training.progress import newest_step
from lepton_ray.training.record import INTERRUPTED, RUNNING, record_key

OVER_AGAIN_S = 60.0
"""Seconds between two looks at a run that is over."""
ONCE_S = 60.0
"""Seconds in which a single round ends: a lease stands still for 15, and a second start may wait for a few."""
ON_ITS_WAY_S = 120.0
"""Seconds that a driver which somebody else has started is given to take the lease."""
_CLAIM = re.compile(r"([0-9]{6})-([0-9]{1,6})\.json")
_TRIAL = re.compile(r"(.+)-t[0-9]{3,}(-p[0-9]+)?")


@dataclass(frozen=True)
class _Claims:
    """What orchestrators have written beside a run."""

    earlier: tuple[Resumption, ...]
    number: int
    """Claims of the next attempt so far."""
    gave_up: bool


class Watch:
    """Looks after the runs of a store.

    Args:
        store: where the runs are.
        submission: how drivers are started.
        say: is told what happens, one object each, with `event` and `run`.
        clock: seconds, forward only.
        draw: gives a random number, 0 <= x < 1.
    """

    def __init__(
        self,
        store: Store,
        submission: Submission,
        say: Callable[[Mapping[str, Any]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store, self._submission, self._say, self._clock, self._draw = store, submission, say, clock, draw
        self._still: dict[str, tuple[str, float, bool]] = {}
        self._again_at: dict[str, float] = {}
        self._first_seen: dict[str, float] = {}
        self._due: dict[str, float] = {}
        self._said: dict[str, tuple[Any, ...]] = {}

    def run(self, stop: threading.Event, every_s: float) -> None:
        """Look every `every_s` seconds until `stop` is set."""
        while not stop.is_set():
            self.look()
            stop.wait(every_s)

    def run_once(self, stop: threading.Event, every_s: float, within_s: float = ONCE_S) -> bool:
        """Look until each run is known to be driven, left, given up or started again; False where time was short."""
        until = self._clock() + within_s
        while self.look():
            if stop.is_set() or self._clock() > until:
                return False
            stop.wait(every_s)
        return True

    def look(self) -> bool:
        """Look at all runs once and act; whether any of them has to be looked at again."""
        waiting = False
        try:
            runs = list_runs(self._store)
        except LeptonError as error:
            self._tell("store", event="unreachable", store=self._store.uri, error=str(error))
            return True
        for run in runs:
            if self._clock() < self._again_at.get(run, 0.0):
                continue
            try:
                waiting |= self._look_at(run)
            except (LeptonError, ValueError, TypeError, LookupError, AttributeError) as error:
                # one run whose files are damaged, or that cannot be started, keeps no other from it
                self._tell(run, event="error", run=run, error=f"{type(error).__name__}: {error}")
                waiting = True
        return waiting

    def _look_at(self, run: str) -> bool:
        try:
            record = read_json(self._store, record_key(run))
        except NotFoundError:  # it has not begun
            return False
        if record.get("state") not in (RUNNING, INTERRUPTED):
            self._again_at[run] = self._clock() + OVER_AGAIN_S
            return False
        lease = look_at(self._store, run)
        if lease is None:
            return False
        view, number = self._view(run, record, lease)
        jitter, key = self._draw(), f"{run}/{view.attempt + 1}-{number}"
        action = decide_run(view, time.time(), jitter=jitter)
        about = {"run": run, "attempt": view.attempt, "step": view.step}
        if action.do == "resume":
            return self._resume(run, view, number, action, self._due.setdefault(key, self._clock() + action.after_s))
        if action.do == "give_up":
            self._give_up(run, view, action)
        elif action.do == "leave":
            self._tell(run, event="left", why=action.why, **about)
        return action.do == "wait"

    def _view(self, run: str, record: Mapping[str, Any], lease: LeaseView) -> tuple[RunView, int]:
        """What is known of a run, and how often its next attempt was claimed."""
        driver = self._driver(run, lease)
        if driver == "alive":
            return RunView(str(record["state"]), record.get("wanted"), driver, lease.attempt), 0
        attempts = [each for each in record.get("attempts") or [] if isinstance(each, dict)]
        last = attempts[-1] if attempts else {}
        job = last.get("job") if last.get("attempt") == lease.attempt else None
        claims = self._claims(run, lease.attempt + 1)
        state = self._submission.state(job) if isinstance(job, str) and self._submission.obstacle(job) is None else None
        started = self._started(run, lease.attempt + 1, claims.number)
        view = RunView(
            state=str(record["state"]),
            wanted=record.get("wanted"),
            # a job that is being stopped writes its record first and ends then
            driver="unknown" if driver == "gone" and state == "alive" else driver,
            attempt=lease.attempt,
            step=newest_step(self._store, run) if driver == "gone" else 0,
            obstacle=self._obstacle(run, record, job),
            stopped="stopped" in (state, started),
            on_its_way=started == "alive",
            gave_up=claims.gave_up,
            earlier=claims.earlier,
        )
        return view, claims.number

    def _driver(self, run: str, lease: LeaseView) -> Literal["alive", "gone", "unknown"]:
        if lease.released or lease.gone:
            return "gone"
        etag, since, moved = self._still.get(run, ("", 0.0, False))
        if etag != lease.etag:  # the first look tells nothing: it may have stood still for days
            since, moved = self._clock(), etag != ""
            self._still[run] = (lease.etag, since, moved)
        if self._clock() - since > lease.ttl_s:
            return "gone"
        return "alive" if moved else "unknown"

    def _obstacle(self, run: str, record: Mapping[str, Any], job: Any) -> str | None:
        if not record.get("table"):
            return "its training function is not in the store; start it again from your own program to go on"
        trial = _TRIAL.fullmatch(run)
        if trial and self._store.exists(f"tunings/{trial.group(1)}/record.json"):
            return f"it is a trial of tuning {trial.group(1)}; lepton-ray tune goes on with it"
        return self._submission.obstacle(job if isinstance(job, str) else None)

    def _claims(self, run: str, attempt: int) -> _Claims:
        folder, earlier, number = f"runs/{run}/resumptions", list[Resumption](), 0
        names = self._store.list_names(folder)
        for name in names:
            found = _CLAIM.fullmatch(name)
            if found is None:
                continue
            number = max(number, int(found.group(2)) if int(found.group(1)) == attempt else 0)
            with contextlib.suppress(NotFoundError):  # taken back: the driver could not be started
                claim = read_json(self._store, f"{folder}/{name}")
                earlier.append(Resumption(int(found.group(1)), int(claim["step"]), float(claim["at"])))
        return _Claims(tuple(earlier), number, _gave_up_name(attempt) in names)

    def _started(self, run: str, attempt: int, number: int) -> Literal["alive", "over", "stopped", "none"]:
        """How the driver does that was started last for the next attempt, which has not taken the lease yet."""
        if not number:
            return "none"
        name = driver_name(run, attempt, number)
        state, since = self._submission.state(name), self._first_seen.setdefault(name, self._clock())
        if state == "unknown":  # somebody else's
            return "alive" if self._clock() - since < ON_ITS_WAY_S else "over"
        return state

    def _resume(self, run: str, view: RunView, number: int, action: Action, due: float) -> bool:
        attempt, about = view.attempt + 1, {"run": run, "attempt": view.attempt + 1, "step": view.step}
        if self._clock() < due:
            self._tell(run, event="lost", why=action.why, resumed_in_s=round(due - self._clock(), 1), **about)
            return True
        self._submission.check()
        name, key = driver_name(run, attempt, number + 1), f"runs/{run}/resumptions/{attempt:06d}-{number + 1}.json"
        claim = {"run": run, "attempt": attempt, "step": view.step, "at": time.time(), "why": action.why, "name": name}
        try:
            self._store.put_if_absent(key, json.dumps(claim).encode())
        except ConflictError:  # another service was faster
            return True
        try:
            self._submission.start(name, run)
        except LeptonError:
            self._store.delete(key)
            raise
        self._tell(run, event="resumed", why=action.why, name=name, **about)
        return False

    def _give_up(self, run: str, view: RunView, action: Action) -> None:
        key = f"runs/{run}/resumptions/{_gave_up_name(view.attempt + 1)}"
        told = {"run": run, "attempt": view.attempt, "step": view.step, "why": action.why}
        try:
            self._store.put_if_absent(key, json.dumps({**told, "at": time.time()}).encode())
        except ConflictError:
            return
        self._tell(run, event="gave_up", **told)
        report(
            self._store, run,
            Incident(kind="no_progress", reason=action.why, attempt=view.attempt, step=view.step,
                     evidence={"resumptions": len(view.earlier), "by": "orchestrate"}),
        )  # fmt: skip

    def _tell(self, about: str, **event: Any) -> None:
        """Tell what is new of a run; the same again is not told."""
        same = tuple(event.get(name) for name in ("event", "attempt", "name", "why", "error"))
        if self._said.get(about) != same:
            self._said[about] = same
            self._say(event)


def driver_name(run: str, attempt: int, number: int = 1) -> str:
    """The name of a driver that is started: `<run>-<attempt>`, with `-<number>` where one before it never began."""
    return f"{run}-{attempt}" + (f"-{number}" if number > 1 else "")


def _gave_up_name(attempt: int) -> str:
    return f"{attempt:06d}-gave-up.json"
