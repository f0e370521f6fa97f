"""What follows from a failure, as a table of cases and as rules that hold for any history."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.training.failure_policy import NEVER_CHARGED, Decision, Failure, Limits, decide, longest_pause, weight

MANY = Limits(max_failures=100, no_progress=100, user_errors=100, out_of_memory=100)
WORDS = "rank 1 failed: boom"


def failures(kind: str, *steps: int | None, every_s: float = 10.0) -> list[Failure]:
    """One failure of a kind at each of these steps, ten seconds apart."""
    return [Failure(kind, 1, step, WORDS, number * every_s) for number, step in enumerate(steps)]  # type: ignore[arg-type]


def decided(history: list[Failure], limits: Limits | None = None, **options: float | None) -> Decision:
    return decide(history, limits or Limits(), history[-1].at, **{"jitter": 0.5, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "steps", "action"),
    [
        ("worker_lost", [50], "resume"),
        ("worker_lost", [50, 50], "resume"),
        ("worker_lost", [50, 50, 50], "give_up"),
        ("worker_lost", [50, 60, 70], "resume"),
        ("worker_lost", [50, 60, 70, 80], "give_up"),  # the fourth of three
        ("worker_lost", [50, 1050, 2050, 3050, 4050, 5050, 6050, 7050], "resume"),  # forgotten with progress
        ("worker_lost", [50, 40, 50], "give_up"),  # what was done before, done again, is no progress
        ("worker_lost", [None, None, None], "resume"),  # storage could not tell: no reason to end it
        ("worker_lost", [None, None, None, None], "give_up"),
        ("hang", [50, 50, 50], "give_up"),
        ("divergence", [50], "resume"),
        ("error", [50], "retry"),
        ("error", [50, 50], "retry"),
        ("error", [50, 50, 50], "give_up"),
        ("error", [50, 51, 52], "give_up"),
        ("error", [50, 5000], "retry"),
        ("out_of_memory", [0], "retry"),
        ("out_of_memory", [0, 0], "give_up"),
        ("preempted", [50] * 20, "resume"),
        ("waiting", [0] * 20, "resume"),
        ("storage", [50] * 20, "resume"),
    ],
)
def test_what_follows_from_failures_of_one_kind(kind: str, steps: list[int | None], action: str) -> None:
    """One failure after the other at these steps; what is decided about the last."""
    assert decided(failures(kind, *steps)).action == action


def test_a_single_lost_worker_waits_for_nothing() -> None:
    """The first try comes at once, and so does each that follows progress; the second at the same step does not."""
    assert decided(failures("worker_lost", 50)).after_s == 0.0
    assert decided(failures("worker_lost", 50, 51)).after_s == 0.0
    assert decided(failures("worker_lost", 51, 51)).after_s == 0.5
    assert decided(failures("worker_lost", None, 51)).after_s == 0.0
    assert decided(failures("worker_lost", 51, None)).after_s == 0.5
    assert decided(failures("worker_lost", *[51] * 4), MANY).after_s == 2.0
    assert decided(failures("worker_lost", *[51] * 30), MANY).after_s == 30.0


def test_same_step_three_times_is_told_with_the_step_and_the_cause() -> None:
    """The sentence that a user is left with."""
    assert decided(failures("worker_lost", 57, 57, 57)).why == f"no progress since step 57: {WORDS} (3 tries)"
    assert decided(failures("error", 57, 57, 57)).why == f"no progress since step 57: {WORDS} (3 tries)"
    assert decided(failures("error", 57, 58, 59)).why == WORDS
    assert decided(failures("error", 57), Limits(max_failures=0)).why.startswith(f"{WORDS}; ")


def test_out_of_memory_ends_with_advice() -> None:
    """It is tried once more, and then told what helps."""
    why = decided(failures("out_of_memory", 0, 0)).why
    assert "lower training.global_batch, or give the ranks more memory" in why


def test_what_only_repeats_itself_is_not_tried_again() -> None:
    """A wrong setting, or a run that another driver holds."""
    only = dataclasses.replace(failures("error", 3)[0], final=True)
    assert decided([only]).action == "give_up"
    assert decided([only]).why == WORDS


def test_preemptions_cost_nothing_and_forgive_nothing() -> None:
    """A hundred of them are charged to nobody, and two failures around them are still two."""
    history = [*failures("worker_lost", 50, 50), *failures("preempted", *[50] * 100), *failures("worker_lost", 50)]
    assert decided(failures("preempted", 5)) == Decision("resume", 0.0, WORDS, charged=False)
    assert decided(history[:-1]).action == "resume"
    assert decided(history).action == "give_up"


def test_storage_is_waited_for_an_hour() -> None:
    """With pauses of a minute at most; progress begins the hour anew."""
    assert decided(failures("storage", *[50] * 60, every_s=60)).action == "resume"
    assert decided(failures("storage", *[50] * 62, every_s=60)).action == "give_up"
    assert "storage was waited for 3660 s" in decided(failures("storage", *[50] * 62, every_s=60)).why
    assert decided([*failures("storage", *[50] * 61, every_s=60), *failures("storage", 51)]).action == "resume"


def test_a_run_shrinks_to_what_fits_where_it_may() -> None:
    """Only with a minimum, and not below it."""
    lost = failures("worker_lost", 50)
    shrunk = decided(lost, workers=8, fit=5, minimum=1)
    assert (shrunk.action, shrunk.workers, shrunk.charged) == ("shrink", 5, True)
    assert decided(lost, workers=8, fit=5).action == "resume"
    assert decided(lost, workers=8, fit=1, minimum=2).action == "resume"
    assert decided(lost, workers=8, fit=8, minimum=2).action == "resume"
    assert decided(failures("preempted", 5), workers=8, fit=7, minimum=2).action == "shrink"


def test_failures_are_forgotten_by_steps_or_hours_of_progress() -> None:
    """Half after 1,000 steps or an hour in which there was progress; without progress never."""
    one = failures("worker_lost", 50)
    limits = Limits()
    assert weight(one, 1050, 10.0, limits) == 1
    assert weight(one, 1051, 10.0, limits) == 0
    assert weight(one, 51, 3601.0, limits) == 0
    assert weight(one, 50, 1e9, limits) == 1
    assert weight(one, None, 1e9, limits) == 1
    assert weight(failures("worker_lost", *[50] * 4), 1050, 10.0, limits) == 2


KINDS = ("worker_lost", "error", "out_of_memory", "hang", "divergence", "preempted", "storage", "waiting")
CHARGED = [kind for kind in KINDS if kind not in NEVER_CHARGED]
limits_of_any_kind = st.builds(
    Limits, max_failures=st.integers(0, 20), no_progress=st.integers(1, 10), user_errors=st.integers(0, 5),
    out_of_memory=st.integers(0, 5),
)  # fmt: skip
any_history = st.lists(
    st.builds(
        Failure, kind=st.sampled_from(KINDS), rank=st.integers(0, 7) | st.none(),
        step=st.integers(0, 10_000) | st.none(), words=st.just(WORDS), at=st.floats(0, 1e6), final=st.booleans(),
    ),
    min_size=1, max_size=30,
)  # fmt: skip


@given(st.lists(st.sampled_from(CHARGED), min_size=60, max_size=60), limits_of_any_kind, st.integers(0, 100))
def test_without_progress_every_run_ends(kinds: list[str], limits: Limits, step: int) -> None:
    """Whatever fails, in any order: never more tries than `max_failures` or `no_progress` allow."""
    history: list[Failure] = []
    for number, kind in enumerate(kinds):
        history.append(Failure(kind, 0, step, WORDS, float(number)))  # type: ignore[arg-type]
        if decided(history, limits).action == "give_up":
            break
    assert len(history) <= min(limits.max_failures + 1, limits.no_progress)


@given(st.integers(1, 200), limits_of_any_kind)
def test_with_enough_progress_no_run_ends(count: int, limits: Limits) -> None:
    """A worker lost every 2,000 steps is lost for ever, if at least one failure is allowed."""
    limits = dataclasses.replace(
        limits, max_failures=max(1, limits.max_failures), no_progress=max(2, limits.no_progress)
    )
    assert decided(failures("worker_lost", *range(0, 2000 * count, 2000)), limits).action == "resume"


@given(any_history, limits_of_any_kind, st.floats(0, 0.999999), st.floats(0, 1e6))
def test_decisions_keep_to_their_bounds(history: list[Failure], limits: Limits, jitter: float, now: float) -> None:
    """Any history at all gives a decision: a pause within its limit, a preemption never charged and never the end."""
    decision = decide(history, limits, now, jitter=jitter)
    assert 0.0 <= decision.after_s <= limits.longest_pause_s
    assert decision.charged == (history[-1].kind not in NEVER_CHARGED)
    if history[-1].kind in ("preempted", "waiting"):
        assert (decision.action, decision.after_s) == ("resume", 0.0)
    elif history[-1].final:
        assert decision.action == "give_up"


@given(st.integers(0, 2000), limits_of_any_kind)
def test_pauses_grow_up_to_a_bound(tries: int, limits: Limits) -> None:
    """Never shorter with one more try, never above the longest."""
    assert longest_pause(0, limits) == 0.0
    assert longest_pause(tries, limits) <= longest_pause(tries + 1, limits) <= limits.longest_pause_s


@given(st.lists(st.integers(0, 5000), max_size=20), st.integers(0, 10_000), st.integers(0, 10_000))
def test_progress_only_forgives(steps: list[int], one: int, more: int) -> None:
    """The further the run has come, the fewer failures count."""
    earlier = failures("worker_lost", *steps)
    first, second = sorted((one, more))
    assert weight(earlier, second, 1000.0, Limits()) <= weight(earlier, first, 1000.0, Limits()) <= len(earlier)
