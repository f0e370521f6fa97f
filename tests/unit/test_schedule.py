"""The learning rate is a pure function of the step."""

from __future__ import annotations

import pytest

from lepton_ray.settings import OptimizerSettings
from lepton_ray.training.schedule import learning_rate


def test_warmup_rises_linearly_to_the_peak() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup=0.1, schedule="constant")
    rates = [learning_rate(settings, step, 100) for step in range(12)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[9] == pytest.approx(10 / 11)
    assert rates[10:] == [1.0, 1.0]


def test_cosine_falls_from_the_peak_to_nothing() -> None:
    settings = OptimizerSettings(learning_rate=2.0, warmup=0.0, schedule="cosine")
    assert learning_rate(settings, 0, 100) == pytest.approx(2.0)
    assert learning_rate(settings, 50, 100) == pytest.approx(1.0)
    assert learning_rate(settings, 100, 100) == pytest.approx(0.0)


def test_a_run_of_one_step_learns() -> None:
    assert learning_rate(OptimizerSettings(), 0, 1) > 0
