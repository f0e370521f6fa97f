"""Search for good settings: the only room that knows Ray Tune.

Holds: the space and its checks, the draws (grid, random, Optuna), the schedulers (ASHA, population based training), the
journal that makes a search resumable, and the actor in which a trial runs.
Never: how a model is trained. A trial is a function that the caller hands in; training is a neighbour that this room
does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lepton_ray.tuning.trials import Evaluation, Outcome, Trial

if TYPE_CHECKING:
    from lepton_ray.tuning.tuner import Tuning, TuningResult

__all__ = ["Evaluation", "Outcome", "Trial", "Tuning", "TuningResult"]


def __getattr__(name: str) -> Any:
    """What needs Ray, on first use."""
    if name in ("Tuning", "TuningResult"):
        from lepton_ray.tuning import tuner

        return getattr(tuner, name)
    raise AttributeError(f"module 'lepton_ray.tuning' has no attribute {name!r}")
