"""Notices of a preemption, and what leaves a rank because of one."""

from __future__ import annotations

import pickle  # noqa: TID251 - how Ray takes an error across
import signal
import time
from collections.abc import Iterator

import pytest

from lepton_ray.errors import LeptonError
from lepton_ray.training import notices
from lepton_ray.training.agreement import Agreement, StepTimes, steps_between
from lepton_ray.training.preemption import Preempted, grace_needed


@pytest.fixture(autouse=True)
def no_notice() -> Iterator[None]:
    """Each test begins and ends without one."""
    notices.clear()
    yield
    notices.clear()


def test_the_first_notice_counts_until_it_is_cleared() -> None:
    """A second one gives no more time."""
    assert notices.preempted() is None
    notices.preempt(20.0)
    first = notices.preempted()
    notices.preempt(500.0)
    assert notices.preempted() is first
    assert first is not None
    assert 0.0 < first.left_s(otherwise=1.0) <= 20.0
    notices.clear()
    assert notices.preempted() is None


def test_a_notice_without_grace_has_that_of_the_settings() -> None:
    """It is counted from when the notice came."""
    notices.preempt()
    found = notices.preempted()
    assert found is not None
    assert found.at <= time.monotonic()
    assert 29.0 < found.left_s(otherwise=30.0) <= 30.0


def test_a_signal_handler_may_give_notice() -> None:
    """The handler runs between two bytecodes of whatever the process does."""
    before = signal.signal(signal.SIGUSR2, lambda *_: notices.preempt(5.0))
    try:
        signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert notices.preempted() is not None


@pytest.mark.parametrize("committed", [True, False])
def test_preempted_crosses_processes_whole(committed: bool) -> None:
    """Step, ranks and outcome arrive, and the sentence says them once."""
    gone = Preempted("digits", 120, (1, 3), committed=committed)
    back = pickle.loads(pickle.dumps(gone))  # noqa: S301 - our own bytes
    assert type(back) is Preempted
    assert isinstance(back, LeptonError)
    assert (back.run, back.step, back.ranks, back.committed) == ("digits", 120, (1, 3), committed)
    assert str(back) == str(gone)
    assert "ranks 1, 3 preempted; all ranks left after step 120" in str(gone)
    assert ("is committed" in str(gone)) is committed


def test_the_grace_that_is_needed_adds_up() -> None:
    """One agreement, the slowest step, and one and a half saves."""
    assert grace_needed(0.5, 2.0, 4.0) == pytest.approx(8.5)


def test_ranks_meet_about_twice_a_second() -> None:
    """Each step where it is long or unknown, every 50th at most where it is short."""
    assert [steps_between(step_s) for step_s in (None, 3.0, 0.5, 0.1, 0.001, 0.0)] == [1, 1, 1, 5, 50, 50]


def test_times_are_known_after_three_steps() -> None:
    """One slow step among them does not count as usual, but as slowest."""
    times = StepTimes()
    for seconds in (9.0, 0.1):
        times.add(seconds)
    assert times.usual is None
    times.add(0.1)
    assert (times.usual, times.slowest) == (0.1, 9.0)


def test_a_group_meets_after_its_first_step() -> None:
    """Whatever step it was restored to, also when it went back."""
    agreement = Agreement(None, leads=True)  # type: ignore[arg-type]
    agreement.begin(700)
    assert [step for step in (700, 701, 702) if agreement.due(step)] == [701, 702]
    agreement.begin(650)
    assert not agreement.due(650)
    assert agreement.due(651)
