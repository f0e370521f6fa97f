"""What is learnt: the `Task` interface, the tasks shipped, and the predictor that applies a trained one.

Holds: how rows become tensors, the model, the loss, the metrics, the request and the answer, one file per task, found
by name through the entry point group `lepton_ray.tasks`.
Never: loops, Ray, storage, HTTP. A task is called by training and by serving and knows neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lepton_ray.tasks.task import AnyTask, Task, find_task

if TYPE_CHECKING:
    from lepton_ray.tasks.predictor import Predictor, load_weights

__all__ = ["AnyTask", "Predictor", "Task", "find_task", "load_weights"]


def __getattr__(name: str) -> Any:
    """What computes, imported on first use: the driver of a run checks and fits without torch."""
    if name in ("Predictor", "load_weights"):
        from lepton_ray.tasks import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module 'lepton_ray.tasks' has no attribute {name!r}")
