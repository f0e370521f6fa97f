"""The learning rate as a pure function of the step: nothing to save, nothing to restore.

Only `plateau` looks at the deciding metric; its one number lives in `Plateau`, which goes into checkpoints.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from lepton_ray.settings.training import OptimizerSettings, ScheduleSettings

Direction = Literal["max", "min"]
ONE_CYCLE_END = 1e4
"""`one_cycle` ends at its start divided by this: torch's `final_div_factor`."""


def learning_rate(
    settings: OptimizerSettings, step: int, total_steps: int, steps_per_epoch: float, plateau: float = 1.0
) -> float:
    """The learning rate of optimiser step `step` (from 0) of `total_steps`, before a group's factor.

    With w = `warmup` x `total_steps`, the first w steps rise in a line: step s has (s + 1) / (w + 1) of what follows.
    After it `constant` and `plateau` stay, `linear` and `cosine` (Loshchilov and Hutter 2017, without restarts) fall to
    `final` at step `total_steps`, `step` falls by `factor` at every `step_epochs` epochs from the run's start.
    `one_cycle` (Smith and Topin 2018) is `torch.optim.lr_scheduler.OneCycleLR` with cosine annealing.

    Args:
        settings: the optimiser's branch of the tree.
        step: optimiser steps that are done.
        total_steps: optimiser steps of the whole run.
        steps_per_epoch: rows / global batch; no whole number where batches run over the end of an epoch.
        plateau: `Plateau.factor`, looked at by `plateau` alone.
    """
    schedule, peak = settings.schedule, settings.learning_rate
    if schedule.name == "one_cycle":
        return peak * _one_cycle(schedule, step, total_steps)
    return peak * _warmed_up(schedule, step, total_steps) * _fall(schedule, step, total_steps, steps_per_epoch, plateau)


def _warmed_up(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    warmup = schedule.warmup * total_steps
    return (step + 1) / (warmup + 1) if step < warmup else 1.0


def _fall(schedule: ScheduleSettings, step: int, total_steps: int, steps_per_epoch: float, plateau: float) -> float:
    """What is left of the peak, warm-up aside."""
    warmup = schedule.warmup * total_steps
    progress = min(1.0, max(0.0, (step - warmup) / max(1.0, total_steps - warmup)))
    match schedule.name:
        case "linear":
            return 1.0 - (1.0 - schedule.final) * progress
        case "cosine":
            return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "step":
            epoch = math.floor(step / steps_per_epoch + 1e-9)  # 125 / (1000 / 96) must not become 11.99...
            return float(schedule.factor ** (epoch // schedule.step_epochs))
        case "plateau":
            return plateau
        case _:
            return 1.0


def _one_cycle(schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    """From `start` to 1 over the `warmup` share, then down to `start` / 10,000 at the last step."""
    top, last = schedule.warmup * total_steps - 1.0, total_steps - 1.0
    if step < top:
        return _annealed(schedule.start, 1.0, step / top)
    progress = (step - top) / max(last - top, 1e-9)
    return _annealed(1.0, schedule.start / ONE_CYCLE_END, min(1.0, progress))


def _annealed(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at 1."""
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * progress))


class Plateau:
    """The factor of schedule `plateau`: smaller whenever the deciding metric stands still.

    As `torch.optim.lr_scheduler.ReduceLROnPlateau` with a relative threshold: after more than `patience` evaluations in
    a row without a better value, the factor is multiplied by `factor`, down to `final`, and counting starts anew. All
    ranks see the same values, so all have the same factor. With another schedule the factor stays 1.

    Args:
        settings: the schedule's branch of the tree.
        direction: whether more or less of the metric is better.
    """

    def __init__(self, settings: ScheduleSettings, direction: Direction) -> None:
        self._settings, self._sign = settings, 1.0 if direction == "max" else -1.0
        self.factor = 1.0
        """What is left of the learning rate."""
        self._best: float | None = None
        self._waited = 0

    def evaluated(self, value: float) -> None:
        """Take one evaluation's value of the deciding metric in; NaN is never better."""
        if self._settings.name != "plateau":
            return
        if self._better(value):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited > self._settings.patience:
            self.factor = max(self.factor * self._settings.factor, self._settings.final)
            self._waited = 0

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"factor": self.factor, "best": self._best, "waited": self._waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self.factor, self._best, self._waited = float(state["factor"]), state["best"], int(state["waited"])

    def _better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self._best is None:
            return True
        return self._sign * (value - self._best) > self._settings.min_delta * abs(self._best)
