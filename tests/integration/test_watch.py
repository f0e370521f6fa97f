"""The watchdog on a real local Ray: a hung rank is named and replaced, a straggler is named, nobody else is."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from beating_ranks import rank_that
from digits_slice import fill, small_settings

import lepton_ray
from lepton_ray.cluster import connect
from lepton_ray.monitoring.incidents import Incident, incidents
from lepton_ray.storage import Store
from lepton_ray.training.beat import beats_folder
from lepton_ray.training.beat_reading import Sighting, sight
from lepton_ray.training.node_watch import NodeWatch
from lepton_ray.training.plan import RankPlan
from lepton_ray.training.trainer import Trainer, TrainingResult
from lepton_ray.training.watchdog import Watchdog

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

FLOOR_S = 3.0
"""As low as a busy machine allows: a step takes milliseconds."""


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the tests of this file; its processes find this folder's modules."""
    tests = Path(__file__).parent.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests / "integration"), *sys.path]))
        with connect():
            yield


def folder_of_beats(store: Store, run: str) -> Path:
    record = json.loads(store.get(f"runs/{run}/record.json"))
    return beats_folder(store.uri, run, record["created_at"])


def own(store: Store, function: Any, run: str, folder: Path, **training: Any) -> TrainingResult:
    """A run with a loop of one's own; the folder is for marks."""
    options = {"folder": str(folder), **training.pop("options", {})}
    watchdog = {"floor_s": FLOOR_S}
    training = {"workers": 2, "checkpoint": {"every_steps": 20}, "watchdog": watchdog, "options": options, **training}
    return lepton_ray.run_distributed(function, {"run": run, "training": training}, store=store)


def of_kind(store: Store, run: str, kind: str) -> list[Incident]:
    return [each for each in incidents(store, run) if each.kind == kind]


@pytest.mark.timeout(300)
def test_a_stopped_rank_is_named_and_replaced(
    file_store: Store, record_property: Callable[[str, object], None]
) -> None:
    """SIGSTOP of rank 1: an incident with its evidence, the rank is killed, and the run ends with exact samples."""
    fill(file_store)
    stopped: list[tuple[Sighting, float]] = []
    goes_on: list[float] = []

    def stop_once(progress: Any) -> None:
        if not stopped and progress.step > 60:
            [_, rank] = sight(folder_of_beats(file_store, "stopped"), 1)
            os.kill(rank.pid, signal.SIGSTOP)
            stopped.append((rank, time.time()))
        if stopped and not goes_on and progress.generation > stopped[0][0].generation and progress.step > 0:
            goes_on.append(time.time())

    settings = small_settings("stopped", epochs=40, watchdog={"floor_s": FLOOR_S})
    result = Trainer(None, settings, store=file_store, on_progress=stop_once).fit()
    [(rank, at)] = stopped
    [found] = of_kind(file_store, "stopped", "hang")
    record_property("seconds from the stop to the alarm", found.at - at)
    record_property("seconds from the alarm to figures of the new group", goes_on[0] - found.at)
    assert (found.rank, found.generation, found.attempt) == (1, rank.generation, 1)
    assert found.step is not None
    assert found.step >= 60
    assert found.evidence["found"] == "stopped"
    assert found.evidence["ranks"] == [1]
    assert found.at - at >= FLOOR_S
    waited = found.evidence["stacks"]["0"]
    assert "backward" in waited or "distributed_c10d" in waited, f"no collective that the other rank waits in: {waited}"
    assert "1" not in found.evidence["stacks"], "a stopped process gives none"
    assert not psutil.pid_exists(rank.pid)
    assert result.generations == 2
    assert result.samples_exact
    assert not folder_of_beats(file_store, "stopped").exists()


class Points(torch.utils.data.Dataset[Any]):
    """A few points on a line; one of them comes late, once, if there is a mark to be made."""

    def __init__(self, count: int, late: Path | None = None, late_s: float = 0.0) -> None:
        self.count, self.late, self.late_s = count, late, late_s

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == self.count - 1 and self.late is not None and not self.late.exists():
            self.late.touch()
            time.sleep(self.late_s)
        x = torch.tensor([index / self.count])
        return x, 3.0 * x


def steps(dataset: Points, size: int = 4) -> Iterator[Any]:
    """A usual loop: the session is given after each forward of a step."""
    session = lepton_ray.training.session()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer = session.prepare(model, optimizer)
    for x, y in session.batches(dataset, size, epochs=1):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        yield session
        loss.backward()
        optimizer.step()


def keeps_the_lock(options: dict[str, Any]) -> None:
    """Rank 1's native code sleeps with the interpreter's lock in its hand, once."""
    mark = Path(options["folder"]) / "kept"
    for session in steps(Points(400)):
        if session.step == 30 and session.rank == 1 and not mark.exists():
            mark.touch()
            ctypes.PyDLL(None).sleep(200)


@pytest.mark.timeout(300)
def test_a_rank_that_keeps_the_interpreters_lock_is_named_and_replaced(tmp_path: Path, file_store: Store) -> None:
    result = own(file_store, keeps_the_lock, "lock", tmp_path)
    [found] = of_kind(file_store, "lock", "hang")
    assert (found.rank, found.step) == (1, 30)
    assert found.evidence["found"] == "interpreter"
    assert "keeps_the_lock" in found.evidence["stacks"]["1"], "the line that it hangs in"
    assert (result.step, result.samples_exact, result.generations) == (100, True, 2)


def takes_its_time(options: dict[str, Any]) -> None:
    """Rank 1 is slow in all that may be slow, each time for longer than the floor."""
    long_s = 2 * FLOOR_S
    late = Path(options["folder"]) / "late"
    for session in steps(Points(80, late=late, late_s=long_s)):
        if session.rank == 1 and session.step in (0, 5, 10):
            with session.phase({0: "forward", 5: "checkpoint", 10: "validation"}[session.step]):
                time.sleep(long_s)


@pytest.mark.timeout(300)
def test_what_is_slow_by_its_nature_is_no_hang(tmp_path: Path, file_store: Store) -> None:
    """The first step, a checkpoint, an evaluation and the data of one rank: the other waits, and nobody is blamed."""
    result = own(file_store, takes_its_time, "patient", tmp_path)
    assert (tmp_path / "late").exists()
    assert incidents(file_store, "patient") == []
    assert (result.step, result.samples_exact, result.generations) == (20, True, 1)


def computes_longer(options: dict[str, Any]) -> None:
    """One rank takes longer for each step."""
    for session in steps(Points(480)):
        if session.rank == options["slow"]:
            time.sleep(0.08)


@pytest.mark.timeout(300)
def test_a_straggler_is_named_once_with_figures(tmp_path: Path, file_store: Store) -> None:
    result = own(file_store, computes_longer, "slow", tmp_path, options={"slow": 0})
    [found] = of_kind(file_store, "slow", "straggler")
    assert found.rank == 0
    assert of_kind(file_store, "slow", "hang") == []
    assert found.evidence["ratio"] > 1.5
    assert found.evidence["own_s"]["0"] > 0.08
    assert (result.samples_exact, result.generations) == (True, 1)


class Elsewhere(Watchdog):
    """The watchdog of a driver on a node without ranks."""

    def __init__(self, plan: RankPlan, store: Store) -> None:
        super().__init__(plan, store, local=False)
        self._nodes = {"": NodeWatch("file:///nowhere", "none", 1.0, 1)}

    def _here(self) -> str:
        return "another node"


@pytest.mark.timeout(120)
def test_ranks_on_another_node_are_watched_by_an_actor_there(file_store: Store) -> None:
    """It is found by the placement group's name; what it sees and does is what happens on the driver's own node."""
    settings = small_settings("far", watchdog={"floor_s": FLOOR_S})
    plan = RankPlan(settings, file_store.uri, 1, {}, "", 1.0)
    group = ray.util.placement_group([{"CPU": 0.01}], name="far-1-0123abcd-0")
    folder = beats_folder(file_store.uri, "far", 1.0)
    watchdog = Elsewhere(plan, file_store)
    try:
        assert group.wait(30)
        with rank_that("waits", folder, rank=0), rank_that("waits", folder, rank=1) as stopped:
            watchdog.start()
            stopped.send_signal(signal.SIGSTOP)
            assert stopped.wait(60) == -signal.SIGKILL
            deadline = time.monotonic() + 30
            while not incidents(file_store, "far") and time.monotonic() < deadline:
                time.sleep(0.1)
    finally:
        watchdog.stop()
        ray.util.remove_placement_group(group)
    [found] = incidents(file_store, "far")
    assert (found.kind, found.rank, found.evidence["found"]) == ("hang", 1, "stopped")
    assert "waits" in found.evidence["stacks"]["0"]
    assert not folder.exists()
