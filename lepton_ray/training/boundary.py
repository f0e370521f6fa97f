"""The state between two steps: what a rank that lost another one can still hand on.

A step that fails in a collective has changed no weights, but its forward pass may have changed buffers (batch
normalisation counts on). Rank 0's are what a checkpoint holds, so rank 0 keeps its own as they were after each step and
puts them back before the state is handed on. Another rank has others, if they change at all.
"""

from __future__ import annotations

import torch


class Boundary:
    """Whether the model is between two steps, and its buffers as they were there.

    Args:
        module: whose buffers; None where nothing can be handed on.
        leads: whether this is rank 0.
    """

    def __init__(self, module: torch.nn.Module | None, *, leads: bool = False) -> None:
        self.between = True
        """Whether no weight has been moved since the newest step."""
        self._leads = leads
        self._buffers = list(module.buffers()) if module is not None else []
        self._kept = [buffer.detach().clone() for buffer in self._buffers]

    def begin(self) -> None:
        """The model is where the run was."""
        self.between = True
        self._keep()

    def leave(self) -> None:
        """From here on the step moves weights."""
        self.between = False

    def reach(self) -> None:
        """The step is done."""
        self.between = True
        if self._leads:
            self._keep()

    @torch.no_grad()
    def put_back(self) -> bool:
        """Undo what the forward pass of a step that failed did to the buffers; whether they are rank 0's."""
        if not self._leads:  # those that are as they were at the beginning never change
            return all(torch.equal(kept, buffer) for kept, buffer in zip(self._kept, self._buffers, strict=True))
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        return True

    @torch.no_grad()
    def _keep(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
