"""What evaluations and non-finite steps decide: rate, best model, early end. Part of every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lepton_ray.settings import TrainingSettings
from lepton_ray.training.nonfinite import NonFinite
from lepton_ray.training.schedule import Plateau
from lepton_ray.training.stopping import Best, Stopping

PARTS = ("plateau", "stopping", "best", "nonfinite")
Decides = tuple[str, Literal["max", "min"]]


class Controls:
    """The decisions of one run; every rank has the same, since every rank is told the same metrics.

    Args:
        settings: the training branch.
        decides: the metric by which the task decides, and its direction.
        watched: the metric of early stopping and its direction.
    """

    def __init__(self, settings: TrainingSettings, decides: Decides, watched: Decides) -> None:
        self._decides, self._watched = decides, watched
        self.plateau = Plateau(settings.optimizer.schedule, decides[1])
        self.stopping = Stopping(settings.stopping, watched[1], watched[0])
        self.best = Best(decides[1])
        self.nonfinite = NonFinite(settings.max_nonfinite)

    @property
    def stopped(self) -> str | None:
        """Why training ends before its last step; None while it goes on."""
        return self.stopping.reason

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation into account; whether it is the best so far.

        Args:
            step: steps that are done.
            metrics: value by name over the held-out rows; one that is undefined there is missing.
        """
        value = metrics.get(self._decides[0], math.nan)
        self.plateau.evaluated(value)
        self.stopping.evaluated(metrics.get(self._watched[0], math.nan))
        return self.best.evaluated(step, value)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {name: getattr(self, name).to_json() for name in PARTS}

    def restore(self, value: Mapping[str, Any]) -> None:
        """Take back what `to_json` gave."""
        for name in PARTS:
            getattr(self, name).restore(value[name])
