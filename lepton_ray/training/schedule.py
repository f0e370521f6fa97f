"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from lepton_ray.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of `total_steps`.

    A linear rise over the first `warmup` share of the steps, then constant or a half cosine down to 0
    (Loshchilov and Hutter 2017, without restarts).
    """
    warmup = settings.warmup * total_steps
    rate = settings.learning_rate
    if step < warmup:
        return rate * (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return rate
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    return rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
