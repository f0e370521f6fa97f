"""What to do about a loss or gradient that is not finite: skip the step, and go back when it does not end.

The ranks need no vote. `poisoned` turns one rank's loss into gradients that are NaN, the average over ranks carries
that to all, and so the norm of the gradients says the same to each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch

Verdict = Literal["ok", "skip", "roll_back"]


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The loss, with a gradient that is NaN everywhere if it is not finite.

    An infinite loss may have finite gradients, on its own rank and so on all. No word passes between host and device.

    Args:
        loss: shape `[]`; what `backward` is called on.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


class NonFinite:
    """Counts steps in a row without finite gradients.

    When the run goes back, this object goes on: what the checkpoint knows of `left_out` is older, `restore` joins both.

    Args:
        limit: steps in a row after which the run goes back (`training.max_nonfinite`).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._row: list[int] = []
        self.left_out: set[int] = set()
        """Steps whose batches are left out when they come again: no forward, no update, no call of `seen`."""
        self.roll_backs = 0
        """How often the run went back in this process; the loop bounds it."""

    def seen(self, step: int, finite: bool) -> Verdict:
        """Take one step in, on all ranks the same; says whether its update is made.

        `ok`: make it. `skip`: leave this update out and go on. `roll_back`: restore the newest checkpoint; the last
        `limit` steps are in `left_out` by then.
        """
        if finite:
            self._row.clear()
            return "ok"
        self._row.append(step)
        if len(self._row) < self._limit:
            return "skip"
        self.left_out.update(self._row)
        self._row.clear()
        self.roll_backs += 1
        return "roll_back"

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"row": list(self._row), "left_out": sorted(self.left_out)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `to_json` gave, in a new process or after going back in this one.

        Steps that were left out since then stay so, and no longer count as a row of their own.
        """
        row: Iterable[int] = state["row"]
        left_out: Iterable[int] = state["left_out"]
        self.left_out.update(int(step) for step in left_out)
        self._row = [int(step) for step in row if step not in self.left_out]
