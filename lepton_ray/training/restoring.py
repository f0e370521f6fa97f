"""Back to a verified checkpoint, all ranks together: what one rank cannot read, no rank uses.

A whole checkpoint is read once, by rank 0, and sent to all. Of a sharded one each rank reads the files that hold its
rows (its own file where the world size is the same), so that no rank ever holds more than it needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from lepton_ray.errors import IntegrityError, LeptonError, NotFoundError, UnavailableError
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.collectives import broadcast_bytes, gather_bytes
from lepton_ray.training.parallel import Parallel
from lepton_ray.training.shards import file_name, files_for
from lepton_ray.training.state import MEMORY, Average, unpack


@dataclass(frozen=True)
class Restored:
    """What all ranks were brought back to."""

    step: int
    """Optimiser steps that are done; 0 where there was no checkpoint."""
    state: dict[str, Any]
    """What was packed with the tensors (`state.json`); empty where there was no checkpoint."""
    skipped: list[str] = field(default_factory=list)
    """Newer checkpoints that were passed over, each with the reason."""


def restore(
    checkpoints: CheckpointStore,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer | None,
    average: Average | None = None,
) -> Restored:
    """Restore the newest checkpoint that verifies on every rank; a collective.

    Raises UnavailableError, on all ranks, where storage does not answer: that is no reason to start over. Raises
    IntegrityError where a checkpoint that verifies does not fit the model.
    """
    skipped: list[str] = []
    lead = parallel.rank == 0
    steps = shared(parallel, checkpoints.steps if lead else _nothing)
    for step in reversed(steps):
        try:
            manifest = shared(parallel, partial(checkpoints.manifest, step) if lead else _nothing)
            files = _files(checkpoints, parallel, step, manifest)
        except NotFoundError:
            skipped.append(f"step {step}: not committed")
        except IntegrityError as error:
            skipped.append(f"step {step}: {error}")
        else:
            return Restored(step, unpack(files, parallel, optimizer, average), skipped)
    return Restored(0, {}, skipped)


def _files(checkpoints: CheckpointStore, parallel: Parallel, step: int, manifest: dict[str, Any]) -> dict[str, bytes]:
    """The files that this rank needs. Raises, on all ranks alike, IntegrityError or UnavailableError."""
    names = list(manifest["files"])
    apart = [name for name in names if name.startswith(f"{MEMORY}-rank") or (parallel.sharded and "-rank" in name)]
    apart = [name for name in apart if name.endswith(".safetensors")]
    common = [name for name in names if name not in apart]
    files: dict[str, bytes] = {}
    read = _together(parallel, lambda: checkpoints.read(step, manifest, common) if parallel.rank == 0 else {})
    for name in common:
        files[name] = broadcast_bytes(read.get(name), parallel.device)
    mine = [name for name in files_for(files, parallel.rank, parallel.world_size) if name in apart]
    if file_name(MEMORY, parallel.rank) in apart:
        mine.append(file_name(MEMORY, parallel.rank))
    files.update(_together(parallel, lambda: checkpoints.read(step, manifest, mine)))
    return files


def shared(parallel: Parallel, read: Callable[[], Any]) -> Any:
    """What rank 0 read, as JSON, on all ranks; what it raised is raised on all."""
    value = _together(parallel, read)
    return json.loads(broadcast_bytes(json.dumps(value).encode() if parallel.rank == 0 else None, parallel.device))


def _nothing() -> None:
    """What the ranks read that are told by rank 0."""


def _together(parallel: Parallel, read: Callable[[], Any]) -> Any:
    """What this rank read, if no rank failed; else the first failure, on all ranks."""
    value, failure = None, None
    try:
        value = read()
    except LeptonError as error:
        failure = error
    told = json.dumps([type(failure).__name__, str(failure)]) if failure is not None else ""
    for rank, part in enumerate(gather_bytes(told.encode(), parallel.device)):
        if part:
            kind, words = json.loads(part)
            where = "" if rank == 0 else f"rank {rank}: "
            raise _KINDS.get(kind, LeptonError)(f"{where}{words}") from failure
    return value


_KINDS: dict[str, type[LeptonError]] = {
    kind.__name__: kind for kind in (IntegrityError, NotFoundError, UnavailableError)
}
"""What a failure of one rank is raised as on all."""
