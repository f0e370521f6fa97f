"""Sides of a comparison that take turns: whole runs one after the other, or two runs of which one stands still.

What a shared machine gives differs from minute to minute by more than what is to be measured, so neighbours in time are
compared; and nothing of the one runs in the other's turn.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

WINDOW_S = 8.0
"""Seconds of a turn: below the ten of standing still after which our watchdog suspects a rank."""
SETTLE_S = 1.0
"""Seconds of a window that do not count: caches and timers find their way back."""


@dataclass
class Side:
    """A run that is stopped and continued."""

    process: psutil.Process
    windows: list[tuple[float, float]] = field(default_factory=list)
    """Clock times between which it ran alone and had settled."""

    def below(self) -> list[psutil.Process]:
        """Its processes, the oldest first; none where it has ended."""
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """Every process stands still."""
        for process in self.below():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def go_on(self) -> None:
        """Every process runs again."""
        for process in reversed(self.below()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def turn(self) -> None:
        """One window."""
        self.go_on()
        begun = time.time()
        time.sleep(WINDOW_S)
        self.stop()
        self.windows.append((begun + SETTLE_S, begun + WINDOW_S))

    def peak(self) -> float:
        """Largest peak resident memory of a rank so far, bytes."""
        return max(peaks_below(self.process.pid), default=0.0)

    def end(self) -> None:
        """Kill what is left of it."""
        for process in self.below():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(psutil.Error):
            self.process.wait(30)

    def speeds(self, ends: list[tuple[int, float]]) -> list[float]:
        """Steps per second in each window, from steps done and the times at which they were."""
        found = []
        for low, high in self.windows:
            inside = [(step, at) for step, at in ends if low <= at <= high]
            if len(inside) < 2:
                sys.exit(f"a window of {WINDOW_S:g} s saw {len(inside)} notes: too few to tell a speed")
            found.append((inside[-1][0] - inside[0][0]) / (inside[-1][1] - inside[0][1]))
        return found


def peaks_below(root: int) -> list[float]:
    """Peak resident memory (VmHWM, bytes) of the ranks below a process: Ray's actors, or the loop by hand."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(root).children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError, StopIteration, IndexError):
                words = process.cmdline()
                if "RayTrainWorkerHost" in words[0] or (len(words) > 1 and words[-2].endswith("plain_loops.py")):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    found.append(1024.0 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0]))
    return found


def turns(pairs: int, *sides: Callable[[], Any]) -> list[list[Any]]:
    """Every side once per turn, beginning with another one each turn; the outcomes by side."""
    found: list[list[Any]] = [[] for _ in sides]
    for turn in range(pairs):
        for position in range(len(sides)):
            side = (turn + position) % len(sides)
            begun = time.time()
            found[side].append(sides[side]())
            print(f"turn {turn + 1}, side {side + 1}: {time.time() - begun:.1f} s", file=sys.stderr, flush=True)
    return found
