"""An elastic run on a cluster of two nodes: it goes on with what is left of a lost node, and grows back."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load

import lepton_ray
from lepton_ray.monitoring.incidents import incidents
from lepton_ray.monitoring.runs import read_record, run_goodput
from lepton_ray.storage import Store
from lepton_ray.training.hot_folder import folder_of
from lepton_ray.training.trainer import final_checkpoint

pytestmark = pytest.mark.ray
EPOCHS, BATCH, ROWS = 50, 12, 96
STEPS = EPOCHS * ROWS // BATCH
LOST_AT = 23
"""Steps that are done when the node is taken away: not one after which there is a checkpoint."""
WAIT_S = 120.0


class Points(torch.utils.data.Dataset[Any]):
    """Points on a line."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([index / ROWS])
        return x, 3.0 * x


def note(folder: str, **facts: Any) -> None:
    """Append a line to what the test reads."""
    with (Path(folder) / "notes.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"pid": os.getpid(), **facts}) + "\n")


def wait_for(running: Future[Any], true: Callable[[], Any], what: str) -> None:
    """Wait for something that the run does."""
    until = time.monotonic() + WAIT_S
    while not true():
        assert not running.done(), f"the run ended before {what}: {running.result()}"
        assert time.monotonic() < until, f"{what} did not happen within {WAIT_S:g} s"
        time.sleep(0.05)


def training(options: dict[str, Any]) -> None:
    """A loop that stands still before a step until the test has taken a node away."""
    session = lepton_ray.training.session()
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model, optimizer = session.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    folder = options.get("folder")
    start = session.restore()
    node = ray.get_runtime_context().get_node_id()
    if folder:
        note(folder, rank=session.rank, start=start, world_size=session.world_size, node=node)
    for x, y in session.batches(Points(), BATCH, epochs=EPOCHS):
        if folder and session.step == LOST_AT and session.world_size == 2:
            note(folder, rank=session.rank, here=session.step)
            until = time.monotonic() + WAIT_S
            while not (Path(folder) / ("lost" if node == options["head"] else "never")).exists():
                assert time.monotonic() < until, "no node was lost"
                time.sleep(0.05)
        if folder and session.world_size == 1:
            time.sleep(0.05 if (Path(folder) / "added").exists() else 0.2)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def read(folder: Path) -> list[dict[str, Any]]:
    """The notes so far."""
    path = folder / "notes.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def created(store: Store) -> float:
    """When the run was started first, unix seconds."""
    return float(read_record(store, "struck")["created_at"])


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A head and another node, one CPU each, as one cluster that the driver connects to."""
    from ray.cluster_utils import Cluster

    tests = Path(__file__).parent.parent
    for name, value in {
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_period_ms": "2000",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests / "integration"), *sys.path]),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_lost_node_shrinks_the_run_and_a_new_one_grows_it(nodes: Any, file_store: Store, tmp_path: Path) -> None:
    """Two ranks, then one, then two: every sample once, and the weights that a calm run has."""

    def settings(name: str, **options: Any) -> dict[str, Any]:
        return {
            "run": name,
            "training": {
                "workers": {"min": 1, "max": 2, "grow_after_s": 1}, "checkpoint": {"every_steps": 10},
                "watchdog": {"enabled": False}, "options": options,
            },
        }  # fmt: skip

    undisturbed = lepton_ray.run_distributed(training, settings("calm"), store=file_store)
    struck_settings = settings("struck", folder=str(tmp_path), head=nodes.head_node.node_id)
    with ThreadPoolExecutor(1) as pool:  # nodes are made in the main thread
        running = pool.submit(lepton_ray.run_distributed, training, struck_settings, store=file_store)
        wait_for(running, lambda: len([line for line in read(tmp_path) if "here" in line]) == 2, "the step of the loss")
        lost = nodes.worker_nodes.copy().pop()
        (rank,) = (line["rank"] for line in read(tmp_path) if line.get("node") == lost.node_id)
        for path in folder_of(file_store.uri, "struck", created(file_store)).glob(f"g*-rank{rank}*"):
            path.unlink()  # the nodes share this machine's memory; a lost one would take its part with it
        nodes.remove_node(lost, allow_graceful=False)
        (tmp_path / "lost").touch()
        wait_for(running, lambda: [line for line in read(tmp_path) if line.get("world_size") == 1], "a group of one")
        nodes.add_node(num_cpus=1)
        (tmp_path / "added").touch()
        found = running.result(timeout=WAIT_S)
    groups = [(line["world_size"], line["start"]) for line in read(tmp_path) if "start" in line and line["rank"] == 0]
    assert [size for size, _ in groups] == [2, 1, 2]
    assert [start for _, start in groups[:2]] == [0, LOST_AT]
    assert groups[2][1] % 10 == 0, "a run grows at a checkpoint"
    assert found.samples_exact
    assert found.step == STEPS
    calm, struck = (load(final_checkpoint(file_store, one).files["model.safetensors"]) for one in (undisturbed, found))
    for name, value in calm.items():
        torch.testing.assert_close(struck[name], value, msg=name)
    told = incidents(file_store, "struck")
    assert [incident.kind for incident in told] == ["worker_lost"], [incident.reason for incident in told]
    assert told[0].evidence["decision"] in ("shrink", "resume")
    ledger = run_goodput(file_store, "struck", read_record(file_store, "struck"))
    assert sum(ledger.buckets.values()) == pytest.approx(ledger.total)
    assert ledger.total < 2 * ledger.wall
