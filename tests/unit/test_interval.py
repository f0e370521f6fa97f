"""How often a checkpoint pays."""

from __future__ import annotations

import itertools
import math

import pytest

from lepton_ray.errors import UsageError
from lepton_ray.settings import parse_settings
from lepton_ray.training.interval import (
    PRIOR_FAILURES,
    WORKER_S_PER_FAILURE,
    Failures,
    best_interval,
    daly,
    in_steps,
    young,
)

HOUR = 3600.0


def waste(every_s: float, cost_s: float, between_s: float) -> float:
    """Daly's expected run time over the useful time (2006, equation 20) without restart cost, which moves no optimum.

    M exp(0) (exp((tau + delta) / M) - 1) / tau.
    """
    return between_s * math.expm1((every_s + cost_s) / between_s) / every_s


def test_the_first_order_is_youngs() -> None:
    """Young's own shape: the root of twice cost times mean time between failures."""
    assert young(0.5, 3600.0) == pytest.approx(60.0)
    assert young(2.0, HOUR) == pytest.approx(2 * young(0.5, HOUR))


def test_the_higher_order_is_dalys() -> None:
    """The closed form at one point, by hand, and its end at costs of twice M."""
    # delta 8, M 100: sqrt(1600) (1 + sqrt(0.04) / 3 + 0.04 / 9) - 8
    assert daly(8.0, 100.0) == pytest.approx(40.0 * (1 + 0.2 / 3 + 0.04 / 9) - 8.0)
    assert daly(200.0, 100.0) == 100.0
    assert daly(1e-6, 1e6) == pytest.approx(young(1e-6, 1e6), rel=1e-3)


@pytest.mark.parametrize(("cost_s", "between_s"), [(0.1, 600.0), (5.0, 600.0), (60.0, 600.0), (1.0, 100_000.0)])
def test_nothing_near_it_wastes_less(cost_s: float, between_s: float) -> None:
    """The optimum of the exact expression, which has no closed form, is within 2% of waste; Young's is no better."""
    found = daly(cost_s, between_s)
    least = min(waste(found * factor / 50, cost_s, between_s) for factor in range(5, 500))
    assert waste(found, cost_s, between_s) - 1 <= 1.02 * (least - 1)
    assert waste(found, cost_s, between_s) <= waste(young(cost_s, between_s), cost_s, between_s) * (1 + 1e-6)


def test_it_grows_with_cost_and_with_reliability() -> None:
    """Dear checkpoints and rare failures make it longer."""
    costs, times = [0.01, 0.1, 1.0, 10.0], [10.0 * HOUR, 100.0 * HOUR, 1000.0 * HOUR]
    for between in times:
        found = [best_interval(cost, between) for cost in costs]
        assert found == sorted(found)
    for cost in costs:
        found = [best_interval(cost, between) for between in times]
        assert found == sorted(found)


def test_it_stays_within_its_bounds() -> None:
    """The settings' bounds hold, but one upload is always let through before the next begins."""
    for cost, between in itertools.product((1e-3, 1.0, 100.0), (10.0, 1e6)):
        assert 5.0 <= best_interval(cost, between, least_s=5.0, most_s=60.0) <= 60.0
    assert best_interval(1.0, 1e6, commit_s=90.0, least_s=5.0, most_s=60.0) == 90.0
    assert best_interval(0.0, 1e6, least_s=5.0) == 5.0
    assert (in_steps(10.0, 0.3), in_steps(0.01, 5.0), in_steps(1.0, 0.0)) == (33, 1, 1_000_000)


def test_before_a_failure_the_published_rate_stands() -> None:
    """A new run expects what 16,384 GPUs had; more workers fail sooner."""
    assert Failures().mean_time_between(1) == pytest.approx(WORKER_S_PER_FAILURE)
    assert Failures().mean_time_between(16_384) == pytest.approx(54 * 24 * HOUR / 419, rel=1e-2)
    calm = Failures().and_then(1000 * HOUR)
    assert calm.mean_time_between(2) > Failures().mean_time_between(2)


def test_a_runs_own_failures_outweigh_it() -> None:
    """One failure shortens the time expected between two by a lot, and the tenth makes it what the run has seen."""
    times = [Failures(count, 100 * HOUR).mean_time_between(1) for count in range(11)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[1] > 1 / PRIOR_FAILURES / 2
    assert times[10] == pytest.approx(10 * HOUR, rel=0.6)


def test_failures_are_those_of_earlier_groups() -> None:
    """Groups that finished or left because of a preemption did not fail; the time of all counts."""
    entry = {"started_at": 100.0, "updated_at": 160.0, "world_size": 4, "finished": False}
    entries = [entry, {**entry, "finished": True}, {**entry, "left": "preempted"}, {**entry, "left": None}]
    assert Failures.of(entries) == Failures(2, 4 * 240.0)
    assert Failures.of([]) == Failures()


def test_settings_take_auto_and_refuse_crossed_bounds() -> None:
    """`auto` beside a number of steps, and one line for what is neither."""
    parsed = parse_settings({"training": {"checkpoint": {"every_steps": "auto", "min_s": 1, "max_s": 60}}})
    assert parsed.training.checkpoint.every_steps == "auto"
    with pytest.raises(UsageError, match="min_s is 9, more than max_s"):
        parse_settings({"training": {"checkpoint": {"min_s": 9, "max_s": 3}}})
    with pytest.raises(UsageError, match="every_steps"):
        parse_settings({"training": {"checkpoint": {"every_steps": "often"}}})
