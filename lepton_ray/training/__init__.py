"""Distributed training: the only room that knows Ray Train.

Holds: the trainer (what the driver does), the loop (what each rank does), verified checkpoints, the lease and attempt
token that fence two drivers of one run.
Never: what a model is (tasks), where bytes live (storage), how metrics are exposed (monitoring), serving.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_ray.training.trainer import Trainer, TrainingResult

__all__ = ["Trainer", "TrainingResult"]


def __getattr__(name: str) -> Any:
    """The trainer on first use: ranks import this room without what only the driver needs."""
    if name in __all__:
        from lepton_ray.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'lepton_ray.training' has no attribute {name!r}")
