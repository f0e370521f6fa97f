"""The task's figures over the held-out rows, computed by all ranks: equal bit for bit to those of one process.

Batches, not rows, are dealt out: batch b of the whole goes to rank b % world size. A rank's outputs for a batch then
have the same bits at any world size, and `lepton_ray.tasks.measuring` joins what ranks keep of them without rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from lepton_ray.errors import UsageError
from lepton_ray.tasks import AnyTask
from lepton_ray.tasks.measuring import EVALUATION_BATCH, Evaluation, Measures, joined
from lepton_ray.training.collectives import broadcast_bytes, gather_bytes


class Rows(Protocol):
    """Rows of which any batch can be taken, the same ones on every rank."""

    def __len__(self) -> int:
        """How many."""

    def take(self, ids: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the rows `ids` (shape `[n]`), in that order, on the model's device."""


@torch.no_grad()  # not inference mode: sharded models gather weights that training goes on to use
def evaluate(
    task: AnyTask,
    model: torch.nn.Module,
    rows: Rows,
    transforms: Mapping[str, Any],
    device: torch.device,
    *,
    distributed: bool = True,
    batch: int = EVALUATION_BATCH,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Evaluation:
    """Evaluate a model in evaluation mode; it is put back into the mode it was in.

    All ranks call it together and get the same result, to the bit, whatever machines they run on.

    Args:
        task: says what is measured.
        model: whatever is called forward. Each rank calls it equally often, so it may be one that needs all ranks.
        rows: all held-out rows, on every rank.
        transforms: the fitted transforms.
        device: of the model.
        distributed: share the batches among the ranks of the process group; otherwise this process does all.
        batch: rows computed together.
        autocast: makes the context in which the model runs.

    Raises UsageError where there are no rows.
    """
    if not len(rows):
        raise UsageError(f"evaluation of task {task.name}: there are no rows; hold some out (data.split.held_out)")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    measures = Measures(task, transforms, device)
    batches = -(-len(rows) // batch)
    training = model.training
    model.eval()
    try:
        for number in range(rank, -(-batches // world_size) * world_size, world_size):
            # a rank that has no batch left keeps step with the others on one row that does not count
            first, last = (number * batch, min((number + 1) * batch, len(rows))) if number < batches else (0, 1)
            inputs, targets = rows.take(np.arange(first, last, dtype=np.int64))
            with autocast():
                outputs = model(inputs)
            if number < batches:
                measures.update(number, outputs, targets)
    finally:
        model.train(training)
    if not distributed:
        return joined(task, transforms, [measures.state()])
    states = gather_bytes(measures.state(), device)
    # one rank computes for all: ranks on other processors might round otherwise and then decide otherwise
    result = joined(task, transforms, states).dumps() if rank == 0 else None
    return Evaluation.loads(broadcast_bytes(result, device))
