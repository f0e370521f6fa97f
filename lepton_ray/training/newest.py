"""The newest state that a worker group can start from: hot copies in its nodes' memory, or a verified checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lepton_ray.training.collectives import broadcast_bytes
from lepton_ray.training.context import RankContext
from lepton_ray.training.hot_copies import HotCopies, Planned
from lepton_ray.training.parallel import Parallel
from lepton_ray.training.restoring import restore, shared
from lepton_ray.training.state import STATE, Average, unpack


@dataclass(frozen=True)
class Newest:
    """What all ranks were brought back to."""

    state: dict[str, Any]
    """What was kept with the tensors; empty where there was nothing."""
    source: str
    """`hot copy`, `checkpoint` or `start`."""
    skipped: list[str] = field(default_factory=list)
    """Checkpoints that were passed over, each with the reason."""


def restore_newest(
    context: RankContext,
    hot: HotCopies | None,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer | None,
    average: Average | None,
    planned: Planned | None = None,
) -> Newest:
    """Restore the newest hot copy, or the newest verified checkpoint where that is newer; a collective."""
    if hot is not None:
        newest = shared(parallel, lambda: max(context.checkpoints.steps(), default=0) if context.leads else None)
        files = hot.newest(after=max(0, newest - 1), planned=planned)
        if files is not None:
            return Newest(unpack(files, parallel, optimizer, average), "hot copy")
    found = restore(context.checkpoints, parallel, optimizer, average)
    return Newest(found.state, "checkpoint" if found.state else "start", found.skipped)


def take_optimizer(context: RankContext, parallel: Parallel, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimiser's state (and the weights) of the run that `training.initial` names; a collective."""
    from lepton_ray.training.weight_sources import source_checkpoint

    def read() -> list[str]:
        if context.leads:
            files.update(source_checkpoint(context.plan.initial.source, context.store).files)
        return list(files)

    files: dict[str, bytes] = {}
    for name in shared(parallel, read):
        files[name] = broadcast_bytes(files.get(name), context.device)
    files[STATE] = files.get(STATE, b"{}")
    unpack(files, parallel, optimizer)
