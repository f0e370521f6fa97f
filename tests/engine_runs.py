"""Whole runs of the engine on the ranks of one process group: many of them for the price of one start of the ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist
from digits_slice import digits_slice, small_settings
from safetensors.torch import load as load_tensors

from lepton_ray.data.split import split_rows
from lepton_ray.settings import Settings
from lepton_ray.storage import open_store
from lepton_ray.tasks import find_task
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.collectives import broadcast_bytes
from lepton_ray.training.context import RankContext
from lepton_ray.training.initialisation import check_initial
from lepton_ray.training.lease import RunLease
from lepton_ray.training.loop import train
from lepton_ray.training.plan import RankPlan
from lepton_ray.training.rank import Rank
from lepton_ray.training.state import whole_weights

CPU = torch.device("cpu")
CREATED_AT = 1.0


def halves(settings: Settings, rows: int = 64) -> tuple[pa.Table, pa.Table]:
    """Rows to train on and rows held out, of the real digits."""
    table = digits_slice(rows)
    split = split_rows(table, settings.data.split)
    return table.take(split.train), table.take(split.held_out)


def still(settings: Settings) -> Settings:
    """The settings without augmentation and dropout, and with a stratified split."""
    options = {"width": 8, "dropout": 0.0, "rotate": 0.0, "scale": 0.0, "shift": 0.0}
    split = settings.data.split.model_copy(update={"by": "stratified"})
    return settings.model_copy(update={
        "task": settings.task.model_copy(update={"options": options}),
        "data": settings.data.model_copy(update={"split": split}),
    })  # fmt: skip


def run_here(
    folder: str,
    name: str,
    training: Mapping[str, Any],
    *,
    rows: int = 64,
    task: str | None = None,
    local_rank: int | None = None,
) -> Any:
    """Train on the ranks of the present process group; what the loop gave, with the final weights, on each rank.

    Args:
        folder: of the store and of scratch files.
        name: of the run.
        training: settings beside those of `small_settings`.
        rows: of the real digits.
        task: another task than image classification (see `tasks_for_tests`).
        local_rank: number of this rank on its node; None where all are on one.
    """
    os.environ["LOCAL_RANK"] = str(dist.get_rank() if local_rank is None else local_rank)
    settings = still(small_settings(name, **training))
    if task is not None:
        import tasks_for_tests  # noqa: F401 - makes its tasks known

        settings = settings.model_copy(update={"task": settings.task.model_copy(update={"name": task})})
    store = open_store((Path(folder) / "store").as_uri())
    known = find_task(settings.task.name, settings.task.options)
    train_rows, held_out = halves(settings, rows)
    transforms = known.fit(train_rows)
    lease = RunLease.acquire(store, name) if dist.get_rank() == 0 else None
    attempt = int(broadcast_bytes(str(lease.attempt).encode() if lease else None, CPU))
    try:
        initial = check_initial(settings.training.initial, known, transforms, store)
        context = RankContext(RankPlan(settings, store.uri, attempt, transforms, "", CREATED_AT, initial), CPU)
        rank = Rank(context, train_rows, held_out, Path(folder) / f"scratch-{name}")
        start, finished = rank.step, False
        try:
            outcome = train(rank)
            finished = True
        except BaseException as error:
            rank.salvage(error)
            raise
        finally:
            rank.close(finished=finished)
            context.close()
        files = CheckpointStore(store, name, attempt).load(outcome["step"]).files
        history = rank.context.history
        weights = load_tensors(whole_weights(files))
        return {
            **outcome, "start": start, "weights": {name: value.numpy() for name, value in weights.items()},
            "evaluations": history.evaluations, "state": json.loads(files["state.json"]),
        }  # fmt: skip
    finally:
        if lease is not None:
            lease.release()


def reference(training: Mapping[str, Any], move: Any, *, rows: int = 64, steps: int) -> dict[str, npt.NDArray[Any]]:
    """The weights that a plain single-process torch loop gives after `steps` steps on the same batches.

    Args:
        training: as for `run_here`; augmentation and dropout must be off.
        move: called with the model before the first step; gives what is called after each backward.
        rows: of the real digits.
        steps: number of steps.
    """
    from lepton_ray.data.order import SampleOrder

    settings = still(small_settings("reference", **training))
    task = find_task(settings.task.name, settings.task.options)
    train_rows, _ = halves(settings, rows)
    transforms = task.fit(train_rows)
    inputs, targets = task.inputs(train_rows, transforms), task.targets(train_rows, transforms)
    torch.manual_seed(settings.training.seed)
    model = task.build(transforms)
    after_backward = move(model)
    order = SampleOrder(len(inputs), settings.training.seed)
    size = settings.training.global_batch
    for step in range(steps):
        ids = torch.from_numpy(order.sample_ids(step * size, size).astype(np.int64))
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(inputs[ids]), targets[ids]).backward()
        after_backward()
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
