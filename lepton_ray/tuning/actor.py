"""The process in which a trial's driver lives: Ray Tune asks it for the next evaluation, a thread of it trains."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from lepton_ray.errors import LeptonError
from lepton_ray.settings import Settings
from lepton_ray.storage import Store, open_store
from lepton_ray.tuning.draws import NUMBER, OBJECTIVE
from lepton_ray.tuning.schedulers import EPOCH
from lepton_ray.tuning.space import trial_settings
from lepton_ray.tuning.trials import Direction, Evaluation, Outcome, RunTrial, Segment, Trial, objective, run_name

POINTER = "pointer.json"
SEGMENT, METRICS, DONE, AGAIN = "segment", "metrics", "finished", "again"
"""Further keys of what a trial reports."""
FAREWELL_S = 8.0
"""Seconds that a stopped trial has to give its lease back; Ray Tune kills a process after 10."""


class TrialStoppedError(Exception):
    """Raised in the thread that trains once the scheduler has ended or paused the trial: nothing has failed."""


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search have in common; plain values that travel to any node."""

    settings: Settings
    store_uri: str
    table_version: int | None
    run_trial: RunTrial
    metric: str
    direction: Direction
    known: Mapping[int, Trial]
    """Trials that an earlier driver left unfinished."""


class TrialActor(tune.Trainable):  # type: ignore[misc] # Ray is untyped here
    """One trial. What Ray Tune calls its checkpoint is a pointer to a run of the store, which has its own."""

    plan: TrialPlan
    """Set on a subclass per search; see `actor_of`."""

    def setup(self, config: dict[str, Any]) -> None:
        """Learn which trial this is; nothing is started yet."""
        # the name, not the config: population based training hands on the config of another trial
        self._number = int(str(self.trial_name).removeprefix("t"))
        self._params = {key: value for key, value in config.items() if key != NUMBER}
        self._from: dict[str, Any] | None = None
        self._told: queue.SimpleQueue[Evaluation | Outcome | BaseException] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        known = self.plan.known.get(self._number)
        self._segment = known.segments[-1] if known else None
        self._epoch = 0
        self._past = list(known.evaluations) if known else []
        tuning = self.plan.settings.tuning
        if tuning and tuning.scheduler == "pbt":  # looks at what trials are worth now
            self._epoch, self._past = known.epoch if known else 0, []

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation. Raises what the training raised."""
        if self._past:  # what an earlier driver saw is told again, so that the scheduler knows it
            return {**self._report(self._past.pop(0), finished=False), AGAIN: True}
        if self._thread is None:
            self._begin()
        told = self._told.get()
        if isinstance(told, BaseException):
            raise told
        segment = self._segment
        assert segment is not None  # noqa: S101 - set by _begin
        epoch = segment.done_epochs + told.epoch
        return self._report(Evaluation(max(epoch, self._epoch), told.metrics), finished=isinstance(told, Outcome))

    def save_checkpoint(self, checkpoint_dir: str) -> str:
        """Where another trial, or this one after a pause, goes on from."""
        assert self._segment is not None  # noqa: S101 - Ray asks after a step
        pointer = {"number": self._number, "epoch": self._epoch, "segment": asdict(self._segment)}
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(pointer), encoding="utf-8")
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from where a pointer leads: this trial's own run, or that of a better one."""
        self._from = json.loads((Path(checkpoint) / POINTER).read_text(encoding="utf-8"))
        self._past = []

    def cleanup(self) -> None:
        """End the training as an exception would, so that its lease is given back; its processes go with this one."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(FAREWELL_S)

    def _report(self, evaluation: Evaluation, *, finished: bool) -> dict[str, Any]:
        metric, segment = self.plan.metric, self._segment
        self._epoch = evaluation.epoch
        if metric not in evaluation.metrics:
            raise LeptonError(f"metric {metric!r}: the evaluation has {', '.join(sorted(evaluation.metrics))}")
        value = objective(evaluation.metrics[metric], self.plan.direction)
        return {
            EPOCH: evaluation.epoch, OBJECTIVE: value, METRICS: dict(evaluation.metrics), DONE: finished, AGAIN: False,
            SEGMENT: json.dumps(asdict(segment)) if segment else None,
        }  # fmt: skip

    def _begin(self) -> None:
        store = open_store(self.plan.store_uri)
        self._segment = self._segment_to_run(store)
        settings = trial_settings(self.plan.settings, self._segment, self.plan.table_version)
        self._thread = threading.Thread(target=self._train, args=(settings,), name="trial", daemon=True)
        self._thread.start()

    def _segment_to_run(self, store: Store) -> Segment:
        """The run to begin or to go on with."""
        own = run_name(self.plan.settings.run, self._number)
        if self._from is None:
            return self._segment or Segment(own, self._params)
        segment = Segment(**self._from["segment"])
        if self._from["number"] == self._number:  # after a pause
            self._epoch = int(self._from["epoch"])
            return segment
        part = 2
        while store.list_names(f"runs/{run_name(self.plan.settings.run, self._number, part)}"):
            part += 1
        self._epoch = int(self._from["epoch"])
        name = run_name(self.plan.settings.run, self._number, part)
        return replace(segment, run=name, params=self._params, done_epochs=self._epoch, donor=segment.run)

    def _train(self, settings: Settings) -> None:
        """The body of the thread: tells evaluations, then the outcome or the error."""
        last = self._epoch - (self._segment.done_epochs if self._segment else 0)

        def told(evaluation: Evaluation) -> None:
            nonlocal last
            if self._ending.is_set():
                raise TrialStoppedError(f"run {settings.run}: ended by the scheduler of its search")
            # the final one comes with the outcome, once the last checkpoint is safe
            if last < evaluation.epoch < settings.training.epochs:
                last = evaluation.epoch
                self._told.put(evaluation)

        try:
            self._told.put(self.plan.run_trial(settings, self.plan.store_uri, told))
        except BaseException as error:  # noqa: BLE001 - raised again by step
            self._told.put(error)


def actor_of(plan: TrialPlan) -> type[TrialActor]:
    """The trainable class of one search."""
    return type("Trial", (TrialActor,), {"plan": plan})
