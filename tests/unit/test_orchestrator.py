"""Which runs an orchestrator starts again, when, and how often; without Ray and without waiting."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.errors import UnavailableError
from lepton_ray.monitoring.incidents import incidents
from lepton_ray.orchestrator.decision import LIMITS, Resumption, RunView, decide_run
from lepton_ray.orchestrator.submission import State
from lepton_ray.orchestrator.watch import ON_ITS_WAY_S, Watch, driver_name
from lepton_ray.storage import Store
from lepton_ray.training.lease import lease_key

LOST = RunView(state="running", wanted=True, driver="gone", attempt=1, step=40)


@pytest.mark.parametrize(
    ("changes", "do"),
    [
        ({}, "resume"),
        ({"state": "interrupted"}, "resume"),  # SIGTERM: its pod was taken away
        ({"state": "interrupted", "wanted": False}, "leave"),  # Ctrl-C
        ({"state": "interrupted", "wanted": None}, "leave"),  # of an earlier version: it is not known
        ({"wanted": None}, "resume"),
        ({"state": "finished"}, "nothing"),
        ({"state": "failed"}, "nothing"),
        ({"state": "odd"}, "nothing"),
        ({"driver": "alive"}, "nothing"),
        ({"driver": "unknown"}, "wait"),
        ({"on_its_way": True}, "wait"),
        ({"stopped": True}, "leave"),
        ({"obstacle": "its function is not in the store"}, "leave"),
        ({"gave_up": True}, "nothing"),
    ],
)
def test_what_is_done_with_a_run(changes: dict[str, Any], do: str) -> None:
    assert decide_run(dataclasses.replace(LOST, **changes), 100.0).do == do


def test_drivers_lost_at_the_same_step_are_resumed_ever_later_and_then_no_more() -> None:
    """At once, after a pause, not at all; with progress again at once."""
    earlier = tuple(Resumption(attempt, 40, 10.0 * attempt) for attempt in (2, 3))
    actions = [decide_run(dataclasses.replace(LOST, earlier=earlier[:n]), 100.0, jitter=0.5) for n in range(3)]
    assert [action.do for action in actions] == ["resume", "resume", "give_up"]
    assert [action.after_s for action in actions[:2]] == [0.0, 0.5 * LIMITS.first_pause_s]
    assert actions[2].why == "no progress since step 40: driver of attempt 1 lost (3 tries)"
    assert decide_run(dataclasses.replace(LOST, earlier=earlier, step=41), 100.0, jitter=0.5).after_s == 0.0


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(0, 100))
def test_no_run_is_resumed_without_end(steps: list[int], step: int) -> None:
    """Whatever went before, three times at one step is the end."""
    earlier = [Resumption(number, each, float(number)) for number, each in enumerate([*steps, 100, 100], 2)]
    view = dataclasses.replace(LOST, earlier=tuple(earlier), step=step)
    assert decide_run(view, 1000.0).do == "give_up"


class Started:
    """Drivers that are only noted."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.states: dict[str, State] = {}
        self.away = False
        self.meanwhile: Callable[[], object] = bool
        """Called between the decision to start a driver and its claim."""

    def check(self) -> None:
        self.meanwhile()
        if self.away:
            raise UnavailableError("Ray is away")

    def start(self, name: str, run: str) -> None:
        self.names.append(name)
        self.states[name] = "alive"

    def state(self, name: str) -> State:
        return self.states.get(name, "unknown")

    def obstacle(self, job: str | None) -> str | None:
        return None


class Bench:
    """A watch whose clock is moved by hand."""

    def __init__(self, store: Store, started: Started | None = None) -> None:
        self.now = 1000.0
        self.started = started or Started()
        self.events: list[dict[str, Any]] = []
        self.watch = Watch(store, self.started, self._say, clock=lambda: self.now, draw=lambda: 0.5)

    def _say(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))

    def look(self, after_s: float = 0.0) -> bool:
        self.now += after_s
        return self.watch.look()

    @property
    def told(self) -> list[str]:
        return [event["event"] for event in self.events]


def stored(store: Store, run: str = "digits", *, attempt: int = 1, host: str = "elsewhere", **record: Any) -> None:
    """A run whose driver on another host does not renew its lease."""
    fields = {"run": run, "state": "running", "wanted": True, "table": "digits", "attempts": [{"attempt": attempt}]}
    store.put(f"runs/{run}/record.json", json.dumps({**fields, **record}).encode())
    holder = {"host": host, "pid": 1, "started": 0.0}
    lease = {"attempt": attempt, "driver": holder, "ttl_s": 15.0, "released": False, "renewed_at": 0.0}
    store.put(lease_key(run), json.dumps(lease).encode())


def renewed(store: Store, run: str = "digits", **changes: Any) -> None:
    lease = {**json.loads(store.get(lease_key(run))), **changes}
    lease["renewed_at"] += 1.0
    store.put(lease_key(run), json.dumps(lease).encode())


def test_a_lease_that_stands_still_is_waited_for_and_then_taken(store: Store) -> None:
    """Its time to live, by the watch's own clock, and from the first look on: it may be any age."""
    bench = Bench(store)
    stored(store)
    assert bench.look()
    assert bench.look(14.0)
    assert bench.started.names == []
    bench.look(2.0)
    assert bench.started.names == ["digits-2"]
    assert (
        bench.events[-1] | {"event": "resumed", "run": "digits", "attempt": 2, "name": "digits-2"} == bench.events[-1]
    )


def test_a_driver_that_renews_its_lease_is_left_alone(file_store: Store) -> None:
    """However long it is watched."""
    bench = Bench(file_store)
    stored(file_store)
    for _ in range(20):
        bench.look(14.0)
        renewed(file_store)
    assert bench.started.names == []
    assert bench.events == []
    assert not bench.look(), "there is nothing to wait for"


def test_a_released_lease_and_a_dead_process_of_this_host_are_not_waited_for(file_store: Store) -> None:
    """Released by a driver that was told to end, or held by one that is known to be gone."""
    import socket

    stored(file_store, "stopped", state="interrupted")
    renewed(file_store, "stopped", released=True)
    stored(file_store, "killed", host=socket.gethostname())
    lease = json.loads(file_store.get(lease_key("killed")))
    lease["driver"]["pid"] = 2**22 + 1  # beyond any process id
    file_store.put(lease_key("killed"), json.dumps(lease).encode())
    bench = Bench(file_store)
    bench.look()
    assert sorted(bench.started.names) == ["killed-2", "stopped-2"]


def test_two_watches_start_one_driver(store: Store) -> None:
    """The second finds the claim, and waits for the driver of the first."""
    stored(store)
    renewed(store, released=True)
    one, other = Bench(store), Bench(store)
    one.look()
    other.look()
    other.look(ON_ITS_WAY_S - 1)
    one.look(ON_ITS_WAY_S - 1)
    assert (one.started.names, other.started.names) == (["digits-2"], [])


def test_of_two_watches_that_decide_at_once_one_starts_a_driver(store: Store) -> None:
    """The other one has seen no claim when it decides, and finds one when it makes its own."""
    stored(store)
    renewed(store, released=True)
    one, other = Bench(store), Bench(store)
    one.started.meanwhile = other.look
    one.look()
    assert (one.started.names, other.started.names) == ([], ["digits-2"])


def test_a_claim_whose_owner_died_is_followed_by_another(file_store: Store) -> None:
    """Between the claim and the driver's start; under another name, after the time that a driver takes to begin."""
    stored(file_store)
    renewed(file_store, released=True)
    Bench(file_store).look()  # it is never heard of again
    bench = Bench(file_store)
    bench.look()
    bench.look(ON_ITS_WAY_S + 1)
    assert bench.told == ["lost"]
    bench.look(LIMITS.first_pause_s)
    assert bench.started.names == ["digits-2-2"]
    assert driver_name("digits", 2, 2) == "digits-2-2"


def test_a_driver_that_never_begins_is_given_up(file_store: Store) -> None:
    """Three times in all, with an incident of one watch only; the run goes on once somebody starts it himself."""
    stored(file_store)
    renewed(file_store, released=True)
    bench = Bench(file_store)
    for _ in range(6):
        bench.look(LIMITS.first_pause_s)
        for name in bench.started.names:
            bench.started.states[name] = "over"
    assert bench.started.names == ["digits-2", "digits-2-2"]
    assert bench.told[-1] == "gave_up"
    Bench(file_store).look()
    found = incidents(file_store, "digits")
    assert [each.kind for each in found] == ["no_progress"]
    assert found[0].reason == "no progress since step 0: driver of attempt 1 lost (3 tries)"
    renewed(file_store, attempt=2)
    file_store.put("runs/digits/ledger/g2-rank0.json", b'{"last_step": 80}')
    bench.look(1.0)
    assert bench.started.names[-1] == "digits-3"


def test_what_cannot_be_resumed_is_told_once(file_store: Store) -> None:
    """Ended by Ctrl-C, a loop of one's own, a trial of a search."""
    stored(file_store, "ended", state="interrupted", wanted=False)
    stored(file_store, "own", table=None, function="m.train")
    stored(file_store, "search-t003")
    file_store.put("tunings/search/record.json", b"{}")
    for run in ("ended", "own", "search-t003"):
        renewed(file_store, run, released=True)
    bench = Bench(file_store)
    for _ in range(3):
        assert not bench.look(1.0)
    assert bench.started.names == []
    assert sorted((event["event"], event["run"]) for event in bench.events) == [
        ("left", "ended"), ("left", "own"), ("left", "search-t003"),
    ]  # fmt: skip


def test_a_stopped_ray_job_is_left_and_a_lost_one_is_not(file_store: Store) -> None:
    """`ray job stop` ends a driver by the same signal as the end of its pod; the cluster knows which it was."""
    for run in ("stopped", "stopping", "lost", "forgotten"):
        stored(file_store, run, state="interrupted", attempts=[{"attempt": 1, "job": f"job-{run}"}])
        renewed(file_store, run, released=True)
    bench = Bench(file_store)
    bench.started.states |= {"job-stopped": "stopped", "job-stopping": "alive", "job-lost": "over"}
    assert bench.look()
    assert sorted(bench.started.names) == ["forgotten-2", "lost-2"]
    bench.started.states["job-stopping"] = "stopped"
    bench.look(1.0)
    assert len(bench.started.names) == 2


def test_a_cluster_that_is_away_is_waited_for(file_store: Store) -> None:
    """Nothing is claimed before it can be started, and it is told once."""
    stored(file_store)
    renewed(file_store, released=True)
    bench = Bench(file_store)
    bench.started.away = True
    for _ in range(5):
        assert bench.look(1.0)
    assert bench.told == ["error"]
    bench.started.away = False
    bench.look(1.0)
    assert bench.started.names == ["digits-2"]


def test_a_single_round_ends_whatever_is_away(file_store: Store) -> None:
    """It tells that it could not be settled; where it can, it ends as soon as everything is decided."""
    stored(file_store)
    bench = Bench(file_store)
    stop = threading.Event()
    bench.started.away = True

    def later(_: float) -> bool:
        bench.now += 5.0
        return False

    stop.wait = later  # type: ignore[method-assign,assignment]
    assert not bench.watch.run_once(stop, 5.0)
    bench.started.away = False
    assert bench.watch.run_once(stop, 5.0)
    assert bench.started.names == ["digits-2"]


def test_a_start_that_fails_takes_its_claim_back(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next look, of whichever watch, tries again under the same name."""
    stored(file_store)
    renewed(file_store, released=True)
    bench = Bench(file_store)

    def refuse(name: str, run: str) -> None:
        raise UnavailableError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(bench.started, "start", refuse)
        bench.look()
    assert file_store.list("runs/digits/resumptions") == []
    bench.look(1.0)
    assert bench.started.names == ["digits-2"]


@pytest.mark.parametrize(
    ("key", "content"),
    [("record.json", b"{"), ("record.json", b'{"state": "running", "attempts": 3}'), ("lease.json", b"[]"),
     ("resumptions/000002-1.json", b'{"step": "x"}')],
)  # fmt: skip
def test_a_damaged_run_keeps_no_other_from_being_resumed(file_store: Store, key: str, content: bytes) -> None:
    for run in ("broken", "whole"):
        stored(file_store, run)
        renewed(file_store, run, released=True)
    file_store.put(f"runs/broken/{key}", content)
    bench = Bench(file_store)
    bench.look()
    bench.look(1.0)
    assert "whole-2" in bench.started.names
    assert "broken-2" not in bench.started.names
    assert "error" in bench.told
