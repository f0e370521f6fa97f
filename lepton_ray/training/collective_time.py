"""How long backward waits for the gradient exchange: the part of it that computing did not hide.

What is measured, exactly: the time from when the autograd engine has computed the last gradient of a backward pass
until `backward` returns. In that time DDP waits for the buckets that are still on their way and copies them to the
gradients; FSDP2 waits for the last reduce-scatter. It holds the wait for slower ranks, as the exchange cannot end
before the last rank begins it. It does not hold exchanges that ran beside the computing, which cost nothing, nor
FSDP2's gathering of weights inside the pass.

How: a hook on the loss runs first in the pass and queues a callback for the pass's end. The engine runs such callbacks
in the order in which they were queued, and DDP and FSDP2 queue theirs later; so ours runs when the computing is done
and before they wait. No communication hook is needed, so the exchange itself is as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class CollectiveTime:
    """Adds up, over backward passes, the time that each waited for the gradient exchange.

    On a GPU the times are taken on its stream, by events, and read only in `take`.

    Args:
        device: of the gradients.
        waiting: called when the gradients are computed and the wait begins, by autograd's thread.
    """

    def __init__(self, device: torch.device, waiting: Callable[[], None] | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._waiting = waiting
        self._computed_at: float | None = None
        self._seconds = self._unread = 0.0
        self._event: torch.cuda.Event | None = None
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def watch(self, loss: torch.Tensor) -> None:
        """Call just before `loss.backward()`, for a pass that exchanges gradients."""
        self._computed_at, self._event = None, None
        loss.register_hook(self._began)

    def done(self) -> None:
        """Call right after that `backward` returned."""
        if self._event is not None:
            returned = torch.cuda.Event(enable_timing=True)
            returned.record()
            self._pairs.append((self._event, returned))
        elif self._computed_at is not None:
            self._add(time.perf_counter() - self._computed_at)
        self._computed_at, self._event = None, None

    def inside(self) -> None:
        """Instead of `watch` and `done`: call inside a pass, before anything is exchanged: in a backward pre-hook."""
        self._computed_at, self._event = None, None
        torch.autograd.Variable._execution_engine.queue_callback(self._computed_inside)  # noqa: SLF001 - see above

    def take(self) -> float:
        """Seconds waited since the last call; on a GPU this waits for the passes so far to end."""
        for _, returned in self._pairs:
            returned.synchronize()
        self._read_events()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def newest(self) -> float | None:
        """Seconds waited since the last call of this; None while a GPU is not done with them. Waits for nothing."""
        self._read_events()
        if self._pairs:
            return None
        seconds, self._unread = self._unread, 0.0
        return seconds

    def _read_events(self) -> None:
        """Add up the passes that the GPU is done with."""
        while self._pairs and self._pairs[0][1].query():
            computed, returned = self._pairs.pop(0)
            self._add(computed.elapsed_time(returned) / 1000)  # milliseconds

    def _add(self, seconds: float) -> None:
        self._seconds += seconds
        self._unread += seconds

    def _began(self, gradient: torch.Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._computed)  # noqa: SLF001 - DDP and FSDP2 use it too

    def _computed(self) -> None:
        if self._cuda:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._computed_at = time.perf_counter()
        if self._waiting is not None:
            self._waiting()

    def _computed_inside(self) -> None:
        self._computed()
        # queued now it runs last, after the callbacks in which DDP and FSDP2 wait
        torch.autograd.Variable._execution_engine.queue_callback(self.done)  # noqa: SLF001 - see above
