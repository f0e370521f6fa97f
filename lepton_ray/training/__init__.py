"""Distributed training: the only room that knows Ray Train.

Holds: the trainer and `run_distributed` (what the driver does), the loop and the session (what each rank does), how a
model is spread, moved and initialised, verified checkpoints and hot copies, the lease and attempt token that fence two
drivers of one run.
Never: what a model is (tasks), where bytes live (storage), how metrics are exposed (monitoring), serving.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_ray.training.distributed import run_distributed
    from lepton_ray.training.own_loop import Session
    from lepton_ray.training.trainer import Trainer, TrainingResult

__all__ = ["Session", "Trainer", "TrainingResult", "run_distributed", "session"]
_HOMES = {"Session": "own_loop", "Trainer": "trainer", "TrainingResult": "trainer", "run_distributed": "distributed"}


def session() -> Session:
    """The session of the training function that runs in this process; see `run_distributed`.

    Raises UsageError outside of one.
    """
    from lepton_ray.training.own_loop import current_session

    return current_session()


def __getattr__(name: str) -> Any:
    """The rest on first use: ranks import this room without what only the driver needs."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"lepton_ray.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lepton_ray.training' has no attribute {name!r}")
