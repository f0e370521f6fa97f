"""One driver per run: the lease, its take-over, and the fence that keeps an old attempt from writing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from lepton_ray.errors import RefusedError
from lepton_ray.storage import Store
from lepton_ray.training.lease import Fence, RunLease, lease_key


def test_attempts_count_up_from_one(store: Store) -> None:
    for attempt in (1, 2, 3):
        lease = RunLease.acquire(store, "digits")
        assert lease.attempt == attempt
        lease.release()


def held_elsewhere(store: Store, run: str, ttl_s: float) -> RunLease:
    """A lease that looks as if a driver on another host held it."""
    lease = RunLease.acquire(store, run, ttl_s=ttl_s)
    stored = store.fetch(lease_key(run))
    body = json.loads(stored.data)
    body["driver"]["host"] = "elsewhere"
    lease._etag = store.replace(lease_key(run), json.dumps(body).encode(), stored.etag)
    return lease


def test_a_living_driver_keeps_its_run(file_store: Store) -> None:
    """The second driver is refused with the first one's name, and the first one is not disturbed."""
    lease = RunLease.acquire(file_store, "digits", ttl_s=1.5)
    with pytest.raises(RefusedError, match=r"driven by .+:\d+ \(attempt 1\)"):
        RunLease.acquire(file_store, "digits")
    assert not lease.lost.is_set()
    lease.release()


def test_a_lease_that_stands_still_is_taken_over(file_store: Store) -> None:
    """A driver that is frozen for longer than its time to live loses the run, notices, and is fenced."""
    frozen = held_elsewhere(file_store, "digits", ttl_s=1.0)
    frozen._stop.set()  # it renews no more, as a stopped process would not
    frozen._thread.join(10)
    fence = Fence(file_store, "digits", frozen.attempt)
    fence.check()
    taken = RunLease.acquire(file_store, "digits")
    assert taken.attempt == 2
    with pytest.raises(RefusedError, match="attempt 1 was taken over by attempt 2"):
        fence.check()
    frozen.release()  # thawed: it must not take the run back
    Fence(file_store, "digits", 2).check()
    taken.release()


def test_a_driver_of_this_host_that_was_killed_is_replaced_at_once(file_store: Store) -> None:
    """No waiting for the time to live when the process is known to be gone."""
    code = (
        "import os, signal, sys\n"
        "from lepton_ray.storage import open_store\n"
        "from lepton_ray.training.lease import RunLease\n"
        "RunLease.acquire(open_store(sys.argv[1]), 'digits', ttl_s=3600)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, file_store.uri], check=False, timeout=60)
    taken = RunLease.acquire(file_store, "digits")
    assert taken.attempt == 2
    taken.release()


def test_of_drivers_that_start_together_one_wins(store: Store) -> None:
    won: list[RunLease] = []
    refused: list[RefusedError] = []
    barrier = threading.Barrier(6)

    def start() -> None:
        barrier.wait(10)
        try:
            won.append(RunLease.acquire(store, "digits", ttl_s=1.0))
        except RefusedError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(won), len(refused)) == (1, 5)
    won[0].release()


def test_a_lost_lease_is_noticed_by_its_driver(file_store: Store) -> None:
    lease = RunLease.acquire(file_store, "digits", ttl_s=0.3)
    stored = file_store.fetch(lease_key("digits"))
    file_store.put(lease_key("digits"), stored.data.replace(b'"attempt": 1', b'"attempt": 2'))
    assert lease.lost.wait(10)
    lease.release()
    assert json.loads(file_store.get(lease_key("digits")))["attempt"] == 2
