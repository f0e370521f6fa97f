"""When training ends before its last epoch, and which step was the best.

Both take values and return a decision; the loop acts. All ranks see the same values, so all decide alike.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from lepton_ray.settings.training import StoppingSettings

Direction = Literal["max", "min"]


class Stopping:
    """Early stopping by patience and by target.

    Args:
        settings: the stopping branch of the tree.
        direction: whether more or less of the watched metric is better.
        metric: its name, for the reason; None takes `settings.metric`.
    """

    def __init__(self, settings: StoppingSettings, direction: Direction, metric: str | None = None) -> None:
        self._settings = settings
        self._sign = 1.0 if direction == "max" else -1.0
        self._name = metric or settings.metric or "the metric"
        self.reason: str | None = None
        """Why training ended, or None; kept in checkpoints, so that a resumed run ends at the same step."""
        self._best: float | None = None
        self._waited = 0

    def evaluated(self, value: float) -> str | None:
        """Take one evaluation's value in; returns the reason to stop, one sentence, or None.

        A value is better when it is more than `min_delta` from the best so far in the right direction; NaN never is.
        """
        settings = self._settings
        if self._better(value):
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        if settings.target is not None and self._sign * (value - settings.target) >= 0.0:
            self.reason = f"{self._name} is {value:.6g} and meets the target {settings.target:.6g}"
        elif settings.patience is not None and self._waited >= settings.patience:
            best = "no value yet" if self._best is None else f"the best, {self._best:.6g}"
            self.reason = f"{self._name} has not been better than {best}, in {self._waited} evaluations"
        return self.reason

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self._best, "waited": self._waited, "reason": self.reason}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self._best, self._waited, self.reason = state["best"], int(state["waited"]), state["reason"]

    def _better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        return self._best is None or self._sign * (value - self._best) > self._settings.min_delta


class Best:
    """The step with the best value so far; of equal ones the first.

    Args:
        direction: whether more or less of the deciding metric is better.
    """

    def __init__(self, direction: Direction) -> None:
        self._sign = 1.0 if direction == "max" else -1.0
        self.step: int | None = None
        """Steps that were done at the best value; None before the first."""
        self.value: float | None = None
        """The best value."""

    def evaluated(self, step: int, value: float) -> bool:
        """Take the value after `step` steps in; whether it is the best so far. NaN never is.

        A step that is evaluated again (after going back) counts once: an equal value is not better.
        """
        if math.isnan(value) or (self.value is not None and self._sign * (value - self.value) <= 0.0):
            return False
        self.step, self.value = step, value
        return True

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step, "value": self.value}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self.step, self.value = state["step"], state["value"]
