"""What the watchdog does on one node: look at the ranks there, ask them for their stacks, end one.

Used as a plain object for the driver's own node, and as an actor on each other node that holds ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from lepton_ray.training.beat import beat_name, beats_folder
from lepton_ray.training.beat_reading import Sighting, is_process, process_of, sight

STACKS_BYTES = 20_000
"""Newest bytes kept of a rank's stacks."""
SETTLED_S = 0.1
"""Seconds without a further byte after which a dump counts as written."""


class NodeWatch:
    """One node, as the watchdog of a run's attempt sees and handles it.

    Args:
        store_uri: of the run's store.
        run: name of the run.
        created_at: when the run was started first, unix seconds.
        attempt: number of the driver's attempt; ranks of others are not seen.
    """

    def __init__(self, store_uri: str, run: str, created_at: float, attempt: int) -> None:
        self._folder = beats_folder(store_uri, run, created_at)
        self._attempt = attempt

    def sight(self) -> list[Sighting]:
        """The ranks of the attempt's newest worker group on this node."""
        return sight(self._folder, self._attempt)

    def stacks(self, ranks: Sequence[Sighting], within_s: float) -> dict[int, str]:
        """The stacks of all threads of these ranks, by rank: of those that give them within some seconds.

        A process that is stopped gives none; one whose native code keeps the interpreter's lock does.
        """
        before = {each.rank: _size(each.stacks) for each in ranks}
        runs = [each for each in ranks if process_of(each.pid, each.ticks)[0] not in ("T", "t", "Z", "")]
        asked = [each for each in runs if _signalled(each, signal.SIGUSR1)]
        deadline, waiting = time.monotonic() + within_s, list(asked)
        settled: dict[int, tuple[int, float]] = {}
        while waiting and time.monotonic() < deadline:
            time.sleep(SETTLED_S / 4)  # a signal handler writes the file: nothing tells of its end
            for each in list(waiting):
                size, now = _size(each.stacks), time.monotonic()
                if size != settled.get(each.rank, (before[each.rank], 0.0))[0]:
                    settled[each.rank] = (size, now)
                elif each.rank in settled and now - settled[each.rank][1] >= SETTLED_S:
                    waiting.remove(each)
        return {each.rank: _tail(each.stacks, before[each.rank]) for each in asked if each.rank in settled}

    def kill(self, rank: Sighting) -> bool:
        """End the process of a rank, and no other: a number that is another process's by now is left alone."""
        return _signalled(rank, signal.SIGKILL)

    def clear(self) -> None:
        """At the end of the attempt: remove what its ranks left."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob(f"{beat_name(self._attempt, 0, 0).partition('-')[0]}-g*"):
                path.unlink(missing_ok=True)
            self._folder.rmdir()  # unless another attempt has its own there


def _signalled(rank: Sighting, number: signal.Signals) -> bool:
    """Send a signal to this very process, if it is there; SIGUSR1 only where it is caught, since else it ends it."""
    try:
        handle = os.pidfd_open(rank.pid)  # from here on it is one process, whatever becomes of its number
    except OSError:
        return False
    try:
        if not is_process(rank.pid, rank.ticks) or (number != signal.SIGKILL and not _catches(rank.pid, number)):
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal. OSError where it is gone."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _tail(path: str, start: int) -> str:
    """What was written to a file from `start` on, at most the newest STACKS_BYTES."""
    try:
        with Path(path).open("rb") as file:
            file.seek(max(start, _size(path) - STACKS_BYTES))
            return file.read(STACKS_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
