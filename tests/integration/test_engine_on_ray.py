"""The engine on a real local Ray with two ranks: what it computes is what plain torch computes in one process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import reference, run_here

import lepton_ray
from lepton_ray.errors import UsageError
from lepton_ray.storage import Store
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.trainer import final_checkpoint

pytestmark = pytest.mark.ray

EPOCHS, BATCH = 4, 10
STEPS = 20
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.05, "momentum": 0.8, "nesterov": True},
    "adam": {"learning_rate": 2e-3},
    "adamw": {"learning_rate": 2e-3},
    "adagrad": {"learning_rate": 0.01},
    "rmsprop": {"learning_rate": 1e-3, "momentum": 0.5},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"warmup": 0.0},
    "linear": {"warmup": 0.0},
    "cosine": {"warmup": 0.0},
    "step": {"warmup": 0.0, "step_epochs": 1, "factor": 0.5},
    "one_cycle": {"warmup": 0.3},
}
BASE: dict[str, Any] = {
    "epochs": EPOCHS, "global_batch": BATCH, "checkpoint": {"every_steps": 100, "hot": False},
}  # fmt: skip


def settings_of(kind: str, schedule: str, /, **changes: Any) -> dict[str, Any]:
    """One run's training settings."""
    moves = {
        "name": kind, "weight_decay": 1e-2, "clip_norm": None, "decay_norm_and_bias": True,
        **OPTIMIZERS[kind], "schedule": {"name": schedule, **SCHEDULES[schedule]},
    }  # fmt: skip
    return {**BASE, "optimizer": {**moves, **changes.pop("optimizer", {})}, **changes}


RUNS: dict[str, dict[str, Any]] = {
    **{f"{name}-constant": settings_of(name, "constant") for name in OPTIMIZERS},
    **{f"sgd-{name.replace('_', '-')}": settings_of("sgd", name) for name in SCHEDULES},
    "clipped": settings_of("sgd", "constant", optimizer={"clip_norm": 0.5}),
    "lasso": settings_of("sgd", "constant", optimizer={"l1": 1e-3, "l2": 1e-2}),
    "parts": settings_of("adamw", "constant", optimizer={"accumulate": 4}),
    "sharded": settings_of("adamw", "constant", parallel={"strategy": "fsdp"}),
}


def plain(training: dict[str, Any]) -> dict[str, Any]:
    """What torch's own optimiser and scheduler give in one process."""
    moves = training["optimizer"]

    def made(model: torch.nn.Module) -> Any:
        parameters = list(model.parameters())
        optimizer = torch_optimizer(moves, parameters)
        scheduler = torch_scheduler(moves["schedule"]["name"], optimizer, moves["learning_rate"])

        def move() -> None:
            for parameter in parameters:
                weight, gradient = parameter.detach(), parameter.grad
                if gradient is not None:
                    gradient += moves.get("l1", 0.0) * weight.sign() + moves.get("l2", 0.0) * weight
            if moves["clip_norm"]:
                torch.nn.utils.clip_grad_norm_(parameters, moves["clip_norm"])
            optimizer.step()
            scheduler.step()

        return move

    return reference(training, made, rows=ROWS, steps=STEPS)


def torch_optimizer(moves: dict[str, Any], parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Torch's own optimiser with the same figures."""
    kinds = {
        "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }  # fmt: skip
    further = {key: moves[key] for key in ("momentum", "nesterov") if key in moves}
    if moves["name"] == "adagrad":
        further["eps"] = 1e-8
    made: torch.optim.Optimizer = kinds[moves["name"]](
        parameters, lr=moves["learning_rate"], weight_decay=moves["weight_decay"], **further
    )
    return made


def torch_scheduler(name: str, optimizer: torch.optim.Optimizer, peak: float) -> torch.optim.lr_scheduler.LRScheduler:
    """Torch's own scheduler, stepped after every step."""
    lr = torch.optim.lr_scheduler
    makers: dict[str, Callable[[], torch.optim.lr_scheduler.LRScheduler]] = {
        "constant": lambda: lr.ConstantLR(optimizer, factor=1.0),
        "linear": lambda: lr.LambdaLR(optimizer, lambda step: 1 - step / STEPS),
        "cosine": lambda: lr.CosineAnnealingLR(optimizer, STEPS),
        "step": lambda: lr.StepLR(optimizer, STEPS // EPOCHS, gamma=0.5),
        "one_cycle": lambda: lr.OneCycleLR(
            optimizer, peak, total_steps=STEPS, pct_start=0.3, div_factor=25, cycle_momentum=False
        ),
    }
    return makers[name]()


ROWS = 60
"""Of which 50 train: five whole batches in each epoch, so that a schedule by epochs has whole steps."""


def many_runs(options: dict[str, Any]) -> None:
    """A training function whose ranks do one run of the engine after the other."""
    session = lepton_ray.training.session()
    model = session.prepare(torch.nn.Linear(1, 1))
    for name in options["runs"]:
        found = run_here(options["folder"], name, RUNS[name], rows=ROWS)
        if session.rank == 0:
            np.savez(Path(options["folder"]) / f"{name}.npz", **found["weights"])
    model(torch.ones(1, 1)).sum().backward()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(600)
def test_two_ranks_compute_what_one_process_computes(tmp_path: Path, file_store: Store) -> None:
    """Every optimiser, every schedule, clipping, penalties, accumulation and FSDP2 equal plain torch on one process."""
    options = {"runs": list(RUNS), "folder": str(tmp_path)}
    lepton_ray.run_distributed(
        many_runs, {"run": "many", "training": {"workers": 2, "options": options}}, store=file_store
    )
    start = np.load(tmp_path / "sgd-constant.npz")
    for name, training in RUNS.items():
        found, wanted = np.load(tmp_path / f"{name}.npz"), plain(training)
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, rtol=2e-4, atol=2e-6, err_msg=f"{name}: {key}")
        if name != "sgd-constant":
            assert any(not np.array_equal(found[key], start[key]) for key in start), f"{name} is as sgd-constant"


class Samples(torch.utils.data.Dataset[Any]):
    """Noisy points on a line, the noise drawn when a sample is asked for."""

    def __len__(self) -> int:
        return 101

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([index / 101.0])
        return x, 3.0 * x + 0.1 * torch.randn(1)


def own_loop(options: dict[str, Any]) -> dict[str, Any]:
    """A usual PyTorch loop: model with dropout, optimiser, scheduler, an evaluation after each epoch."""
    session = lepton_ray.training.session()
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    model, optimizer, scheduler = session.prepare(model, optimizer, scheduler)
    for epoch in session.epochs(6):
        for x, y in session.batches(Samples(), 16):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x.to(session.device)), y.to(session.device))
            loss.backward()
            optimizer.step()
            session.log(loss=loss)
            marker = Path(options["folder"]) / "killed"
            if options["kill"] and session.step == 15 and session.rank == 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        scheduler.step()
        session.evaluated(error=float(loss.detach()) * 0 + epoch)
    return {"rate": optimizer.param_groups[0]["lr"], "step": session.step}


@pytest.mark.usefixtures("ray_cluster")
def test_a_loop_of_ones_own_resumes_exactly(tmp_path: Path, file_store: Store) -> None:
    """A rank of a user's own loop is killed; the run resumes by itself and ends with the same bits."""
    weights = {}
    for name, kill in (("calm", False), ("killed", True)):
        options = {"folder": str(tmp_path), "kill": kill}
        training = {"workers": 2, "checkpoint": {"every_steps": 5}, "options": options}
        result = lepton_ray.run_distributed(own_loop, {"run": name, "training": training}, store=file_store)
        assert result.step == 6 * 7
        assert result.samples_exact
        assert result.record["devices"] == ["cpu, 1 threads"] * 2
        assert result.metrics == {"error": 5.0}
        assert result.record["value"] == {"rate": 0.01 * 0.5**3, "step": 42}
        assert result.generations == (2 if kill else 1)
        weights[name] = final_checkpoint(file_store, result).files["model.safetensors"]
        again = lepton_ray.run_distributed(own_loop, {"run": name, "training": training}, store=file_store)
        assert (again.resumed, again.step, again.generations) == (True, result.step, result.generations)
    assert weights["calm"] == weights["killed"]
    assert CheckpointStore(file_store, "killed", 1).newest() is not None


def two_arguments(first: Any, second: Any) -> None:
    """Not a training function."""


def test_own_loops_say_what_is_wrong(file_store: Store) -> None:
    """No function, two arguments, or a session outside of a run: told in one line, before anything starts."""
    with pytest.raises(UsageError, match="train_function is 3"):
        lepton_ray.run_distributed(3, store=file_store)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="takes 2 arguments"):
        lepton_ray.run_distributed(two_arguments, store=file_store)
    with pytest.raises(UsageError, match="run_distributed"):
        lepton_ray.training.session()
    assert json.dumps(file_store.list_names("runs")) == "[]"
