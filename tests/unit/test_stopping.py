"""Training ends for a reason, and the best step is known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lepton_ray.settings.training import StoppingSettings
from lepton_ray.training.stopping import Best, Stopping


def evaluations_until_the_end(stopping: Stopping, values: list[float]) -> int | None:
    for count, value in enumerate(values, 1):
        if stopping.evaluated(value):
            return count
    return None


def test_without_settings_training_never_ends_early() -> None:
    assert evaluations_until_the_end(Stopping(StoppingSettings(), "max"), [0.5] * 100) is None


@pytest.mark.parametrize(
    ("direction", "values", "ends"),
    [
        ("max", [0.1, 0.2, 0.3, 0.3, 0.3, 0.3], 5),
        ("min", [0.3, 0.2, 0.1, 0.1, 0.1, 0.1], 5),
        ("max", [0.3, 0.2, 0.31, 0.2, 0.2], 5),
        ("max", [0.3, 0.2, 0.31, 0.2, 0.32], None),
        ("max", [math.nan, math.nan, 0.1], 2),
        ("max", [0.1, math.nan, math.nan], 3),
        ("max", [0.1, math.nan, 0.2, math.nan], None),
    ],
)
def test_patience_counts_evaluations_without_a_better_value(direction: Any, values: list[float], ends: int) -> None:
    stopping = Stopping(StoppingSettings(patience=2), direction)
    assert evaluations_until_the_end(stopping, values) == ends


def test_smaller_changes_than_min_delta_do_not_count() -> None:
    """The change is measured from the last value that counted, so many small ones add up."""
    slow = [0.50, 0.52, 0.54, 0.56, 0.58, 0.60]
    assert evaluations_until_the_end(Stopping(StoppingSettings(patience=3, min_delta=0.05), "max"), slow) is None
    assert evaluations_until_the_end(Stopping(StoppingSettings(patience=2, min_delta=0.05), "max"), slow) == 3


@pytest.mark.parametrize(
    ("direction", "values", "ends"),
    [("max", [0.8, 0.89, 0.9, 0.7], 3), ("min", [1.2, 0.91, 0.85], 3), ("max", [0.1, math.nan], None)],
)
def test_training_ends_once_the_target_is_met(direction: Any, values: list[float], ends: int) -> None:
    assert evaluations_until_the_end(Stopping(StoppingSettings(target=0.9), direction), values) == ends


def test_the_reason_says_the_metric_and_its_values() -> None:
    target = Stopping(StoppingSettings(target=0.9), "max", "accuracy")
    assert target.evaluated(0.91) == "accuracy is 0.91 and meets the target 0.9"
    patience = Stopping(StoppingSettings(metric="loss", patience=1), "min")
    assert patience.evaluated(0.25) is None
    assert patience.evaluated(0.5) == "loss has not been better than the best, 0.25, in 1 evaluations"


def test_a_resumed_run_ends_where_the_undisturbed_one_ends() -> None:
    """Restored before each evaluation, it ends at the same one with the same reason, and still knows it after."""
    values = [0.1, 0.3, 0.2, 0.29, 0.3, 0.1]
    settings = StoppingSettings(patience=3)
    whole = Stopping(settings, "max")
    expected = evaluations_until_the_end(whole, values)
    stopping = Stopping(settings, "max")
    done = 0
    while stopping.reason is None:
        restored = Stopping(settings, "max")
        restored.restore(json.loads(json.dumps(stopping.to_json())))
        stopping = restored
        stopping.evaluated(values[done])
        done += 1
    assert done == expected == 5
    assert stopping.reason == whole.reason is not None
    restored.restore(json.loads(json.dumps(stopping.to_json())))
    assert restored.reason == whole.reason


def test_the_best_step_is_the_first_of_equal_ones() -> None:
    best = Best("max")
    assert [best.evaluated(step, value) for step, value in enumerate([math.nan, 0.5, 0.5, 0.4, 0.6, math.nan])] == [
        False, True, False, False, True, False,
    ]  # fmt: skip
    assert (best.step, best.value) == (4, 0.6)
    restored = Best("max")
    restored.restore(json.loads(json.dumps(best.to_json())))
    assert not restored.evaluated(9, 0.6)
    assert (restored.step, restored.value) == (4, 0.6)


def test_less_can_be_better() -> None:
    best = Best("min")
    assert [best.evaluated(step, value) for step, value in enumerate([0.5, 0.6, 0.4])] == [True, False, True]
