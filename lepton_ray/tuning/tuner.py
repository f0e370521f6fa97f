"""The driver of a search: check, draw, let Ray Tune run the trials, write the journal, name the best."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune as ray_tune

from lepton_ray.cluster import connect, scratch_folder
from lepton_ray.errors import LeptonError, UsageError, escaped
from lepton_ray.settings import Settings, TrainingSettings
from lepton_ray.settings.tuning import TuningSettings
from lepton_ray.storage import Store
from lepton_ray.tuning.actor import TrialPlan, actor_of
from lepton_ray.tuning.draws import NUMBER, OptunaDraws, check_optuna, draw_all
from lepton_ray.tuning.journal import Journal
from lepton_ray.tuning.journalist import Halt, Journalist
from lepton_ray.tuning.schedulers import make_scheduler
from lepton_ray.tuning.space import Check, check_space, trial_count, trial_settings
from lepton_ray.tuning.trials import (
    ENDED,
    FAILED,
    Direction,
    RunTrial,
    Segment,
    Trial,
    best_of,
    run_name,
    trial_name,
)

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # else each trial gets CSV, JSON and TensorBoard files of Ray's
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # the journal is the memory of a search, not Ray's pickles
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # trials begin in their order
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the journal says it in one line
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",  # a trial's driver asks for none
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Set, where not set already, while Ray Tune runs."""
POLL_S = 0.2
FAREWELL_S = 20.0
"""Seconds that Ray Tune has to end its trials where the search is broken off; it kills their processes after 10."""


@dataclass(frozen=True)
class TuningResult:
    """A search that came to its end."""

    run: str
    metric: str
    direction: Direction
    trials: list[Trial]
    best: Trial
    """The finished trial with the best value."""
    best_settings: Settings
    """With which the best trial's newest run was trained."""
    resumed: bool
    """Whether an earlier driver had been at it."""


class Tuning:
    """One search.

    Args:
        settings: of a training run, with `tuning`.
        store: where journal and runs are kept.
        run_trial: trains one trial; see RunTrial.
        decides: the tuned metric and its better direction.
        table_version: version of the table that all trials learn from.
        check: raises UsageError for settings that no run can start with.
        on_change: called with each trial that changed.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        run_trial: RunTrial,
        *,
        decides: tuple[str, Direction],
        table_version: int | None = None,
        check: Check = lambda _: None,
        on_change: Callable[[Trial], None] = lambda _: None,
    ) -> None:
        check_space(settings, check)
        assert settings.tuning is not None  # noqa: S101 - check_space
        self._settings, self._tuning, self._store, self._run_trial = settings, settings.tuning, store, run_trial
        self._metric, self._direction = decides
        self._table_version, self._on_change = table_version, on_change
        run_name(settings.run, trial_count(self._tuning), 99 if self._tuning.scheduler == "pbt" else 1)
        if self._tuning.search == "optuna":
            check_optuna()
            self._drawn: list[dict[str, Any]] = []
        else:
            self._drawn = draw_all(self._tuning)
            for number, params in enumerate(self._drawn):
                check(trial_settings(settings, self._first(number, params), table_version))
        self.journal = Journal(store, settings.run)

    def run(self, lost: threading.Event | None = None) -> TuningResult:
        """Run all trials that have not ended yet; the same search goes on where an earlier driver left it.

        Args:
            lost: set where another driver has taken the search over; this one then stops.

        Raises LeptonError where no trial came to its end.
        """
        resumed = self.journal.open(self._settings)
        for number, params in enumerate(self._drawn):
            if number not in self.journal.trials:
                self.journal.trials[number] = Trial(number, (self._first(number, params),))
        left = [trial for trial in self.journal.in_order() if trial.state not in ENDED]
        if left or len(self.journal.trials) < trial_count(self._tuning):
            try:
                self._search(lost or threading.Event())
            except BaseException as error:
                state = "failed" if isinstance(error, LeptonError) else "interrupted"
                with contextlib.suppress(LeptonError):  # what went wrong first is told
                    if self.journal.fields:
                        self.journal.update(state=state, error=escaped(str(error), 300))
                raise
        return self._result(resumed=resumed)

    def _first(self, number: int, params: dict[str, Any]) -> Segment:
        return Segment(run_name(self._settings.run, number), params)

    def _search(self, lost: threading.Event) -> None:
        for name, value in TUNE_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with connect(), scratch_folder() as scratch:
            concurrent = concurrency(self._tuning, self._settings.training, ray.cluster_resources())
            self.journal.begin(
                self._settings, metric=self._metric, direction=self._direction, table_version=self._table_version
            )
            halt = Halt()
            tuner = self._tuner(concurrent, str(scratch), halt)
            outcome: list[BaseException | None] = []
            # fit() takes over Ctrl-C when it runs in the main thread, so it does not
            thread = threading.Thread(target=_fit, args=(tuner, outcome), name="ray-tune", daemon=True)
            thread.start()
            try:
                while thread.is_alive() and not lost.is_set():
                    thread.join(POLL_S)
            finally:
                halt.now.set()
                thread.join(FAREWELL_S)
            if lost.is_set():
                raise LeptonError(f"tuning {self._settings.run}: another driver took it over; this one stops")
            if not outcome:
                raise LeptonError(f"tuning {self._settings.run}: Ray Tune does not end; look at the trials' runs")
            if isinstance(outcome[0], LeptonError):
                raise outcome[0]
            if outcome[0] is not None:
                reason = escaped(str(outcome[0]) or type(outcome[0]).__name__, 300)
                raise LeptonError(f"tuning {self._settings.run}: Ray Tune gave up: {reason}") from outcome[0]

    def _tuner(self, concurrent: int, scratch: str, halt: Halt) -> Any:
        tuning, known = self._tuning, self.journal.in_order()
        left = [trial for trial in known if trial.state not in ENDED]
        plan = TrialPlan(
            self._settings, self._store.uri, self._table_version, self._run_trial, self._metric, self._direction,
            {trial.number: trial for trial in left},
        )  # fmt: skip
        draws = OptunaDraws(tuning, self._direction, known) if tuning.search == "optuna" else None
        scheduler = make_scheduler(
            tuning,
            self._direction,
            self._settings.training.epochs,
            self._metric,
            [trial for trial in known if trial.state in ENDED],
            in_turns=concurrent < len(left),
        )
        return ray_tune.Tuner(
            ray_tune.with_resources(actor_of(plan), _place(concurrent)),
            param_space=None if draws else _one_after_the_other(left),
            tune_config=ray_tune.TuneConfig(
                search_alg=draws,
                scheduler=scheduler,
                num_samples=draws.to_come if draws else 1,
                max_concurrent_trials=concurrent if draws else None,
                trial_name_creator=lambda trial: trial_name(trial.config[NUMBER]),
                trial_dirname_creator=lambda trial: trial_name(trial.config[NUMBER]),
            ),
            run_config=ray_tune.RunConfig(
                name=self._settings.run,
                storage_path=scratch,
                stop=halt,
                verbose=0,
                callbacks=[Journalist(self.journal, self._settings.run, self._on_change, halt)],
            ),
        )

    def _result(self, *, resumed: bool) -> TuningResult:
        run, trials = self._settings.run, self.journal.in_order()
        best = best_of(trials, self._direction)
        if best is None:
            failed = [f"{trial.name}: {trial.error}" for trial in trials if trial.state == FAILED]
            why = "; ".join(failed[:3]) or f"no value of {self._metric} was a number"
            self.journal.update(state="failed", error=why)
            raise LeptonError(f"tuning {run}: no trial came to its end: {why}")
        self.journal.update(state="finished", best=best.number, finished_at=time.time(), error=None)
        settings = trial_settings(self._settings, best.segments[-1], self._table_version)
        return TuningResult(run, self._metric, self._direction, trials, best, settings, resumed)


def concurrency(tuning: TuningSettings, training: TrainingSettings, resources: dict[str, float]) -> int:
    """How many trials run at the same time.

    Raises UsageError where the cluster has no room for so many, with the largest number that fits.
    """
    workers = training.most_workers
    if training.grow_after_s is not None:
        raise UsageError(
            f"training.workers is a range (up to {workers}): trials are compared, and have as many as each "
            f"other; set training.workers to a number"
        )
    wanted = {"CPU": workers * training.cpus_per_worker, **({"GPU": workers} if training.gpu else {})}
    most = min(int(resources.get(kind, 0.0) // amount) for kind, amount in wanted.items())
    needs = " and ".join(f"{amount} {kind}" for kind, amount in wanted.items())
    has = " and ".join(f"{resources.get(kind, 0.0):g} {kind}" for kind in wanted)
    if most < 1:
        raise UsageError(f"training.workers is {workers}: a trial needs {needs}, there are {has}; lower it")
    if tuning.concurrent is not None and tuning.concurrent > most:
        raise UsageError(
            f"tuning.concurrent is {tuning.concurrent}: each trial needs {needs}, there are {has}; "
            f"set it to {most} or less"
        )
    return tuning.concurrent or min(most, trial_count(tuning))


def _place(concurrent: int) -> Any:
    """What a trial's driver asks for: its share of this process's node, where Ray Train wants it; no CPU.

    The workers ask for their CPUs and GPUs themselves. The share is what keeps trials to `concurrent`, also where
    population based training pauses some.
    """
    here = ray.get_runtime_context().get_node_id()
    address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    return ray_tune.PlacementGroupFactory([{f"node:{address}": int(10_000 / concurrent) / 10_000}])


def _one_after_the_other(trials: list[Trial]) -> dict[str, Any]:
    """A parameter space of exactly these trials."""
    params = {trial.number: dict(trial.params) for trial in trials}

    def value(key: str) -> Any:
        return ray_tune.sample_from(lambda spec: params[spec.config[NUMBER]][key])

    keys = sorted({key for each in params.values() for key in each})
    return {NUMBER: ray_tune.grid_search(list(params)), **{key: value(key) for key in keys}}


def _fit(tuner: Any, outcome: list[BaseException | None]) -> None:
    # advice of Ray's that a trial cannot follow: a process whose training was cut off is not used again
    warnings.filterwarnings("ignore", "Consider boosting PBT performance", UserWarning)
    try:
        tuner.fit()
        outcome.append(None)
    except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
        outcome.append(error)
