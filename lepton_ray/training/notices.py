"""Notices to this process: that it is about to be taken away (told by a signal or by Ray), or is to make room for more.

A notice is only noted here. What follows from it is decided by all ranks together, at the end of a step (`agreement`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """One notice of a preemption."""

    at: float
    """When it came, in seconds of `time.monotonic()`."""
    grace_s: float | None = None
    """Seconds from then until the process is taken away; None where nobody said."""

    def left_s(self, otherwise: float) -> float:
        """Seconds left of the grace, 0 or less once it is over; `otherwise` is the grace where none was told."""
        grace = otherwise if self.grace_s is None else self.grace_s
        return self.at + grace - time.monotonic()


_notice: Notice | None = None
_room = False


def preempt(grace_s: float | None = None) -> None:
    """Take note that this process will be taken away in `grace_s` seconds; None where the grace is not known.

    Only the first notice counts until `clear`: a second one does not give more time. May be called from a signal
    handler and from any thread, as it takes no lock and does nothing but one assignment.
    """
    global _notice  # noqa: PLW0603 - one process is one rank, and a signal reaches the process
    if _notice is None:
        _notice = Notice(time.monotonic(), grace_s)


def preempted() -> Notice | None:
    """The notice, if there is one."""
    return _notice


def make_room(*, asked: bool) -> None:
    """Take note that there is room for more ranks (or that there is not): the group is to leave at a checkpoint."""
    global _room  # noqa: PLW0603
    _room = asked


def asked_for_room() -> bool:
    """Whether the group is to leave, so that a larger one can follow."""
    return _room


def clear() -> None:
    """Forget the notice: the process goes on after all, e.g. as a rank of another worker group."""
    global _notice  # noqa: PLW0603
    _notice = None
