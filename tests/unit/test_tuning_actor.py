"""The process of a trial, without a cluster: which run it begins, what it tells, and how it is ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_ray.errors import LeptonError
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.storage import Store, open_store
from lepton_ray.tuning.actor import DONE, METRICS, SEGMENT, TrialActor, TrialPlan, TrialStoppedError, actor_of
from lepton_ray.tuning.draws import NUMBER, OBJECTIVE
from lepton_ray.tuning.schedulers import EPOCH
from lepton_ray.tuning.trials import WORST, Evaluation, Outcome, RunTrial, Segment, Trial

LR = "training.optimizer.learning_rate"


def settings() -> Settings:
    return parse_settings(
        {"run": "s", "training": {"epochs": 5}, "tuning": {"trials": 2, "space": {LR: {"choice": [1]}}}}
    )


def train(epochs: int, seen: list[Settings]) -> RunTrial:
    """A training whose accuracy after each epoch is the epoch; the last evaluation comes with the outcome."""

    def run(trial: Settings, store_uri: str, tell: Callable[[Evaluation], None]) -> Outcome:
        seen.append(trial)
        open_store(store_uri).put(f"runs/{trial.run}/record.json", b"{}")
        for epoch in range(1, min(epochs, trial.training.epochs) + 1):
            tell(Evaluation(epoch, {"accuracy": float(epoch)}))
            tell(Evaluation(epoch, {"accuracy": float(epoch)}))  # told again is no news
        return Outcome(min(epochs, trial.training.epochs), {"accuracy": float(epochs)})

    return run


def actor(store: Store, run: RunTrial, number: int = 0, known: Trial | None = None, rate: float = 0.1) -> TrialActor:
    plan = TrialPlan(settings(), store.uri, 2, run, "accuracy", "max", {number: known} if known else {})
    return actor_of(plan)({"__trial_info__": SimpleNamespace(trial_name=f"t{number:03d}"), NUMBER: 77, LR: rate})


def told(process: TrialActor) -> list[tuple[int, float, bool]]:
    """All its reports to the end: epoch, value, whether finished."""
    reports: list[dict[str, Any]] = []
    while not reports or not reports[-1][DONE]:
        reports.append(process.step())
    return [(each[EPOCH], each[OBJECTIVE], each[DONE]) for each in reports]


def test_a_trial_is_a_run_named_after_it_and_tells_each_epoch_once(file_store: Store) -> None:
    """The trial's number is in its name, whatever stands in a config that another trial handed on."""
    seen: list[Settings] = []
    process = actor(file_store, train(5, seen), number=3)
    assert told(process) == [(1, 1.0, False), (2, 2.0, False), (3, 3.0, False), (4, 4.0, False), (5, 5.0, True)]
    assert [each.run for each in seen] == ["s-t003"]
    assert (seen[0].training.optimizer.learning_rate, seen[0].data.version) == (0.1, 2)
    process.cleanup()


def test_a_training_that_ends_early_tells_the_epoch_it_came_to(file_store: Store) -> None:
    assert told(actor(file_store, train(2, [])))[-1] == (2, 2.0, True)


def test_what_an_earlier_driver_saw_is_told_again_before_training_goes_on(file_store: Store) -> None:
    """So that the scheduler knows it; then only later epochs are told, of the run that was left."""
    seen: list[Settings] = []
    evaluations = (Evaluation(1, {"accuracy": 0.1}), Evaluation(2, {"accuracy": 0.2}))
    known = Trial(0, (Segment("s-t000", {LR: 0.5}),), evaluations=evaluations)
    process = actor(file_store, train(5, seen), known=known, rate=0.5)
    first = process.step()
    assert (first[EPOCH], first[OBJECTIVE], first["again"]) == (1, 0.1, True)
    assert not seen, "nothing is trained before the scheduler has seen the past"
    assert told(process) == [(2, 0.2, False), (3, 3.0, False), (4, 4.0, False), (5, 5.0, True)]
    assert seen[0].training.optimizer.learning_rate == 0.5


def test_an_exploit_goes_on_from_the_donor_in_a_run_of_its_own(file_store: Store, tmp_path: Path) -> None:
    """Its name is free, its epochs are those left, its settings are the changed ones; twice gives two runs."""
    donor = actor(file_store, train(5, []), number=1, rate=0.7)
    for _ in range(2):
        donor.step()
    pointer = donor.save_checkpoint(str(tmp_path))
    for part in (2, 3):
        seen: list[Settings] = []
        process = actor(file_store, train(5, seen), number=0, rate=0.84)
        process.load_checkpoint(pointer)
        first = process.step()
        assert json.loads(first[SEGMENT])["donor"] == "s-t001"
        assert [first[EPOCH], *(epoch for epoch, _, _ in told(process))] == [3, 4, 5], "epochs of the whole trial"
        assert (seen[0].run, seen[0].training.epochs) == (f"s-t000-p{part}", 3)
        assert seen[0].training.initial.weights == "run:s-t001"
        assert seen[0].training.optimizer.learning_rate == 0.84


def test_a_pause_goes_on_in_the_same_run(file_store: Store, tmp_path: Path) -> None:
    seen: list[Settings] = []
    process = actor(file_store, train(5, seen))
    process.step()
    pointer = process.save_checkpoint(str(tmp_path))
    again = actor(file_store, train(5, seen))
    again.load_checkpoint(pointer)
    assert told(again)[0] == (2, 2.0, False)
    assert [each.run for each in seen] == ["s-t000", "s-t000"]


def test_a_stopped_trial_ends_as_an_exception_would(file_store: Store) -> None:
    """The training is told through its next evaluation, and has let go before the process may end."""
    let_go = threading.Event()
    going_on = threading.Event()

    def run(trial: Settings, store_uri: str, tell: Callable[[Evaluation], None]) -> Outcome:
        tell(Evaluation(1, {"accuracy": 1.0}))
        going_on.wait(30)
        try:
            tell(Evaluation(2, {"accuracy": 2.0}))
        except TrialStoppedError:
            let_go.set()
            raise
        return Outcome(5, {"accuracy": 5.0})

    process = actor(file_store, run)
    process.step()
    threading.Timer(0.2, going_on.set).start()
    process.cleanup()
    assert let_go.is_set()


def test_a_failed_training_raises_its_own_error(file_store: Store) -> None:
    def run(trial: Settings, store_uri: str, tell: Callable[[Evaluation], None]) -> Outcome:
        raise LeptonError("rank 1 failed: out of memory")

    with pytest.raises(LeptonError, match="rank 1 failed"):
        actor(file_store, run).step()


@pytest.mark.parametrize(
    ("metrics", "value"), [({"accuracy": float("nan")}, -WORST), ({"accuracy": float("-inf")}, -WORST)]
)
def test_a_metric_that_is_no_number_is_told_as_the_worst(
    file_store: Store, metrics: dict[str, float], value: float
) -> None:
    def run(trial: Settings, store_uri: str, tell: Callable[[Evaluation], None]) -> Outcome:
        return Outcome(5, metrics)

    report = actor(file_store, run).step()
    assert (report[OBJECTIVE], set(report[METRICS])) == (value, {"accuracy"})


def test_a_metric_that_the_evaluation_lacks_is_named(file_store: Store) -> None:
    def run(trial: Settings, store_uri: str, tell: Callable[[Evaluation], None]) -> Outcome:
        return Outcome(5, {"loss": 1.0})

    with pytest.raises(LeptonError, match="metric 'accuracy': the evaluation has loss"):
        actor(file_store, run).step()
