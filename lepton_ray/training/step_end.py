"""The end of a step: what all ranks find out there together, and what follows from it.

Most steps end without a word between ranks. Every so many they agree (`agreement`): whether some rank will be taken
away (`preemption`), how often a checkpoint pays (`interval`), and whether all hold the same weights (`divergence`).
"""

from __future__ import annotations

import collections
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Literal

import torch

from lepton_ray.monitoring.incidents import Incident, report
from lepton_ray.training import notices
from lepton_ray.training.agreement import Agreement, StepTimes, steps_between
from lepton_ray.training.checkpoint_writer import CheckpointWriter
from lepton_ray.training.collectives import gather_bytes
from lepton_ray.training.context import RankContext
from lepton_ray.training.digests import digest_of
from lepton_ray.training.divergence import Diverged, odd_ranks
from lepton_ray.training.interval import best_interval, in_steps
from lepton_ray.training.preemption import grace_needed

_log = logging.getLogger(__name__)
Verdict = Literal["go_on", "preempted", "diverged"]


class StepEnd:
    """The end of each step of one rank; every rank makes one and calls it alike.

    Args:
        context: the rank's place in its run.
        writer: of the rank's checkpoints.
        compares: whether all ranks hold the same weights, so that they can be compared.
    """

    def __init__(self, context: RankContext, writer: CheckpointWriter, *, compares: bool) -> None:
        self._context, self._writer = context, writer
        self._settings = context.training.checkpoint
        self._compare_every = context.training.divergence_every_steps if compares and context.world_size > 1 else 0
        self._agreement = Agreement(context.device, leads=context.leads)
        self._times = StepTimes()
        self._costs: collections.deque[float] = collections.deque(maxlen=8)
        self._checkpoint_steps = 0
        self._saved_step = 0
        self._diverged_step = 0
        self._short = False
        self.makes_room = False
        """Whether the ranks agreed to leave at their next checkpoint, for a larger group."""
        self._started = self._mark = time.perf_counter()

    def begin(self, step: int) -> None:
        """The run is at this step now, having been restored; the same on all ranks."""
        self._agreement.begin(step)
        self._saved_step = step
        self._mark = time.perf_counter()

    def checkpoint_due(self, step: int) -> bool:
        """Whether `training.checkpoint.every_steps` asks for a checkpoint after this step; the same on all ranks."""
        every = self._settings.every_steps
        if every == "auto":
            return 0 < self._checkpoint_steps <= step - self._saved_step
        return step % every == 0

    def saved(self, step: int, cost_s: float) -> None:
        """A checkpoint of this step was handed to the writer, for which training waited so many seconds."""
        self._saved_step = step
        self._costs.append(cost_s)
        self._mark = time.perf_counter()

    def meet(
        self, step: int, tensors: Callable[[], Iterable[torch.Tensor]], *, saving: bool, doubtful: bool = False
    ) -> Verdict:
        """After each step: meet the other ranks if it is time to; the same on all ranks.

        Args:
            step: steps that are done.
            tensors: gives what is equal on all ranks.
            saving: the state of this step is about to be kept, so it is compared first.
            doubtful: the step was not finite, which a wrong weight may be the reason for: compare now.

        Raises Diverged, on all ranks, where the ranks were found to differ here once before.
        """
        self._times.add(time.perf_counter() - self._mark)
        every = self._compare_every
        compare = every > 0 and (saving or doubtful or step % every == 0)
        verdict: Verdict = "go_on"
        if not compare and self._agreement.due(step):
            verdict = self._met(step, None)
            compare = verdict == "preempted" and every > 0  # what they leave behind is a checkpoint
        if compare:
            verdict = self._met(step, digest_of(tensors(), self._context.device))
        self._mark = time.perf_counter()
        return verdict

    def _met(self, step: int, digest: torch.Tensor | None) -> Verdict:
        agreed = self._agreement.meet(
            step,
            preempted=notices.preempted() is not None,
            grow=notices.asked_for_room(),
            every_steps=steps_between(self._times.usual),
            checkpoint_steps=self._proposal(),
            digest=digest,
        )
        self._checkpoint_steps = agreed.checkpoint_steps
        self.makes_room = self.makes_room or agreed.grow
        if self._context.leads:
            self._show()
        if digest is not None and not agreed.same:
            self._diverged(step, digest)
            return "diverged"
        return "preempted" if agreed.preempted else "go_on"

    def _proposal(self) -> int:
        """Rank 0: steps between two checkpoints; 0 where that is not known yet or is not asked."""
        every, step_s = self._settings.every_steps, self._times.usual
        if every != "auto":
            return every
        if step_s is None or not self._context.leads:
            return 0
        if not self._costs:  # the first one measures
            return in_steps(self._settings.min_s, step_s)
        world_size = self._context.world_size
        failures = self._context.failures.and_then((time.perf_counter() - self._started) * world_size)
        best = best_interval(
            statistics.median(self._costs),
            failures.mean_time_between(world_size),
            commit_s=statistics.median(self._writer.commit_s or [0.0]),
            least_s=self._settings.min_s,
            most_s=self._settings.max_s,
        )
        return in_steps(best, step_s)

    def _show(self) -> None:
        """Rank 0: note the interval and the grace that a preemption would need, and warn where there is less."""
        set_, step_s = self._context.recorder.set, self._times.usual
        if step_s is None or not self._checkpoint_steps:
            return
        set_("lepton_checkpoint_interval_steps", self._checkpoint_steps)
        set_("lepton_checkpoint_interval_seconds", self._checkpoint_steps * step_s)
        if not (self._costs and self._writer.commit_s):
            return
        save_s, grace = max(self._costs) + max(self._writer.commit_s), self._settings.grace_s
        needed = grace_needed(self._agreement.every_steps * step_s, self._times.slowest, save_s)
        set_("lepton_preemption_grace_needed_seconds", needed)
        if needed > grace and not self._short:
            self._context.say("grace too short", needed_s=round(needed, 1), grace_s=grace)
            _log.warning(
                "a preemption would need %.1f s to commit its checkpoint, training.checkpoint.grace_s is %.1f; give "
                "the pods a longer terminationGracePeriodSeconds, and say so in training.checkpoint.grace_s",
                needed,
                grace,
            )
        self._short = needed > grace

    def _diverged(self, step: int, digest: torch.Tensor) -> None:
        """All ranks: find out who is wrong, and tell it. Raises Diverged where going back did not help."""
        context = self._context
        parts = gather_bytes(json.dumps(digest.tolist()).encode(), context.device)
        digests = [tuple(json.loads(part)) for part in parts]
        odd = odd_ranks(digests)
        all_of_them = len(odd) == len(digests)
        who = "no majority says which is right" if all_of_them else f"the odd one: rank {', '.join(map(str, odd))}"
        words = f"after step {step} the weights of the {len(digests)} ranks are not equal bit for bit ({who})"
        again, self._diverged_step = step <= self._diverged_step, max(step, self._diverged_step)
        context.say("diverged", step=step, odd_ranks=odd, again=again)
        if context.leads:
            report(context.store, context.run, Incident(
                kind="divergence", reason=words, attempt=context.plan.attempt, generation=context.generation,
                rank=odd[0] if len(odd) == 1 else None, step=step,
                evidence={"odd_ranks": odd, "digests": [[f"{word % 2**64:016x}" for word in one] for one in digests]},
            ))  # fmt: skip
        if again:
            raise Diverged(
                f"run {context.run}: {words}, and were not when they came here before; replace the machine, or where "
                "the ranks run on unlike machines set training.divergence_every_steps to 0"
            )
