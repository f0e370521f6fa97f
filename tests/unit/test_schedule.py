"""Every schedule gives torch's rates, as a pure function of the step."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lepton_ray.settings import OptimizerSettings
from lepton_ray.settings.training import ScheduleSettings
from lepton_ray.training.schedule import Plateau, learning_rate

PEAK = 0.5


def ours(total: int, per_epoch: float = 10.0, **schedule: Any) -> list[float]:
    settings = OptimizerSettings(learning_rate=PEAK, schedule=ScheduleSettings(**schedule))
    return [learning_rate(settings, step, total, per_epoch) for step in range(total)]


def torchs(total: int, make: Callable[[torch.optim.Optimizer], LRScheduler], every: int = 1) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            with warnings.catch_warnings():  # SequentialLR calls its parts in a way that torch itself warns about
                warnings.simplefilter("ignore", UserWarning)
                scheduler.step()
    return rates


def warmed_up(steps: int, rest: Callable[[torch.optim.Optimizer], LRScheduler]) -> Callable[..., LRScheduler]:
    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        rise = LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
        return SequentialLR(optimizer, [rise, rest(optimizer)], [steps])

    return make


def test_constant_stays_after_a_linear_rise() -> None:
    rates = ours(100, name="constant", warmup=0.1)
    assert rates[:10] == pytest.approx([PEAK * (step + 1) / 11 for step in range(10)])
    assert rates[10:] == [PEAK] * 90


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_torchs_after_a_linear_rise(final: float) -> None:
    expected = torchs(
        100, warmed_up(20, lambda optimizer: CosineAnnealingLR(optimizer, T_max=80, eta_min=final * PEAK))
    )
    assert ours(100, name="cosine", warmup=0.2, final=final) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_linear_is_torchs_after_a_linear_rise(final: float) -> None:
    fall = warmed_up(20, lambda optimizer: LinearLR(optimizer, 1.0, final, total_iters=80))
    expected = torchs(100, fall)
    assert ours(100, name="linear", warmup=0.2, final=final) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_step_is_torchs() -> None:
    expected = torchs(100, lambda optimizer: StepLR(optimizer, step_size=3, gamma=0.2), every=10)
    assert ours(100, name="step", warmup=0.0, step_epochs=3, factor=0.2) == pytest.approx(expected)


def test_step_falls_in_the_step_that_begins_an_epoch() -> None:
    """1,000 rows in batches of 96: twelve epochs are exactly 125 steps, whatever the fraction's rounding."""
    rates = ours(200, 1000 / 96, name="step", warmup=0.0, step_epochs=12)
    assert rates[124] == PEAK
    assert rates[125] == pytest.approx(PEAK / 10)


@pytest.mark.parametrize(("total", "warmup", "start"), [(100, 0.3, 0.04), (37, 0.25, 0.1), (100, 0.005, 0.04)])
def test_one_cycle_is_torchs(total: int, warmup: float, start: float) -> None:
    expected = torchs(
        total,
        lambda optimizer: OneCycleLR(
            optimizer, PEAK, total_steps=total, pct_start=warmup, div_factor=1 / start, cycle_momentum=False
        ),
    )
    found = ours(total, name="one_cycle", warmup=warmup, start=start)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_cycle_without_a_rise_begins_near_its_peak() -> None:
    rates = ours(10, name="one_cycle", warmup=0.0)
    assert rates == sorted(rates, reverse=True)
    assert ours(10, name="one_cycle", warmup=0.1)[0] == pytest.approx(PEAK)  # where torch divides by zero


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "step", "one_cycle", "plateau"])
def test_a_run_of_one_step_learns(name: str) -> None:
    for warmup in (0.0, 0.05, 0.9):
        assert ours(1, 0.1, name=name, warmup=warmup)[0] > 0
    assert all(math.isfinite(rate) and rate >= 0 for rate in ours(3, 0.5, name=name, warmup=0.5))


VALUES = [1.0, 0.9, 0.9, 0.89995, 0.91, 0.9, 0.5, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4]


@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 2, 3])
def test_plateau_is_torchs(direction: Any, patience: int) -> None:
    schedule = ScheduleSettings(name="plateau", warmup=0.0, factor=0.3, patience=patience, final=0.01, min_delta=1e-3)
    values = VALUES if direction == "min" else [1 / value for value in VALUES]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = ReduceLROnPlateau(
        optimizer, direction, factor=0.3, patience=patience, threshold=1e-3, min_lr=0.01 * PEAK
    )  # fmt: skip
    plateau = Plateau(schedule, direction)
    settings = OptimizerSettings(learning_rate=PEAK, schedule=schedule)
    found, expected = [], []
    for value in values:
        plateau.evaluated(value)
        plateau_again = Plateau(schedule, direction)  # as after a restart
        plateau_again.restore(json.loads(json.dumps(plateau.to_json())))
        plateau = plateau_again
        theirs.step(value)
        found.append(learning_rate(settings, 5, 10, 1.0, plateau.factor))
        expected.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(expected)
    assert len(set(found)) > 1


def test_plateau_takes_a_metric_below_zero_and_one_that_is_no_number() -> None:
    """Better means better by a share of the size of the best, also where that is negative; NaN never is."""
    plateau = Plateau(ScheduleSettings(name="plateau", patience=0, factor=0.5, min_delta=0.1), "max")
    plateau.evaluated(-10.0)
    plateau.evaluated(-8.9)
    assert plateau.factor == 1.0
    plateau.evaluated(-8.5)
    assert plateau.factor == 0.5
    plateau.evaluated(math.nan)
    assert plateau.factor == 0.25


def test_other_schedules_do_not_look_at_the_metric() -> None:
    plateau = Plateau(ScheduleSettings(name="cosine", patience=0), "max")
    for _ in range(5):
        plateau.evaluated(0.0)
    assert plateau.factor == 1.0
    settings = OptimizerSettings(learning_rate=PEAK, schedule=ScheduleSettings(name="constant", warmup=0.0))
    assert learning_rate(settings, 5, 10, 1.0, 0.1) == PEAK
