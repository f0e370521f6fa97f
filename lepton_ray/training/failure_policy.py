"""What follows from a failure: the same again, on elsewhere, with fewer ranks, or the end of the run. Values only.

The rules, in the order in which they are asked:

1. A preemption is not a failure: resume, charged to nobody. Nor is waiting for nodes that are not there yet, or ranks
   that left so that more of them can follow.
2. What would only repeat itself (a wrong setting, a run that another driver holds) ends the run at once.
3. An error of the training code is tried twice more, since data and networks have moods, and then told as it is.
4. Out of memory is tried once more under the same limit, and then told with what helps.
5. Three failures at the same step without progress end the run: a cause that is in the run repeats itself there.
6. Storage that is away says nothing about the run: it is waited for, an hour at most.
7. All other failures count against `max_failures`, and are forgotten with progress: a failure weighs half as much
   after each HALF_LIFE of progress since, and counts while the weights round to a failure. So three failures within an
   hour end a run and three in a week do not. (Supervisors usually count within a window of time, as Erlang/OTP's
   `intensity` and `period` or systemd's `StartLimitBurst`; progress in place of time keeps a run that only waits from
   being forgiven.)

The first try after progress comes at once. Further ones wait a random time between nothing and a limit that doubles
("full jitter": M. Brooker, Exponential Backoff and Jitter, AWS Architecture Blog, 2015), so that runs that failed
together for one reason do not come back together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FailureKind = Literal[
    "worker_lost", "error", "out_of_memory", "hang", "divergence", "preempted", "resize", "storage", "waiting"
]
"""`waiting`: the cluster has no room for the ranks yet. `resize`: the ranks left, so that more can follow. The
others are named as incidents are."""
Action = Literal["retry", "resume", "shrink", "give_up"]
"""`retry`: once more, though it may repeat itself. `resume`: go on where the run was; the cause lay outside of it."""

UNTROUBLED = ("preempted", "resize", "waiting")
"""Nothing went wrong: on at once, as often as it comes."""
NEVER_CHARGED = (*UNTROUBLED, "storage")


@dataclass(frozen=True)
class Failure:
    """One failure of a run."""

    kind: FailureKind
    rank: int | None
    """The rank that failed first; None where it was none or all, or is not known."""
    step: int | None
    """The newest step that the run was known to have done; None where storage could not tell."""
    words: str
    """One line, with the rank."""
    at: float
    """Seconds of a clock that only goes forward."""
    final: bool = False
    """Whether it would only repeat itself."""


@dataclass(frozen=True)
class Limits:
    """How much a run may fail."""

    max_failures: int = 3
    """Failures without progress after which the run goes on; the next one ends it (`training.max_failures`)."""
    no_progress: int = 3
    """Failures at the same step that end the run."""
    user_errors: int = 2
    """Errors of the training code that are tried again."""
    out_of_memory: int = 1
    """Times that running out of memory is tried again."""
    half_life_steps: int = 1000
    """Steps of progress after which a failure weighs half as much; or `half_life_s`, whichever comes first."""
    half_life_s: float = 3600.0
    """Seconds in which there was progress, likewise."""
    first_pause_s: float = 1.0
    """Longest pause before the second try without progress; doubles with each further one."""
    longest_pause_s: float = 60.0
    storage_s: float = 3600.0
    """Seconds without progress for which storage that is away is waited for."""


@dataclass(frozen=True)
class Decision:
    """What to do."""

    action: Action
    after_s: float
    """Seconds to wait before it is done."""
    why: str
    """One line; where the action is `give_up`, what the user is told."""
    charged: bool
    """Whether the failure counts against `max_failures`."""
    workers: int | None = None
    """With `shrink`: how many ranks there are from now on."""


def decide(
    history: Sequence[Failure],
    limits: Limits,
    now: float,
    *,
    jitter: float = 0.0,
    workers: int | None = None,
    fit: int | None = None,
    minimum: int | None = None,
) -> Decision:
    """Decide what follows from the newest failure.

    Args:
        history: all failures of this driver, oldest first; the last one is decided on.
        limits: how much the run may fail.
        now: seconds of the failures' clock.
        jitter: a random number, 0 <= jitter < 1.
        workers: ranks that the run has.
        fit: ranks that the cluster has room for; None where that is not known.
        minimum: ranks that the run may go down to (`workers.min`); None where it has a fixed number.
    """
    failure, earlier = history[-1], history[:-1]
    charged = failure.kind not in NEVER_CHARGED
    stuck = _stuck(history)
    end = _end(failure, earlier, limits, now, stuck)
    if end is not None:
        return Decision("give_up", 0.0, end, charged)
    pause = 0.0
    if failure.kind not in UNTROUBLED:
        pause = jitter * longest_pause(len(stuck) - 1, limits)
    if fit is not None and minimum is not None and workers is not None and minimum <= fit < workers:
        return Decision(
            "shrink", pause, f"{failure.words}; on with the {fit} of {workers} ranks that fit", charged, fit
        )
    action: Action = "retry" if failure.kind in ("error", "out_of_memory") else "resume"
    return Decision(action, pause, failure.words, charged)


def longest_pause(tries: int, limits: Limits) -> float:
    """Seconds of pause at most before a try, by how many there were without progress before."""
    if tries <= 0:
        return 0.0
    return float(min(limits.longest_pause_s, limits.first_pause_s * 2.0 ** min(tries - 1, 60)))


def weight(earlier: Sequence[Failure], step: int | None, now: float, limits: Limits) -> int:
    """How many of these failures still count at `step`: each weighs half as much after each half-life of progress."""
    total = 0.0
    for failure in earlier:
        lives = 0.0
        if step is not None and failure.step is not None and step > failure.step:
            lives = max((step - failure.step) / limits.half_life_steps, (now - failure.at) / limits.half_life_s)
        total += 0.5 ** min(lives, 1000.0)
    return int(total + 0.5)


def _end(
    failure: Failure, earlier: Sequence[Failure], limits: Limits, now: float, stuck: Sequence[Failure]
) -> str | None:
    """Why the run ends here; None where it goes on."""
    if failure.kind in UNTROUBLED:
        return None
    if failure.final:
        return failure.words
    if failure.kind == "storage":
        away = now - min(each.at for each in stuck if each.kind == "storage")
        return f"{failure.words}; storage was waited for {away:.0f} s" if away > limits.storage_s else None
    step = _newest_step((*earlier, failure))
    charged = [each for each in earlier if each.kind not in NEVER_CHARGED]
    same = weight([each for each in charged if each.kind == failure.kind], step, now, limits)
    count = weight(charged, step, now, limits)
    tries = sum(each.kind not in NEVER_CHARGED and each.step is not None for each in stuck)
    told = f"no progress since step {step}: {failure.words} ({tries} tries)" if tries > 1 else failure.words
    advice = "lower training.global_batch, or give the ranks more memory"
    rules = (
        (failure.kind == "error" and same >= limits.user_errors, told),
        (failure.kind == "out_of_memory" and same >= limits.out_of_memory, f"{told}; {advice}"),
        (tries >= limits.no_progress and failure.step is not None, told),
        (
            count >= limits.max_failures,
            f"{told}; it is failure {count + 1} of {limits.max_failures} allowed by training.max_failures",
        ),
    )
    return next((text for broken, text in rules if broken), None)


def _newest_step(history: Sequence[Failure]) -> int | None:
    return max((each.step for each in history if each.step is not None), default=None)


def _stuck(history: Sequence[Failure]) -> list[Failure]:
    """The failures since the newest progress, the last one among them: from the first at the newest step on."""
    newest = _newest_step(history)
    first = next(index for index, each in enumerate(history) if each.step == newest)
    since = [each for each in history[first:-1] if each.kind not in UNTROUBLED]
    return [*since, history[-1]]
