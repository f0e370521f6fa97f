"""The engine on two gloo ranks: what evaluations and faults of the numbers decide, and where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import run_here
from ranks import run_ranks

PLAIN = {"epochs": 4, "global_batch": 16, "checkpoint": {"every_steps": 4, "keep": 2, "hot": False}}


def ranks(folder: Path, function: Any, *arguments: Any) -> Any:
    """What rank 0 gave of a function on two ranks."""
    return run_ranks(function, 2, str(folder), *arguments)[0]


def several(folder: str, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Runs one after the other."""
    copy_every_step()
    return {name: run_here(folder, name, training) for name, training in runs.items()}


def copy_every_step() -> None:
    """The copies of these small steps would take more than their share of the time."""
    from lepton_ray.training import hot_copies

    hot_copies.OVERHEAD = 1e6


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two models are equal bit for bit."""
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def infinite_losses(folder: str, bad: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Runs in which the loss of rank 1 is infinite in some calls."""
    import tasks_for_tests

    outcomes = {}
    for name, calls in bad.items():
        tasks_for_tests.Faulty.calls, tasks_for_tests.Faulty.bad_calls = 0, calls
        outcomes[name] = run_here(folder, name, PLAIN, task="faulty")
    return outcomes


def test_steps_that_are_not_finite_are_skipped_and_three_in_a_row_go_back(tmp_path: Path) -> None:
    """One rank's infinite loss skips the step on all; three in a row restore the newest checkpoint without them."""
    found = ranks(tmp_path, infinite_losses, {"calm": (), "once": (5,), "row": (5, 6, 7)})
    calm, once, row = found["calm"], found["once"], found["row"]
    assert once["step"] == calm["step"] == row["step"]
    assert not equal(once["weights"], calm["weights"])
    assert once["left_out_steps"] == []
    assert row["left_out_steps"] == [5, 6, 7]
    for outcome in found.values():
        assert all(np.isfinite(value).all() for value in outcome["weights"].values())
    left_out = calm["samples"]["0"]["count"] * 4 - sum(entry["count"] for entry in row["samples"].values())
    assert left_out == 3 * 16


def test_early_end_target_and_best(tmp_path: Path) -> None:
    """Patience and target end a run after an evaluation, and the best model's checkpoint outlives all newer ones."""
    found = ranks(tmp_path, several, {
        "patience": {**PLAIN, "epochs": 30, "stopping": {"patience": 2, "min_delta": 1.0}},
        "target": {**PLAIN, "epochs": 30, "stopping": {"metric": "loss", "target": 2.2}},
        "whole": {**PLAIN, "epochs": 12, "optimizer": {"learning_rate": 0.02}},
    })  # fmt: skip
    patience, target, whole = found["patience"], found["target"], found["whole"]
    assert len(patience["evaluations"]) == 3
    assert "accuracy" in patience["stopped"]
    assert target["metrics"]["loss"] <= 2.2 < target["evaluations"][-2]["metrics"]["loss"]
    assert whole["stopped"] is None
    accuracies = [(entry["metrics"]["accuracy"], -entry["step"]) for entry in whole["evaluations"]]
    assert whole["best"]["step"] == -max(accuracies)[1]
    kept = {path.name for path in (tmp_path / "store/runs/whole/checkpoints").iterdir()}
    assert f"step-{whole['best']['step']:012d}" in kept


def test_plateau_lowers_the_rate_and_ema_is_what_is_evaluated(tmp_path: Path) -> None:
    """With a metric that stands still the plateau schedule falls; the moving average differs from the weights."""
    plateau = {"name": "plateau", "patience": 0, "factor": 0.1, "min_delta": 0.9, "warmup": 0.0}
    found = ranks(tmp_path, several, {
        "constant": {**PLAIN, "optimizer": {"learning_rate": 5e-3, "schedule": {"name": "constant", "warmup": 0.0}}},
        "plateau": {**PLAIN, "optimizer": {"learning_rate": 5e-3, "schedule": plateau}},
        "average": {**PLAIN, "optimizer": {"learning_rate": 5e-3, "ema": 0.9}},
        "plain": {**PLAIN, "optimizer": {"learning_rate": 5e-3}},
    })  # fmt: skip
    assert found["plateau"]["state"]["controls"]["plateau"]["factor"] < 0.1
    assert not equal(found["plateau"]["weights"], found["constant"]["weights"])
    assert not equal(found["average"]["weights"], found["plain"]["weights"])


def broken_off(folder: str, name: str, training: dict[str, Any], calls: int) -> Any:
    """A run whose ranks fail at one of their steps."""
    from lepton_ray.training import loop

    copy_every_step()
    whole, count = loop.take_step, 0

    def failing(rank: Any) -> str:
        nonlocal count
        count += 1
        if count > calls:
            raise RuntimeError("made to fail")
        return whole(rank)

    loop.take_step = failing
    with pytest.raises(RuntimeError, match="made to fail"):
        run_here(folder, name, training)


FULL: dict[str, Any] = {
    **PLAIN,
    "optimizer": {"ema": 0.95, "accumulate": 2, "l1": 1e-5, "schedule": {"name": "plateau", "patience": 0}},
    "sampling": {"class_weights": "balanced"},
}


@pytest.mark.parametrize(("hot", "resumed_at"), [(True, 10), (False, 8)])
def test_a_group_that_is_lost_costs_one_step_with_hot_copies(tmp_path: Path, hot: bool, resumed_at: int) -> None:
    """A new group goes on from the newest hot copy, else from the newest checkpoint, and ends with the same bits."""
    training = {**FULL, "checkpoint": {"every_steps": 4, "keep": 2, "hot": hot}}
    whole = ranks(tmp_path, several, {"whole": training})["whole"]
    ranks(tmp_path, broken_off, "broken", training, 10)
    again = ranks(tmp_path, several, {"broken": training})["broken"]
    assert again["start"] == resumed_at
    assert equal(again["weights"], whole["weights"])
    assert again["samples"] == whole["samples"]


def test_deterministic_runs_are_equal(tmp_path: Path) -> None:
    """The same settings give the same bits twice, and another seed gives others."""
    found = ranks(tmp_path, several, {
        "first": {**PLAIN, "deterministic": True}, "second": {**PLAIN, "deterministic": True},
        "other": {**PLAIN, "deterministic": True, "seed": 1},
    })  # fmt: skip
    assert equal(found["first"]["weights"], found["second"]["weights"])
    assert not equal(found["first"]["weights"], found["other"]["weights"])
