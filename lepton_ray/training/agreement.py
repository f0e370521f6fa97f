"""The agreement step: now and then, at the end of a step, all ranks learn what any of them wants.

One all-reduce (MAX) of a few whole numbers. Between two of them nothing is sent, and nothing on a GPU is waited for: at
which steps the ranks meet follows from what they agreed on before, so that all of them come.
"""

from __future__ import annotations

import collections
import math
import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist

EVERY_S = 0.5
"""Seconds between two agreements, about."""
MOST_STEPS = 50
"""Steps between two agreements at most."""
MEASURED = 3
"""Steps of a worker group after which the time of a step is known; until then the ranks meet after each."""
RECENT = 64
"""Newest steps whose times are looked at."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after an agreement."""

    preempted: bool = False
    """Some rank was told that it will be taken away."""
    grow: bool = False
    """Some rank was told that there is room for more ranks."""
    same: bool = True
    """All digests are equal; True where none were given."""
    checkpoint_steps: int = 0
    """Steps between two checkpoints as rank 0 proposes them; 0 while it does not know."""


class StepTimes:
    """The times of the newest steps of this rank."""

    def __init__(self) -> None:
        self._seconds: collections.deque[float] = collections.deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        """A step took so long."""
        self._seconds.append(seconds)

    @property
    def usual(self) -> float | None:
        """The median, in seconds; None until MEASURED steps are done."""
        return statistics.median(self._seconds) if len(self._seconds) >= MEASURED else None

    @property
    def slowest(self) -> float:
        """The longest, in seconds; what belongs to the step (an evaluation) counts."""
        return max(self._seconds, default=0.0)


def steps_between(step_s: float | None) -> int:
    """Steps from one agreement to the next, for steps of so many seconds; 1 where that is not known."""
    if step_s is None:
        return 1
    return min(MOST_STEPS, max(1, math.floor(EVERY_S / max(step_s, 1e-9))))


class Agreement:
    """Says when the ranks meet, and meets. Made by every rank, used by all of them alike.

    Args:
        device: of the process group's tensors.
        leads: whether this is rank 0, which proposes for all.
    """

    def __init__(self, device: torch.device, *, leads: bool) -> None:
        self._device, self._leads = device, leads
        self._next = 1
        self.every_steps = 1
        """Steps from the newest agreement to the next."""

    def begin(self, step: int) -> None:
        """The run is at this step now, having been restored; the same on all ranks. The next step ends in a meeting."""
        self._next, self.every_steps = step + 1, 1

    def due(self, step: int) -> bool:
        """Whether the ranks meet after `step` steps; the same on all of them."""
        return step >= self._next

    def meet(
        self,
        step: int,
        *,
        preempted: bool,
        grow: bool = False,
        every_steps: int = 1,
        checkpoint_steps: int = 0,
        digest: torch.Tensor | None = None,
    ) -> Agreed:
        """Meet after `step` steps; a collective, for which this rank waits.

        Args:
            step: steps that are done.
            preempted: this rank was told that it will be taken away.
            grow: this rank was told that there is room for more ranks.
            every_steps: rank 0: steps from here to the next agreement; of other ranks it is not looked at.
            checkpoint_steps: rank 0: steps between two checkpoints, likewise.
            digest: of this rank's weights, shape `[2]`, int64; given by all ranks or none.
        """
        proposals = [every_steps, checkpoint_steps] if self._leads else [0, 0]
        told = torch.tensor([int(preempted), int(grow), *proposals], dtype=torch.int64, device=self._device)
        if digest is not None:
            told = torch.cat([told, digest, ~digest])  # the largest complement is that of the smallest
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        any_preempted, any_grow, self.every_steps, every, *digests = told.tolist()
        self._next = step + self.every_steps
        half = len(digests) // 2
        same = all(most == ~least for most, least in zip(digests[:half], digests[half:], strict=True))
        return Agreed(bool(any_preempted), bool(any_grow), same, every)
