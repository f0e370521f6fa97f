"""Leaving before the end: what the ranks raise then, and how long a checkpoint would take in a preemption.

Nothing failed and no step is lost, so it is charged to nobody. How long it would take is predicted all along, so that a
grace that is too short is told before it is needed. Nothing here imports torch: the error is also read where no rank
runs.
"""

from __future__ import annotations

from typing import Any

from lepton_ray.errors import LeptonError

SAVE_FACTOR = 1.5
"""What the slowest of the last saves is multiplied by: storage is shared, and may be slower when many leave at once."""


class Preempted(LeptonError):  # noqa: N818 - it is no error that anybody made
    """The ranks left at the end of a step, because some were told that they will be taken away; not a failure.

    Args:
        run: name of the run.
        step: steps that are done.
        ranks: the ranks that were told.
        committed: whether the checkpoint of `step` was committed in time.
    """

    def __init__(self, run: str, step: int, ranks: tuple[int, ...], *, committed: bool) -> None:
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks)) or '?'}"
        what = "its checkpoint is committed" if committed else "its checkpoint was not committed in time"
        super().__init__(f"run {run}: {who} preempted; all ranks left after step {step}, {what}")
        self.run, self.step, self.ranks, self.committed = run, step, tuple(ranks), committed

    def __reduce__(self) -> tuple[Any, ...]:
        """How it crosses the border of a process: by what it was made of, not by its message."""
        return _again, (self.run, self.step, self.ranks, self.committed)


class MadeRoom(LeptonError):  # noqa: N818 - it is no error that anybody made
    """The ranks left after a checkpoint, because there is room for more of them; not a failure.

    Args:
        run: name of the run.
        step: steps that are done.
        world_size: ranks that left.
    """

    def __init__(self, run: str, step: int, world_size: int) -> None:
        super().__init__(f"run {run}: all {world_size} ranks left after step {step}: there is room for more")
        self.run, self.step, self.world_size = run, step, world_size

    def __reduce__(self) -> tuple[Any, ...]:
        """How it crosses the border of a process."""
        return MadeRoom, (self.run, self.step, self.world_size)


def _again(run: str, step: int, ranks: tuple[int, ...], committed: bool) -> Preempted:
    return Preempted(run, step, ranks, committed=committed)


def grace_needed(agreement_s: float, slowest_step_s: float, slowest_save_s: float) -> float:
    """Seconds from the notice of a preemption to a committed checkpoint, at the worst.

    The notice comes just after an agreement, the steps up to the next one are done, one of them is as slow as the
    slowest of the newest, and the save takes SAVE_FACTOR times as long as the slowest of the newest.

    Args:
        agreement_s: from one agreement to the next.
        slowest_step_s: of the newest steps, with what belongs to them (an evaluation).
        slowest_save_s: of the newest saves, to the commit.
    """
    return agreement_s + slowest_step_s + SAVE_FACTOR * slowest_save_s
