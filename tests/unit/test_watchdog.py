"""The watchdog on processes that have the beat of a rank and nothing else of it: what it does, and to whom."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from beating_ranks import LIMIT_S, rank_that
from digits_slice import small_settings

from lepton_ray.cluster import Cluster
from lepton_ray.errors import UnavailableError
from lepton_ray.monitoring.incidents import Incident, incidents
from lepton_ray.storage import Store
from lepton_ray.training import watchdog
from lepton_ray.training.beat import beats_folder
from lepton_ray.training.plan import RankPlan
from lepton_ray.training.watchdog import Watchdog, watching

RUN = "watched"


def plan_of(store: Store, *, floor_s: float = 2.0, enabled: bool = True) -> RankPlan:
    settings = small_settings(RUN, watchdog={"floor_s": floor_s, "enabled": enabled})
    return RankPlan(settings, store.uri, 1, {}, "", 1.0)


@pytest.fixture
def folder(file_store: Store) -> Path:
    """Where the ranks of the run have their beats."""
    return beats_folder(file_store.uri, RUN, 1.0)


@pytest.fixture
def watched(file_store: Store) -> Iterator[Watchdog]:
    """A watchdog at work, with a floor of 2 s."""
    made = Watchdog(plan_of(file_store), file_store, local=True)
    made.start()
    yield made
    made.stop()


def told(store: Store, count: int = 1) -> list[Incident]:
    """The incidents of the run, once there are as many."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        found = incidents(store, RUN)
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {count} incidents within {LIMIT_S} s")


def ends(process: subprocess.Popen[str]) -> int:
    return process.wait(LIMIT_S)


@pytest.mark.usefixtures("watched")
def test_a_stopped_rank_is_told_with_evidence_and_ended_and_nobody_else(folder: Path, file_store: Store) -> None:
    with rank_that("waits", folder, rank=0) as other, rank_that("waits", folder, rank=1) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        assert ends(stopped) == -signal.SIGKILL
        [found] = told(file_store)
        assert (found.kind, found.rank, found.step, found.attempt, found.generation) == ("hang", 1, 2, 1, 1)
        assert found.evidence["found"] == "stopped"
        assert list(found.evidence["stacks"]) == ["0"]
        assert "in waits" in found.evidence["stacks"]["0"]
        assert [each["rank"] for each in found.evidence["readings"]] == [0, 1]
        assert other.poll() is None


@pytest.mark.usefixtures("watched")
def test_a_rank_that_keeps_the_interpreters_lock_is_told_and_ended(folder: Path, file_store: Store) -> None:
    with rank_that("waits", folder, rank=0) as other, rank_that("keeps_the_lock", folder, rank=1) as hung:
        assert ends(hung) == -signal.SIGKILL
        [found] = told(file_store)
        assert (found.rank, found.evidence["found"]) == (1, "interpreter")
        assert "keeps_the_lock" in found.evidence["stacks"]["1"]
        assert other.poll() is None


@pytest.mark.usefixtures("watched")
def test_ranks_that_stay_although_one_was_replaced_are_ended_too(folder: Path, file_store: Store) -> None:
    """After three times the limit: whoever is left of the group holds up the next one."""
    with rank_that("waits", folder, rank=0) as left, rank_that("waits", folder, rank=1) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        assert ends(stopped) == -signal.SIGKILL
        assert ends(left) == -signal.SIGKILL
        assert [each.evidence["found"] for each in told(file_store, 2)] == ["stopped", "not replaced"]


@pytest.mark.usefixtures("watched")
def test_a_new_group_is_watched_as_the_one_before_was(folder: Path, file_store: Store) -> None:
    with rank_that("waits", folder, rank=0), rank_that("waits", folder, rank=1) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        assert ends(stopped) == -signal.SIGKILL
    with rank_that("waits", folder, 2, rank=0) as again, rank_that("waits", folder, 2, rank=1):
        again.send_signal(signal.SIGSTOP)
        assert ends(again) == -signal.SIGKILL
        assert [(each.generation, each.rank) for each in told(file_store, 2)] == [(1, 1), (2, 0)]


def test_ranks_of_another_attempt_are_left_alone(folder: Path, file_store: Store) -> None:
    """Those of a driver that took the run over; the stopped one is seen only once its own attempt is watched."""
    other = Watchdog(RankPlan(plan_of(file_store).settings, file_store.uri, 2, {}, "", 1.0), file_store, local=True)
    with rank_that("waits", folder, rank=0), rank_that("waits", folder, rank=1) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        assert other._sightings() == []
        mine = Watchdog(plan_of(file_store), file_store, local=True)
        assert [each.rank for _, each in mine._sightings()] == [0, 1]


def test_storage_that_is_away_puts_a_kill_off_for_a_moment_only(
    folder: Path, file_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(key: str, data: bytes) -> str:
        time.sleep(LIMIT_S)
        raise UnavailableError("away")

    monkeypatch.setattr(file_store, "put_if_absent", away)
    monkeypatch.setattr(watchdog, "TELL_S", 0.2)
    made = Watchdog(plan_of(file_store), file_store, local=True)
    made.start()
    try:
        with rank_that("waits", folder, rank=0), rank_that("waits", folder, rank=1) as stopped:
            stopped.send_signal(signal.SIGSTOP)
            assert stopped.wait(LIMIT_S / 2) == -signal.SIGKILL
    finally:
        made.stop()


def test_a_fault_of_the_watchdog_itself_does_not_end_it(
    folder: Path, file_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Watchdog(plan_of(file_store), file_store, local=True)
    look, faults = made._look, [ValueError("one fault")]

    def fails_once() -> None:
        if faults:
            raise faults.pop()
        look()

    monkeypatch.setattr(made, "_look", fails_once)
    made.start()
    try:
        with rank_that("waits", folder, rank=0), rank_that("waits", folder, rank=1) as stopped:
            stopped.send_signal(signal.SIGSTOP)
            assert ends(stopped) == -signal.SIGKILL
            assert faults == []
    finally:
        made.stop()


def test_a_run_without_a_watchdog_starts_none(file_store: Store) -> None:
    for enabled in (True, False):
        with watching(plan_of(file_store, enabled=enabled), file_store, Cluster(local=True)):
            assert any(thread.name == "watchdog" for thread in threading.enumerate()) is enabled
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())
