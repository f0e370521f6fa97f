"""What is to be done with a run whose driver may be gone. Pure: what is known of the run in, an action out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lepton_ray.training.failure_policy import Failure, Limits, decide
from lepton_ray.training.record import INTERRUPTED, RUNNING

LIMITS = Limits(max_failures=10, no_progress=3, first_pause_s=5.0, longest_pause_s=300.0)
"""How often a driver may be lost. As with failures inside of a run: three at the same step end it."""


@dataclass(frozen=True)
class Resumption:
    """One time that a run's driver was started again by an orchestrator."""

    attempt: int
    """The attempt that it was to begin."""
    step: int
    """The newest step that was known to be done."""
    at: float
    """Unix seconds."""


@dataclass(frozen=True)
class RunView:
    """What is known of a run."""

    state: str
    """As its record has it."""
    wanted: bool | None
    """Whether somebody wants it to go on; None in records of an earlier version."""
    driver: Literal["alive", "gone", "unknown"]
    """`unknown`: its lease has not stood still for long enough."""
    attempt: int
    """Of the newest driver."""
    step: int = 0
    """The newest step that is known to be done."""
    obstacle: str | None = None
    """Why its driver cannot be started from here."""
    stopped: bool = False
    """Whether its Ray job was stopped by somebody."""
    on_its_way: bool = False
    """Whether a driver has been started that has not taken the lease yet."""
    gave_up: bool = False
    """Whether an orchestrator gave this attempt's successor up."""
    earlier: tuple[Resumption, ...] = ()
    """The times that it was resumed, oldest first."""


@dataclass(frozen=True)
class Action:
    """What to do with a run."""

    do: Literal["nothing", "wait", "leave", "resume", "give_up"]
    """`nothing`: it is as it should be. `leave`: it has no driver, and is left so."""
    why: str = ""
    after_s: float = 0.0
    """With `resume`: seconds to wait before it."""


def decide_run(view: RunView, now: float, *, jitter: float = 0.0, limits: Limits = LIMITS) -> Action:
    """What to do with a run.

    Args:
        view: what is known of it.
        now: unix seconds.
        jitter: a random number, 0 <= jitter < 1.
        limits: how often its driver may be lost.
    """
    if view.state not in (RUNNING, INTERRUPTED) or view.gave_up or view.driver == "alive":
        return Action("nothing")
    if left := _left(view):
        return Action("leave", left)
    if view.driver == "unknown" or view.on_its_way:
        return Action("wait")
    words = f"driver of attempt {view.attempt} lost"
    history = [
        *(Failure("worker_lost", None, each.step, f"driver of attempt {each.attempt - 1} lost", each.at)
          for each in view.earlier),
        Failure("worker_lost", None, view.step, words, now),
    ]  # fmt: skip
    decision = decide(history, limits, now, jitter=jitter)
    if decision.action == "give_up":
        return Action("give_up", decision.why)
    return Action("resume", words, decision.after_s)


def _left(view: RunView) -> str | None:
    """Why a run without a driver is left so; None where it is not."""
    if view.wanted is False or (view.wanted is None and view.state == INTERRUPTED):
        return "it was ended by somebody; start it again to go on"
    if view.stopped:
        return "its Ray job was stopped; submit it again to go on"
    return view.obstacle
