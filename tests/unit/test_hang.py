"""Who is to blame when a worker group stands still, and when nobody is yet. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lepton_ray.training.beat_reading import Sighting, StepTime
from lepton_ray.training.hang import PATIENCE, Limits, Observation, Reading, Verdict, decide

LIMITS = Limits(floor_s=10.0, factor=10.0)


def waits(rank: int, still_s: float = 12.0, **changes: Any) -> Reading:
    """A rank that waits in the gradient exchange of step 41."""
    changes.setdefault("silent_s", changes.get("stopped_s", 0.0))
    return replace(Reading(rank, step=40, phase="exchange", place=647, still_s=still_s), **changes)


def hangs(rank: int, still_s: float = 12.0, **changes: Any) -> Reading:
    """A rank that stands still in its forward of step 41."""
    changes.setdefault("silent_s", changes.get("stopped_s", 0.0))
    return replace(Reading(rank, step=40, phase="forward", place=645, still_s=still_s), **changes)


def blamed(*readings: Reading, world_size: int | None = None, limits: Limits = LIMITS) -> tuple[str, tuple[int, ...]]:
    """Evidence and ranks of the verdict; an empty evidence where there is none."""
    found = decide(readings, len(readings) if world_size is None else world_size, limits)
    return ("", ()) if found is None else (found.evidence, found.ranks)


NOBODY = ("", ())
CALM = {
    "all go on": [waits(0, 0.2), hangs(1, 0.2)],
    "one step is long, but not too long": [waits(0, 29.0), hangs(1, 29.5)],
    "one of them moved a moment ago": [waits(0, 60.0), hangs(1, 1.0)],
    "steps take two seconds": [waits(0, 59.0, median_s=2.0), hangs(1, 59.0, median_s=2.0)],
    "a step of 20 s was seen before": [waits(0, 39.0), hangs(1, 39.0, longest_s=20.0)],
    "the rank that is behind computes": [waits(0, 59.0), hangs(1, 59.0, busy=0.9)],
    "a slow checkpoint": [waits(0, 300.0), hangs(1, 300.0, phase="checkpoint", place=643)],
    "a slow checkpoint of all": [hangs(r, 600.0, phase="checkpoint", place=643) for r in (0, 1)],
    "a slow evaluation": [waits(0, 3000.0), hangs(1, 3000.0, phase="validation", place=643)],
    "slow data": [waits(0, 200.0), hangs(1, 200.0, phase="data_wait", place=644)],
    "slow data for all": [hangs(r, 250.0, phase="data_wait", place=644) for r in (0, 1)],
    "the first step compiles": [waits(0, 500.0, steps=0), hangs(1, 500.0, steps=0)],
    "rows are loaded": [hangs(r, 1800.0, phase="loading", place=1, steps=0) for r in (0, 1)],
    "an interpreter is busy for a minute while loading": [
        waits(0, 60.0, phase="loading", place=1, steps=0),
        hangs(1, 60.0, phase="loading", place=1, steps=0, silent_s=60.0),
    ],
    "an interpreter is silent beside another rank's checkpoint": [
        hangs(0, 60.0, phase="checkpoint", place=643), hangs(1, 60.0, silent_s=60.0),
    ],
    "a debugger holds a rank for a second": [waits(0, 60.0, phase="validation"), hangs(1, 60.0, stopped_s=1.0)],
    "a rank is slowed down by stopping it again and again": [
        waits(0), hangs(1, stopped_s=60.0, silent_s=0.2), waits(2, 0.1, stopped_s=60.0),
    ],
    "a rank was killed and is being replaced": [waits(0, 40.0), hangs(1, 40.0, gone_s=40.0, silent_s=40.0)],
    "all ranks were killed and wait for room": [hangs(r, 9999.0, gone_s=9999.0) for r in (0, 1)],
}  # fmt: skip


@pytest.mark.parametrize("readings", CALM.values(), ids=CALM.keys())
def test_nobody_is_blamed(readings: list[Reading]) -> None:
    assert blamed(*readings) == NOBODY


HUNG = {
    "one stops": ([waits(0), hangs(1, stopped_s=11.0, silent_s=11.0)], "stopped", (1,)),
    "rank 0 stops": ([hangs(0, stopped_s=11.0), waits(1), waits(2)], "stopped", (0,)),
    "two stop": ([hangs(0, stopped_s=11.0), waits(1), hangs(2, stopped_s=10.5), waits(3)], "stopped", (0, 2)),
    "one stops in its evaluation": ([
        waits(0, 11.0, phase="validation"), hangs(1, 11.0, phase="validation", stopped_s=11.0)], "stopped", (1,)),
    "one stops while loading": ([hangs(r, 11.0, phase="loading", steps=0, stopped_s=11.0 * r) for r in (0, 1)],
        "stopped", (1,)),
    "one stops where the others wait": ([waits(0), waits(1, stopped_s=12.0)], "stopped", (1,)),
    "one keeps the interpreter's lock": ([waits(0), hangs(1, silent_s=12.0)], "interpreter", (1,)),
    "one keeps it and computes": ([waits(0), hangs(1, silent_s=12.0, busy=1.0)], "interpreter", (1,)),
    "one is frozen where the others wait": ([waits(0), waits(1, silent_s=12.0)], "interpreter", (1,)),
    "one keeps it for long while loading": ([
        waits(0, 130.0, phase="loading", steps=0), hangs(1, 130.0, phase="loading", steps=0, silent_s=130.0),
    ], "interpreter", (1,)),
    "one is in an earlier phase": ([waits(0, 31.0), hangs(1, 31.0)], "behind", (1,)),
    "one is a step behind": ([waits(0, 31.0), waits(1, 31.0, step=39, place=631)], "behind", (1,)),
    "two are behind": ([hangs(0, 31.0), waits(1, 31.0), hangs(2, 31.0), waits(3, 31.0)], "behind", (0, 2)),
    "one is behind and computes for long": ([waits(0, 61.0, busy=1.0), hangs(1, 61.0, busy=1.0)], "behind", (1,)),
    "data never come": ([waits(0, 310.0), hangs(1, 310.0, phase="data_wait", place=644)], "behind", (1,)),
    "a checkpoint never ends": ([waits(0, 901.0), hangs(1, 901.0, phase="checkpoint", place=643)], "behind", (1,)),
    "all wait for one another": ([waits(0, 31.0), waits(1, 31.0), waits(2, 31.0)], "same place", ()),
    "nobody notices that one is gone": ([waits(0, 301.0), hangs(1, 301.0, gone_s=301.0)], "gone", (1,)),
}  # fmt: skip


@pytest.mark.parametrize(("readings", "evidence", "ranks"), HUNG.values(), ids=HUNG.keys())
def test_the_rank_that_holds_the_others_up_is_blamed(
    readings: list[Reading], evidence: str, ranks: tuple[int, ...]
) -> None:
    assert blamed(*readings) == (evidence, ranks)


def test_the_words_name_rank_step_and_what_it_did() -> None:
    found = decide([waits(0, 31.0), hangs(1, 31.0)], 2, LIMITS)
    assert found == Verdict(
        (1,), "behind",
        "rank 1 is standing still for 31.0 s after step 40 in forward; rank 0 waits after step 40 in the gradient "
        "exchange", 30.0,
    )  # fmt: skip


def test_a_group_that_is_not_seen_whole_is_judged_only_by_what_is_wrong_by_itself() -> None:
    assert blamed(waits(0, 100.0), hangs(1, 100.0), world_size=3) == NOBODY
    assert blamed(waits(0), hangs(1, stopped_s=11.0), world_size=3) == ("stopped", (1,))
    assert decide([], 2, LIMITS) is None


@pytest.mark.parametrize("phase", PATIENCE.keys() - {"first step"})
def test_what_is_slow_by_its_nature_is_given_more_time_but_not_all(phase: str) -> None:
    """With a floor of 1 s: as many seconds as the table says."""
    limits = Limits(floor_s=1.0)
    here = [hangs(rank, phase=phase, place=1) for rank in (0, 1)]
    within = [replace(each, still_s=PATIENCE[phase] - 0.1) for each in here]
    beyond = [replace(each, still_s=PATIENCE[phase] + 0.1) for each in here]
    assert blamed(*within, limits=limits) == NOBODY
    assert blamed(*beyond, limits=limits) == ("same place", ())


# --- how long a rank has been where it is


def sighting(at: float, rank: int = 0, **changes: Any) -> Sighting:
    """A rank that does step 5 since second 100, and whose interpreter runs."""
    made = Sighting(
        rank=rank, world_size=2, generation=1, pid=10 + rank, ticks=7, host="node", stacks="", step=5, phase="forward",
        place=85, since=100.0, pulse=int(4 * at), noted=3, longest_s=0.3,
        times=(StepTime(3, 0.1, 0.05), StepTime(4, 0.3, 0.05), StepTime(5, 0.1, 0.05)), state="S", cpu_s=0.0, at=at,
    )  # fmt: skip
    return replace(made, **changes)


def watched(*sightings: Sighting) -> Reading:
    """What is read of a rank after it was seen so."""
    observation = Observation()
    return [observation.see([each])[0] for each in sightings][-1]


def test_spans_count_from_when_the_rank_was_first_seen_there() -> None:
    """What was before the watcher looked does not count, so that a driver that was stopped blames nobody."""
    seen = [sighting(at) for at in (150.0, 152.0, 154.0)]
    found = watched(*seen)
    assert (found.still_s, found.silent_s, found.stopped_s) == (4.0, 0.0, 0.0)
    assert (found.median_s, found.longest_s, found.steps) == (0.1, 0.3, 3)


def test_each_kind_of_standing_still_has_a_clock_of_its_own() -> None:
    found = watched(
        sighting(150.0, pulse=9), sighting(152.0, pulse=9, state="T"), sighting(154.0, pulse=9, state="T"),
        sighting(156.0, pulse=9, state="t", since=155.0),
    )  # fmt: skip
    assert (found.still_s, found.silent_s, found.stopped_s) == (0.0, 6.0, 4.0)
    assert watched(sighting(150.0, state="T"), sighting(151.0)).stopped_s == 0.0
    assert watched(sighting(150.0, state=""), sighting(153.0, state="Z")).gone_s == 3.0


def test_a_rank_that_uses_its_processor_is_busy() -> None:
    assert watched(sighting(150.0, cpu_s=5.0), sighting(154.0, cpu_s=8.0)).busy == pytest.approx(0.75)


def test_a_watcher_that_was_stopped_itself_begins_anew() -> None:
    """All ranks look as if they had stood still for a minute; it was the watcher."""
    assert watched(sighting(150.0), sighting(154.0), sighting(214.0), sighting(216.0)).still_s == 2.0


def test_a_new_process_is_not_taken_for_the_one_before() -> None:
    assert watched(sighting(150.0), sighting(154.0, ticks=8)).still_s == 0.0
