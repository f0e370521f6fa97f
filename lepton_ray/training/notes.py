"""The figures of one rank while it trains: each step's time at once, values on the device every few steps."""

from __future__ import annotations

import time

import torch

from lepton_ray.training.context import RankContext
from lepton_ray.training.history import PARTS


class Notes:
    """What a rank notes of its steps: to the recorder at once, to the history every `logging.every_steps`.

    Args:
        context: the rank's place in its run.
        start_step: steps that were done before.
        total_steps: steps of the whole run, as far as it is known.
    """

    def __init__(self, context: RankContext, start_step: int, total_steps: int) -> None:
        self._context, self._total_steps = context, total_steps
        self._recorder = recorder = context.recorder
        self._every = context.training.logging.every_steps
        self._last = self._since = time.perf_counter()
        self._losses: list[torch.Tensor] = []
        self._steps = self._rows = 0
        self._parts = context.ledger.clock.totals()
        if context.leads:
            recorder.set("lepton_training_world_size", context.world_size)
            recorder.set("lepton_training_total_steps", total_steps)
            recorder.set("lepton_training_step", start_step)
            if context.restart_cause:
                recorder.count("lepton_training_restarts_total", cause=context.restart_cause)

    def step(self, done: int, rows: int, global_rows: int, *, loss: torch.Tensor | None = None, again: bool) -> bool:
        """Note one step; whether it is time to note values too (`interval`).

        Args:
            done: steps of the run that are done now.
            rows: this rank's rows of the step.
            global_rows: rows of all ranks.
            loss: this rank's loss of the step, left on the device.
            again: whether an earlier generation had done this step already.
        """
        now = time.perf_counter()
        self._recorder.step(done, now - self._last, rows, replayed=again)
        self._last = now
        if not self._context.leads:
            return False
        self._steps += 1
        self._rows += global_rows
        if loss is not None:
            self._losses.append(loss)
        return done % self._every == 0 or done == self._total_steps

    def nonfinite(self) -> None:
        """Note a step that was skipped by all ranks because a loss or gradient was not finite."""
        if self._context.leads:
            self._recorder.count("lepton_training_nonfinite_steps_total")

    def skip(self) -> None:
        """Leave the time since the last step (an evaluation) out of the step times."""
        now = time.perf_counter()
        self._since += now - self._last
        self._last = now

    def interval(self, done: int, epoch: int, left: int, *, collective_s: float = 0.0, **figures: float) -> None:
        """Rank 0: note the steps since the last interval.

        Args:
            done: steps of the run that are done.
            epoch: epochs that are complete.
            left: rows that are still to be trained on.
            collective_s: seconds that backward waited for other ranks since the last interval.
            figures: other values by name; `learning_rate` and `gradient_norm` are exported too.
        """
        recorder, steps = self._recorder, max(1, self._steps)
        if self._losses:
            # rank 0's own share of the batch, scaled so that its expectation is the loss of the global batch
            figures["loss"] = float(torch.stack(self._losses).mean())
        speed = self._rows / max(self._last - self._since, 1e-9)
        for name in ("loss", "learning_rate", "gradient_norm"):
            if name in figures:
                recorder.set(f"lepton_training_{name}", figures[name])
        recorder.set("lepton_training_samples_per_second", speed)
        recorder.set("lepton_training_epoch", epoch)
        recorder.set("lepton_training_eta_seconds", left / max(speed, 1e-9))
        parts = self._context.ledger.clock.totals()
        figures |= {name: (parts[name] - self._parts[name]) / steps for name in PARTS if name in parts}
        figures["collective"] = collective_s / steps
        self._context.history.note(done, epoch, {**figures, "samples_per_second": speed})
        self._losses, self._steps, self._rows = [], 0, 0
        self._parts, self._since = parts, self._last
