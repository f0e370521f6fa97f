"""A worker group that lost a rank starts again in place: survivors stay, no step that was done is done again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load

import lepton_ray
from lepton_ray.errors import LeptonError
from lepton_ray.monitoring.incidents import incidents
from lepton_ray.storage import Store
from lepton_ray.training.trainer import final_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
STEPS = 48
FAULTS = {9: (1, "kill"), 20: (0, "kill"), 31: (1, "error"), 40: (0, "forward")}
"""Step at which a fault strikes once: rank, and what happens to it."""


class Points(torch.utils.data.Dataset[Any]):
    """Points on a line."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([index / 96.0])
        return x, 3.0 * x + 0.1 * torch.randn(1)


def note(options: dict[str, Any], **facts: Any) -> None:
    """Append a line to what the test reads afterwards."""
    with (Path(options["folder"]) / "notes.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"pid": os.getpid(), **facts}) + "\n")


def strike(options: dict[str, Any], rank: int, step: int, place: str) -> None:
    """The fault of this step, the first time that this rank comes here."""
    victim, kind = options["faults"].get(str(step), (-1, ""))
    marker = Path(options["folder"]) / f"struck-{step}"
    if victim != rank or marker.exists() or (kind == "forward") != (place == "forward"):
        return
    marker.touch()
    if kind == "error":
        raise ValueError("the training code stumbled")
    os.kill(os.getpid(), signal.SIGKILL)


def stumbling(options: dict[str, Any]) -> None:
    """A loop whose ranks are struck by faults."""
    session = lepton_ray.training.session()
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model, optimizer = session.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    note(options, rank=session.rank, start=session.restore())
    for x, y in session.batches(Points(), 12, epochs=STEPS // 8):
        step = session.step
        optimizer.zero_grad()
        outputs = model(x)
        strike(options, session.rank, step, "forward")
        torch.nn.functional.mse_loss(outputs, y).backward()
        optimizer.step()
        note(options, rank=session.rank, done=step)
        strike(options, session.rank, step, "after")


def run(store: Store, folder: Path, name: str, faults: dict[int, tuple[int, str]], **training: Any) -> Any:
    """Train with these faults; the result and the notes."""
    folder.mkdir()
    options = {"folder": str(folder), "faults": {str(step): list(fault) for step, fault in faults.items()}}
    settings = {
        "run": name,
        "training": {
            "workers": 2, "max_failures": 10, "checkpoint": {"every_steps": 1000}, "options": options, **training,
        },
    }  # fmt: skip
    result = lepton_ray.run_distributed(stumbling, settings, store=store)
    lines = (folder / "notes.jsonl").read_text(encoding="utf-8").splitlines()
    return result, [json.loads(line) for line in lines]


def test_faults_cost_no_step_that_was_done(tmp_path: Path, file_store: Store) -> None:
    """Four faults: the weights end the same, every sample is used once, each step was done once by each rank."""
    calm, _ = run(file_store, tmp_path / "calm", "calm", {})
    struck, notes = run(file_store, tmp_path / "struck", "struck", FAULTS)
    assert struck.generations == 1 + len(FAULTS)
    assert struck.samples_exact
    before, after = (load(final_checkpoint(file_store, one).files["model.safetensors"]) for one in (calm, struck))
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    for rank in (0, 1):
        done = [line["done"] for line in notes if line["rank"] == rank and "done" in line]
        assert sorted(set(done)) == list(range(STEPS))
        assert len(done) - STEPS <= 1, f"rank {rank} repeated steps: {done}"
    starts = [[line for line in notes if "start" in line and line["rank"] == rank] for rank in (0, 1)]
    assert [line["start"] for line in starts[0]] == [line["start"] for line in starts[1]] == [0, 10, 21, 32, 40]
    told = [(found.kind, found.rank) for found in incidents(file_store, "struck")]
    assert told == [("worker_lost", 1), ("worker_lost", 0), ("error", 1), ("worker_lost", 0)]


def test_survivors_keep_their_processes(tmp_path: Path, file_store: Store) -> None:
    """Of two ranks one is killed: the other's process goes on as a rank of the next group."""
    _, notes = run(file_store, tmp_path / "one", "one", {9: (1, "kill")})
    before, after = (
        {line["pid"] for line in notes if "start" in line and (line["start"] > 0) is later} for later in (False, True)
    )
    assert len(before) == len(after) == 2
    assert len(before & after) == 1


def test_an_error_that_repeats_ends_the_run_in_its_own_words(tmp_path: Path, file_store: Store) -> None:
    """The training code is tried twice more, and then its error is told."""

    def wrong() -> None:
        session = lepton_ray.training.session()
        model = session.prepare(torch.nn.Linear(1, 1))
        for x, _ in session.batches(Points(), 12, epochs=1):
            model(x).sum().backward()
            if session.step == 3:
                raise ValueError("a label is missing")

    with pytest.raises(LeptonError, match="a label is missing"):
        lepton_ray.run_distributed(wrong, {"run": "wrong", "training": {"workers": 2}}, store=file_store)


def test_ranks_may_use_ray_trains_own_collectives(tmp_path: Path, file_store: Store) -> None:
    """Its synchronisation actor is started when the first rank calls it, and ended with the run."""

    def agreeing() -> Any:
        from ray.train import collective  # noqa: TID251 - what a loop that was made for Ray Train may use

        session = lepton_ray.training.session()
        session.prepare(torch.nn.Linear(1, 1))
        return collective.broadcast_from_rank_zero({"rank": session.rank})

    result = lepton_ray.run_distributed(agreeing, {"run": "agreeing", "training": {"workers": 2}}, store=file_store)
    assert result.record["value"] == {"rank": 0}
    assert not [name for name in ray.util.list_named_actors() if name.startswith("barrier-")]
