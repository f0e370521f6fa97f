"""The beat of a rank, written in one process and read in another, whatever happens to the first."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from beating_ranks import LIMIT_S, rank_that, until

from lepton_ray.monitoring.ledger import PHASES, RankLedger
from lepton_ray.training.beat import MAGIC, RING, Beat, beat_name, started_ticks
from lepton_ray.training.beat_reading import Sighting, read_page, sight
from lepton_ray.training.node_watch import STACKS_BYTES, NodeWatch


def here(folder: Path, **changes: int) -> Beat:
    """A beat of this process."""
    about = {"attempt": 1, "generation": 1, "rank": 0, "world_size": 2, **changes}
    return Beat(folder, run="digits", **about)


class Watched:
    """A folder of beats as the watchdog of attempt 1 looks at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node = NodeWatch("file:///store", "digits", 1.0, 1)
        self.node._folder = folder

    def one(self) -> Sighting | None:
        return next(iter(self.node.sight()), None)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "beats")


def test_what_the_ledger_is_told_stands_on_the_page(tmp_path: Path) -> None:
    """Phase, steps and the times of the newest steps: own compute is without the wait for others."""
    clock = iter(range(10_000))
    beat = here(tmp_path, generation=3, rank=1)
    beat.waited = lambda: 0.5
    ledger = RankLedger("digits", 1, 3, 1, 2, now=lambda: float(next(clock)))
    ledger.observed_by(beat)
    ledger.resumed(7)
    [seen] = sight(tmp_path, 1)
    assert (seen.step, seen.phase, seen.noted) == (7, "loading", 0)
    for step in (8, 9, 10):
        for phase in ("data_wait", "forward", "backward", "optimizer", "logging"):
            ledger.switch(phase)
        ledger.step_done(step)
        ledger.switch("checkpoint")
    [seen] = sight(tmp_path, 1)
    beat.close()
    assert (seen.rank, seen.world_size, seen.generation, seen.pid) == (1, 2, 3, os.getpid())
    assert (seen.phase, seen.step, seen.state != "") == ("checkpoint", 10, True)
    assert seen.noted == 2, "the first step of a group sets things up"
    # a second each: logging before the last checkpoint, data_wait, forward, backward and optimizer
    assert [(each.step, each.whole_s, each.own_s) for each in seen.times] == [(9, 5.0, 2.5), (10, 5.0, 2.5)]
    assert seen.longest_s == 5.0
    assert sight(tmp_path, 1) == [], "a rank that left its loop is not watched"


def test_a_rank_goes_on_from_place_to_place(tmp_path: Path) -> None:
    """Within a step and over its end the number grows, so that the smallest is the one that is behind."""
    beat = here(tmp_path)
    places = []

    def note() -> None:
        seen = read_page(tmp_path / beat_name(1, 1, 0))
        assert seen is not None
        places.append(seen.place)

    note()
    for step in (1, 2):
        for phase in ("data_wait", "forward", "backward"):
            beat.switched(phase)
            note()
        beat.exchanging()
        note()
        beat.switched("optimizer")
        note()
        beat.switched("logging")
        note()
        beat.step_done(step, dict.fromkeys(PHASES, 0.0))
        note()
        beat.switched("checkpoint")
        note()
    beat.close()
    assert places == sorted(set(places))


def test_only_the_newest_group_of_the_attempt_is_seen(tmp_path: Path) -> None:
    beats = [here(tmp_path, generation=1), here(tmp_path, generation=2), here(tmp_path, generation=2, rank=1)]
    beats.append(here(tmp_path, attempt=2, generation=5))
    assert [(each.generation, each.rank) for each in sight(tmp_path, 1)] == [(2, 0), (2, 1)]
    for beat in beats:
        beat.close()


def test_a_reader_sees_whole_pages_while_they_are_written(watched: Watched) -> None:
    """Of a rank that does nothing but write: steps follow each other on each page that is said to be whole."""
    with rank_that("steps", watched.folder):
        until(watched.one, lambda seen: seen.noted > RING)
        for _ in range(300):
            seen = until(watched.one, lambda seen: seen.settled)
            steps = [each.step for each in seen.times]
            assert steps == list(range(seen.step - RING + 1, seen.step + 1))


def test_a_rank_that_keeps_the_interpreters_lock_is_seen_and_gives_its_stacks(watched: Watched) -> None:
    """Its thread cannot count any more, and python cannot run there; the stacks come from a signal handler."""
    with rank_that("keeps_the_lock", watched.folder):
        before = until(watched.one, lambda seen: seen.step == 2)
        last = [before.pulse, time.monotonic()]

        def stands(seen: Sighting) -> bool:
            if seen.pulse != last[0]:
                last[:] = [seen.pulse, time.monotonic()]
            return time.monotonic() - last[1] > 1.0

        seen = until(watched.one, stands)
        assert seen.state in ("S", "R")
        stacks = watched.node.stacks([seen], LIMIT_S)
        assert "keeps_the_lock" in stacks[0]
        assert len(stacks[0]) <= STACKS_BYTES


def test_a_rank_that_waits_has_a_pulse(watched: Watched) -> None:
    with rank_that("waits", watched.folder):
        first = until(watched.one, lambda seen: seen.step == 2)
        until(watched.one, lambda seen: seen.pulse >= first.pulse + 3)
        assert "waits" in watched.node.stacks([first], LIMIT_S)[0]


def test_a_stopped_rank_is_seen_gives_no_stacks_and_can_be_killed(watched: Watched) -> None:
    with rank_that("steps", watched.folder) as process:
        until(watched.one, lambda seen: seen.noted > 3)
        process.send_signal(signal.SIGSTOP)
        seen = until(watched.one, lambda seen: seen.state == "T")
        assert watched.node.stacks([seen], 1.0) == {}
        other = dataclasses.replace(seen, ticks=seen.ticks + 1)
        assert not watched.node.kill(other), "the same number, but another process"
        assert process.poll() is None
        assert watched.node.kill(seen)
        assert process.wait(LIMIT_S) == -signal.SIGKILL
        assert until(watched.one, lambda seen: seen.state == "").rank == 0
        assert not watched.node.kill(seen)


def test_a_process_that_does_not_catch_the_signal_is_not_sent_it() -> None:
    """SIGUSR1 ends a process that has no handler for it."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        seen = Sighting(
            0, 1, 1, process.pid, started_ticks(process.pid), "", "", 0, "", 0, 0.0, 0, 0, 0.0, (), "", 0, 0
        )
        assert NodeWatch("file:///store", "digits", 1.0, 1).stacks([seen], 0.5) == {}
        assert process.poll() is None
        process.communicate(b"\n", timeout=LIMIT_S)
    assert process.returncode == 0


def test_damaged_and_foreign_pages_are_left_out(tmp_path: Path) -> None:
    beat = here(tmp_path)
    page = tmp_path / beat_name(1, 1, 0)
    whole = page.read_bytes()
    header = json.loads(whole[len(MAGIC) : whole.index(b"\n", len(MAGIC))])
    foreign = MAGIC + json.dumps({**header, "namespace": "pid:[1]"}).encode() + b"\n"
    for rank, content in enumerate((whole[:100], b"x" * 4096, foreign.ljust(4096, b"\0"), MAGIC + b"7\n" * 2044), 1):
        (tmp_path / beat_name(1, 1, rank)).write_bytes(content)
    assert [each.rank for each in sight(tmp_path, 1)] == [0]
    assert sight(tmp_path / "none", 1) == []
    beat.close()


def test_a_node_without_shared_memory_has_no_beats_and_loses_nothing(tmp_path: Path) -> None:
    """The folder's place is taken by a file."""
    (tmp_path / "beats").write_text("")
    beat = here(tmp_path / "beats" / "here")
    beat.switched("forward")
    beat.step_done(1, dict.fromkeys(PHASES, 0.0))
    beat.close()


def test_nothing_is_left_after_an_attempt(watched: Watched) -> None:
    with rank_that("waits", watched.folder), rank_that("waits", watched.folder, generation=2):
        assert len(list(watched.folder.iterdir())) == 4
        watched.node.clear()
    assert not watched.folder.exists()
