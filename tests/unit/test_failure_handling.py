"""What Ray Train's controller is told after a failure, driven with its own errors and without Ray."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError  # noqa: TID251 - what is handed over
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy  # noqa: TID251
from ray.train.v2.api.exceptions import WorkerGroupError  # noqa: TID251

from lepton_ray.monitoring.incidents import Incident, incidents, report
from lepton_ray.storage import Store
from lepton_ray.training import failure_handling
from lepton_ray.training.failure_handling import RunFailurePolicy
from lepton_ray.training.failure_policy import Limits
from lepton_ray.training.preemption import Preempted

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


def lost(rank: int = 1) -> WorkerGroupError:
    """A rank whose process is gone, and another one that lost its connection."""
    death = RayActorError(
        "01", "The actor died unexpectedly.\n\tpid: 4242\n\tip: 10.0.0.7\nWorker exit type: SYSTEM_ERROR"
    )
    ranks = {rank: WorkerHealthCheckFailedError("", death), 1 - rank: RuntimeError("[gloo] Connection closed by peer")}
    return WorkerGroupError("...", ranks)


def at_step(store: Store, step: int, generation: int = 1) -> None:
    """The run is known to have done so many steps."""
    store.put(f"runs/digits/ledger/g{generation}-rank0.json", json.dumps({"last_step": step}).encode())


def policy(store: Store, **options: Any) -> RunFailurePolicy:
    made = RunFailurePolicy(store.uri, "digits", 2, Limits(), draw=lambda: 0.5, **options)
    assert isinstance(made, FailurePolicy)
    return made


def test_a_lost_worker_is_tried_again_until_nothing_moves(file_store: Store) -> None:
    """At once, then after a pause, then not at all; the user is left with step and cause, the run with incidents."""
    failing = policy(file_store)
    at_step(file_store, 57)
    told = [(failing.make_decision(lost()), failing.pause_s, failing.gave_up) for _ in range(3)]
    failing.settle(30)
    cause = "rank 1 failed: its process was killed or crashed (pid 4242, on 10.0.0.7)"
    sentence = f"no progress since step 57: {cause} (3 tries)"
    assert told == [(RETRY, 0.0, None), (RETRY, 0.5, None), (RAISE, 0.0, sentence)]
    found = incidents(file_store, "digits")
    assert sorted(each.kind for each in found) == ["no_progress", "worker_lost", "worker_lost", "worker_lost"]
    first = min(found, key=lambda each: each.at)
    assert (first.attempt, first.rank, first.step, first.reason) == (2, 1, 57, cause)
    assert first.evidence["decision"] == "resume"
    assert set(first.evidence["ranks"]) == {"0", "1"}


def test_progress_gives_further_tries(file_store: Store) -> None:
    """The newest step is read from the ledger of the newest groups and from checkpoints."""
    failing = policy(file_store)
    for generation, step in enumerate((0, 1500, 3100, 4700, 6200, 7900), 1):
        at_step(file_store, step, generation)
        assert failing.make_decision(lost()) is RETRY
        assert failing.pause_s == 0.0
        assert failing.history[-1].step == step
    file_store.put("runs/digits/checkpoints/step-000000009000/manifest.json", b"{}")
    assert failing.make_decision(lost()) is RETRY
    assert failing.history[-1].step == 9000
    failing.settle(30)


def test_a_users_error_ends_with_the_users_words(file_store: Store) -> None:
    """Tried twice more, though it comes from the training function."""
    failing = policy(file_store)
    error = WorkerGroupError("...", {0: ValueError("my data is odd")})
    assert failing.make_decision(error) is RETRY
    assert failing.make_decision(error) is RETRY
    assert failing.make_decision(error) is RAISE
    assert failing.gave_up is not None
    assert "rank 0 failed: my data is odd" in failing.gave_up
    failing.settle(30)


def test_a_preemption_is_not_charged_and_not_told_twice(file_store: Store) -> None:
    """The ranks wrote the incident before they left."""
    failing = policy(file_store)
    for step in range(10):
        report(file_store, "digits", Incident(kind="preempted", reason="rank 1 preempted", attempt=2, step=step))
        assert (
            failing.make_decision(WorkerGroupError("", {0: Preempted("digits", step, (1,), committed=True)})) is RETRY
        )
        assert failing.last is not None
        assert not failing.last.charged
    failing.settle(30)
    assert len(incidents(file_store, "digits")) == 10


def test_a_rank_that_the_watchdog_ended_was_hung(file_store: Store) -> None:
    """Its incident tells so, and stays the only one; the next lost worker is none of it."""
    failing = policy(file_store)
    report(file_store, "digits", Incident(kind="hang", reason="rank 1 stood still for 12 s", attempt=1, rank=1))
    assert failing.make_decision(lost()) is RETRY
    assert failing.history[-1].kind == "worker_lost", "that was another attempt"
    report(file_store, "digits", Incident(kind="hang", reason="rank 1 stood still for 12 s", attempt=2, rank=1))
    at_step(file_store, 3)
    assert failing.make_decision(lost()) is RETRY
    assert (failing.history[-1].kind, failing.history[-1].words) == ("hang", "rank 1 stood still for 12 s")
    at_step(file_store, 4)
    assert failing.make_decision(lost()) is RETRY
    assert failing.history[-1].kind == "worker_lost"
    failing.settle(30)
    kinds = [each.kind for each in incidents(file_store, "digits") if each.attempt == 2]
    assert sorted(kinds) == ["hang", "worker_lost", "worker_lost"]


def test_storage_that_hangs_delays_no_decision(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would have said is not known then, and the run goes on."""
    answer = threading.Event()

    def hang(*_: object) -> int:
        answer.wait(60)
        return 9

    monkeypatch.setattr(failure_handling, "newest_step", hang)
    failing = policy(file_store, read_s=0.05)
    try:
        assert failing.make_decision(lost()) is RETRY
        assert failing.history[-1].step is None
    finally:
        answer.set()
    failing.settle(30)


def test_a_store_that_is_away_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where there is none at all."""
    failing = RunFailurePolicy("nonsense://", "digits", 1)
    assert failing.make_decision(lost()) is RETRY
    assert failing.history[-1].step is None
    failing.settle(30)


def test_a_kill_for_memory_is_told_as_such(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once more under the same limit, then the end with advice."""
    failing = policy(file_store)
    monkeypatch.setattr(failing._witness, "killed", lambda: {1: "ended by the kernel at the memory limit of 512 MiB"})
    assert failing.make_decision(lost()) is RETRY
    assert failing.make_decision(lost()) is RAISE
    assert failing.gave_up is not None
    assert "out of memory: ended by the kernel at the memory limit of 512 MiB" in failing.gave_up
    assert "lower training.global_batch" in failing.gave_up
    failing.settle(30)
    assert "out_of_memory" in [each.kind for each in incidents(file_store, "digits")]
