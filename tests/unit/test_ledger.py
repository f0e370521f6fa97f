"""The goodput ledger: phases add up, and each worker-second lands in exactly one bucket."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folder import Clock

from lepton_ray.monitoring.goodput import BUCKETS, SILENCE_S, goodput
from lepton_ray.monitoring.ledger import COMPUTE_PHASES, PHASES, PhaseClock, RankEntry, RankLedger

START = 1_700_000_000.0


def entry(generation: int, rank: int, start: float, end: float, **changes: Any) -> dict[str, Any]:
    """An entry that computed from START + start to START + end."""
    made = {
        "run": "digits",
        "attempt": 1,
        "generation": generation,
        "rank": rank,
        "world_size": 2,
        "started_at": START + start,
        "updated_at": START + end,
        "phases": {"forward": end - start},
        "first_step": 1,
        "last_step": 10,
        "replayed_steps": 0,
        "finished": False,
    }
    return {**made, **changes}


def attempt(number: int, start: float, end: float | None) -> dict[str, Any]:
    ended_at = None if end is None else START + end
    return {"attempt": number, "started_at": START + start, "ended_at": ended_at}


def record(end: float | None, *attempts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A record of two workers that ended at START + end, or still runs."""
    made = {
        "run": "digits",
        "state": "running" if end is None else "finished",
        "created_at": START,
        "updated_at": START,
        "finished_at": None if end is None else START + end,
        "workers": 2,
        "attempts": list(attempts) or [attempt(1, 1.0, end)],
    }
    return {**made, **changes}


def spent(found: Any) -> dict[str, float]:
    """The buckets that are not empty, rounded."""
    return {name: round(value, 6) for name, value in found.buckets.items() if value > 1e-9}


def test_phases_add_up_to_elapsed_time():
    clock = Clock(100.0)
    phases = PhaseClock("starting", clock)
    for phase, passed in (("loading", 2.0), ("forward", 0.5), ("backward", 0.25), ("forward", 1.0)):
        clock.pass_time(passed)
        phases.switch(phase)
    clock.pass_time(4.0)
    totals = phases.totals()
    assert {name: value for name, value in totals.items() if value} == {
        "starting": 2.0,
        "loading": 0.5,
        "forward": 0.25 + 4.0,
        "backward": 1.0,
    }
    assert sum(totals.values()) == clock.at - 100.0


def test_undeclared_phase_changes_nothing():
    phases = PhaseClock("starting")
    with pytest.raises(KeyError):
        phases.switch("thinking")
    assert phases.phase == "starting"
    with pytest.raises(KeyError):
        PhaseClock("thinking")


def test_totals_close_while_another_thread_switches():
    """What a writer thread reads never counts the phase that is being closed twice or not at all."""
    phases = PhaseClock("starting")
    begun = time.perf_counter()
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            for phase in COMPUTE_PHASES:
                phases.switch(phase)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        for _ in range(2000):
            before = time.perf_counter() - begun
            total = sum(phases.totals().values())
            after = time.perf_counter() - begun
            assert before - 0.01 <= total <= after + 0.001
    finally:
        stop.set()
        thread.join()


def test_half_done_switch_is_read_again():
    """A reader that comes between the two halves of a switch waits for the second one."""
    clock = Clock(0.0)
    phases = PhaseClock("forward", clock)
    clock.pass_time(5.0)
    phases._totals["forward"] += 5.0  # the first half

    def second_half() -> float:
        phases._phase, phases._since = "backward", 5.0
        phases._now = clock
        return clock()

    phases._now = second_half
    assert {name: value for name, value in phases.totals().items() if value} == {"forward": 5.0}


def test_entry_closes_when_wall_clock_is_set():
    """The wall clock jumping by a day does not tear the phases from the entry's span."""
    monotonic, wall = Clock(5.0), Clock(START)
    ledger = RankLedger("digits", 1, 2, 1, 4, now=monotonic, wall=wall)
    monotonic.pass_time(3.0)
    wall.pass_time(86_400.0)
    ledger.switch("forward")
    ledger.step_done(41, replayed=True)
    ledger.step_done(42)
    monotonic.pass_time(1.0)
    ledger.finish()
    made = ledger.entry()
    assert made["updated_at"] == START + 4.0
    assert (made["first_step"], made["last_step"], made["replayed_steps"]) == (41, 42, 1)
    assert made["finished"] is True
    assert ledger.key == "runs/digits/ledger/g2-rank1.json"
    assert RankEntry.parse(made).phases == made["phases"]


def test_undisturbed_run_fills_expected_buckets():
    found = goodput(
        record(20.0),
        [
            entry(1, rank, 5.0, 18.0, phases={"loading": 2.0, "data_wait": 1.0, "backward": 10.0}, finished=True)
            for rank in (0, 1)
        ],
    )
    assert spent(found) == {"starting": 10.0, "loading": 4.0, "data_wait": 2.0, "compute": 20.0, "stopping": 4.0}
    assert (found.total, found.wall, found.ratio) == (40.0, 20.0, 0.5)


def test_gap_between_generations_is_restarting():
    entries = [entry(1, rank, 5.0, 10.0) for rank in (0, 1)]
    entries += [entry(2, rank, 14.0, 20.0, phases={"replayed": 2.0, "forward": 4.0}, finished=True) for rank in (0, 1)]
    entries[2]["replayed_steps"] = 3
    found = goodput(record(20.0), entries)
    assert spent(found) == {"starting": 10.0, "compute": 18.0, "restarting": 8.0, "replayed": 4.0}
    assert (found.generations, found.replayed_steps) == (2, 3)


def test_a_smaller_generation_has_no_lane_for_the_ranks_that_it_lacks():
    """An elastic run: two ranks, then one, then two; the second one is not there from 10 to 22."""
    entries = [entry(1, rank, 5.0, 10.0) for rank in (0, 1)]
    entries.append(entry(2, 0, 14.0, 22.0, world_size=1))
    entries += [entry(3, rank, 25.0, 30.0, finished=True) for rank in (0, 1)]
    found = goodput(record(30.0), entries)
    assert found.total == 60.0 - 12.0
    assert spent(found) == {"starting": 10.0, "compute": 28.0, "restarting": 10.0}
    assert found.elastic


def test_a_run_that_ends_smaller():
    """The rank that was lost for good counts until then."""
    entries = [entry(1, rank, 5.0, 10.0) for rank in (0, 1)]
    entries.append(entry(2, 0, 14.0, 30.0, world_size=1, finished=True))
    found = goodput(record(31.0), entries)
    assert found.total == 62.0 - 21.0
    assert spent(found) == {"starting": 10.0, "compute": 26.0, "restarting": 4.0, "stopping": 1.0}


def test_pause_between_attempts_is_left_out():
    """An hour in which no driver held the run is no wall time; the second start is a restart."""
    entries = [entry(1, rank, 5.0, 10.0) for rank in (0, 1)]
    entries += [entry(2, rank, 3612.0, 3620.0, attempt=2, finished=True) for rank in (0, 1)]
    found = goodput(record(3620.0, attempt(1, 1.0, 11.0), attempt(2, 3610.0, 3620.0)), entries)
    assert (found.wall, found.total) == (21.0, 42.0)
    assert spent(found) == {"starting": 10.0, "compute": 26.0, "stopping": 2.0, "restarting": 4.0}


def test_killed_driver_ends_at_last_entry():
    """A driver that was killed could not write its end: the newest entry of its ranks stands for it."""
    entries = [entry(1, 0, 5.0, 10.0), entry(1, 1, 5.0, 9.0), entry(2, 0, 52.0, 60.0, attempt=2)]
    entries.append(entry(2, 1, 52.0, 60.0, attempt=2))
    found = goodput(record(60.0, attempt(1, 1.0, None), attempt(2, 50.0, 60.0)), entries)
    assert found.wall == 20.0
    assert spent(found) == {"starting": 10.0, "compute": 25.0, "stopping": 1.0, "restarting": 4.0}


def test_running_run_reaches_to_now():
    entries = [entry(1, rank, 5.0, 10.0) for rank in (0, 1)]
    found = goodput(record(None), entries, now=START + 12.0)
    assert spent(found) == {"starting": 10.0, "compute": 10.0, "unreported": 4.0}


def test_silent_driver_counts_as_gone():
    entries = [entry(1, rank, 5.0, 10.0) for rank in (0, 1)]
    assert goodput(record(None), entries, now=START + 10.0 + SILENCE_S + 1.0).wall == 10.0
    assert goodput(record(None, state="interrupted"), entries, now=START + 15.0).wall == 10.0
    alive = goodput(record(None), entries, now=START + 500.0, alive_at=START + 495.0)
    assert alive.wall == 500.0


def test_workers_may_change_between_attempts():
    entries = [entry(1, rank, 5.0, 10.0) for rank in (0, 1)]
    entries += [entry(2, rank, 22.0, 30.0, attempt=2, world_size=4) for rank in range(4)]
    found = goodput(record(30.0, attempt(1, 0.0, 10.0), attempt(2, 20.0, 30.0), workers=4), entries)
    assert found.total == 10.0 * 2 + 10.0 * 4
    assert sum(found.buckets.values()) == pytest.approx(found.total)


def test_damaged_entries_are_counted_not_used():
    bad = [
        {},
        entry(1, 0, 5.0, 10.0, phases={"thinking": 1.0}),
        entry(1, 0, 5.0, 10.0, phases={"forward": float("nan")}),
        entry(1, 0, 5.0, 10.0, started_at=-1.0),
        entry(1, 2, 5.0, 10.0),
        entry(1, 0, 5.0, 10.0, attempt=True),
        entry(1, 0, 5.0, 10.0, attempt=9),
    ]
    found = goodput(record(10.0), bad)
    assert found.skipped == len(bad)
    assert spent(found) == {"starting": 20.0}


@pytest.mark.parametrize(
    "changes", [{"created_at": None}, {"created_at": "soon"}, {"workers": 0}, {"attempts": 3}, {"attempts": [{}]}]
)
def test_record_without_times_is_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        goodput(record(10.0, **changes), [])


def test_rows_name_every_bucket_once():
    rows = goodput(record(10.0), [entry(1, rank, 2.0, 8.0) for rank in (0, 1)]).to_rows()
    assert [name for name, *_ in rows] == list(BUCKETS)
    assert sum(share for _, _, share, _ in rows) == pytest.approx(1.0)


SECONDS = st.floats(0.0, 5_000.0)


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]], float | None]:
    """Any record with any entries: overlapping, out of order, longer or shorter than their phases say."""
    attempts = []
    for number in range(1, draw(st.integers(1, 3)) + 1):
        begin = draw(SECONDS)
        attempts.append(attempt(number, begin, draw(st.none() | st.floats(begin, begin + 1_000.0))))
    entries = []
    for _ in range(draw(st.integers(0, 8))):
        size = draw(st.integers(1, 4))
        start = draw(SECONDS)
        phases = draw(st.dictionaries(st.sampled_from(PHASES), st.floats(0.0, 1_000.0)))
        entries.append(
            entry(
                draw(st.integers(1, 4)),
                draw(st.integers(0, size - 1)),
                start,
                draw(SECONDS),
                attempt=draw(st.integers(1, 3)),
                world_size=size,
                phases=phases,
                finished=draw(st.booleans()),
            )
        )
    end = draw(st.none() | SECONDS)
    now = draw(st.none() | st.floats(START, START + 10_000.0))
    return record(end, *attempts, workers=draw(st.integers(1, 4))), entries, now


@given(runs())
def test_buckets_always_add_up(case):
    """Whatever the clocks say, each worker-second is in exactly one bucket."""
    made, entries, now = case
    found = goodput(made, entries, now)
    assert all(value >= 0.0 for value in found.buckets.values())
    assert sum(found.buckets.values()) == pytest.approx(found.total, rel=1e-6, abs=1e-6)
    assert 0.0 <= found.ratio <= 1.0 + 1e-9
