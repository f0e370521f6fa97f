"""The beat of a rank: where it is, in a page of the node's shared memory, for a watchdog that is another process.

The rank's loop notes each phase and each step there (about a microsecond each); a thread beside it counts four times a
second, which shows that the interpreter runs. Nothing is sent and nothing waits: a rank that is stopped, or whose
native code keeps the interpreter's lock, leaves a page that stands still, and that is what the watchdog looks for.

The page is a header in JSON, then slots of eight bytes, then a ring of the newest steps' times. Times are those of
CLOCK_MONOTONIC, which all processes of a node share.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from lepton_ray.monitoring.ledger import PHASES
from lepton_ray.training.hot_folder import folder_of, own_folder

_log = logging.getLogger(__name__)
PULSE_S = 0.25
"""Seconds between two counts of the thread."""
TOUCH_EVERY = 400
"""Pulses between two touches of the file, which keep it from being taken for abandoned."""
EXCHANGE = "exchange"
"""A part of `backward` (or `replayed`): this rank's gradients are there, and it waits for those of the others."""
PLACES = (*PHASES, EXCHANGE)
"""What the page says that a rank is doing, by number."""

MAGIC = b"lrbeat1\n"
PAGE_BYTES = 4096
SLOTS_AT, RING_AT = 1024, 1152
RING = 64
"""Newest steps whose times are kept."""
SEQUENCE, STEP, PHASE, PLACE, NOTED, PULSE = range(6)
"""Slots that hold whole numbers. The sequence is odd while the others are being changed."""
SINCE, LONGEST = 8, 9
"""Slots that hold seconds."""

_ORDER = {
    "starting": 0, "loading": 1, "logging": 2, "checkpoint": 3, "validation": 3, "data_wait": 4, "forward": 5,
    "replayed": 5, "backward": 6, EXCHANGE: 7, "optimizer": 8, "stopping": 10,
}  # fmt: skip
"""The order in which a rank goes through the phases from one step's end to the next one's."""
_MOVED = 9
"""After the optimiser, before the step is counted."""
_OWN = frozenset({"forward", "backward", "optimizer", "replayed"})
_PLACED = {name: (number, _ORDER[name]) for number, name in enumerate(PLACES)}


def beats_folder(store_uri: str, run: str, created_at: float) -> Path:
    """Where a node keeps the beats of a run: beside its hot copies, which a finished run removes with their folder."""
    copies = folder_of(store_uri, run, created_at)
    return copies.with_name(f"{copies.name}-beats")


def beat_name(attempt: int, generation: int, rank: int) -> str:
    """Name of a rank's page in that folder."""
    return f"a{attempt}-g{generation}-rank{rank}.beat"


def started_ticks(pid: int) -> int:
    """When a process started, in clock ticks since the machine's start: with its number it is never another's.

    Raises OSError where there is no such process.
    """
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])


class Beat:
    """One rank's page, written by its loop. An observer of its ledger; see `RankLedger.observed_by`.

    Never raises: a node without shared memory has no beats, and its ranks are not watched.

    Args:
        folder: of `beats_folder`.
        run: name of the run.
        attempt: number of the driver's attempt.
        generation: number of the worker group.
        rank: this rank.
        world_size: ranks of the group.
        now: monotonic clock, seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run: str,
        attempt: int,
        generation: int,
        rank: int,
        world_size: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.waited: Callable[[], float | None] | None = None
        """Gives the seconds that this rank waited for others since the last call; None where they are not known."""
        self._now = now
        self._path = folder / beat_name(attempt, generation, rank)
        self._stop = threading.Event()
        self._page: mmap.mmap | None = None
        memory: mmap.mmap | bytearray = bytearray(PAGE_BYTES)
        try:
            header = {
                "run": run, "attempt": attempt, "generation": generation, "rank": rank, "world_size": world_size,
                "pid": os.getpid(), "ticks": started_ticks(os.getpid()), "host": socket.gethostname(),
                "namespace": pid_namespace(), "stacks": str(self._path.with_suffix(".stacks")),
            }  # fmt: skip
            self._page = memory = _new_page(self._path, json.dumps(header).encode())
        except (OSError, ValueError) as error:
            _log.warning("rank %d is not watched for hangs: %s", rank, error)
        slots = memoryview(memory)
        self._numbers = slots[SLOTS_AT:RING_AT].cast("Q")
        self._times = slots[SLOTS_AT:RING_AT].cast("d")
        self._ring = slots[RING_AT : RING_AT + 24 * RING].cast("d")
        self._phase = "loading"
        self._sequence = self._noted = self._base = 0
        self._first = True
        self._own = self._whole = 0.0
        self.switched("loading")
        if self._page is not None:
            threading.Thread(target=self._pulse, name="pulse", daemon=True).start()

    def switched(self, phase: str) -> None:
        """The rank began a phase. KeyError for one that is not known."""
        number, order = _PLACED[phase]
        if phase == "logging" and self._phase in _OWN:
            order = _MOVED
        self._phase = phase
        self._note(number, self._base + order)

    def exchanging(self) -> None:
        """The rank has computed its gradients and now waits for the exchange; may be called by autograd's thread."""
        number, order = _PLACED[EXCHANGE]
        self._note(number, self._base + order)

    def resumed(self, step: int) -> None:
        """The run was at this step when the rank took it up."""
        self._base = 16 * step
        self._numbers[STEP] = step
        self.switched(self._phase)

    def step_done(self, step: int, spent: Mapping[str, float]) -> None:
        """The rank has done `step` steps of the run; `spent` are its seconds by phase so far."""
        waited = self.waited() if self.waited is not None else None
        own = spent["forward"] + spent["backward"] + spent["optimizer"] + spent["replayed"]
        whole = own + spent["data_wait"] + spent["logging"]
        numbers, times = self._numbers, self._times
        numbers[SEQUENCE] = self._sequence + 1
        numbers[STEP] = step
        if not self._first:  # a group's first step sets things up: its time says nothing about the others'
            ring, at, took = self._ring, self._noted % RING * 3, whole - self._whole
            ring[at], ring[at + 1] = step, took
            ring[at + 2] = math.nan if waited is None else max(0.0, own - self._own - waited)
            self._noted += 1
            numbers[NOTED] = self._noted
            times[LONGEST] = max(times[LONGEST], took)
        self._sequence += 2
        numbers[SEQUENCE] = self._sequence
        self._first, self._own, self._whole, self._base = False, own, whole, 16 * step
        number, order = _PLACED[self._phase]
        self._note(number, self._base + order)

    def _note(self, number: int, place: int) -> None:
        """Note where the rank is, since now."""
        numbers = self._numbers
        sequence = self._sequence = self._sequence + 2
        numbers[SEQUENCE] = sequence - 1
        numbers[PHASE] = number
        numbers[PLACE] = place
        self._times[SINCE] = self._now()
        numbers[SEQUENCE] = sequence

    def close(self) -> None:
        """The rank leaves its loop: nobody is to wait for it any more."""
        self._stop.set()
        if self._page is not None:
            with contextlib.suppress(OSError):  # others of the node may have theirs there
                self._path.unlink(missing_ok=True)
                self._path.with_suffix(".stacks").unlink(missing_ok=True)
                self._path.parent.rmdir()

    def _pulse(self) -> None:
        """Count, for as long as the interpreter gives this thread its turn."""
        numbers = self._numbers
        while not self._stop.wait(PULSE_S):
            count = numbers[PULSE] + 1
            numbers[PULSE] = count
            if count % TOUCH_EVERY == 0:
                with contextlib.suppress(OSError):  # removed with the run
                    os.utime(self._path)


def pid_namespace() -> str:
    """Which processes this one's numbers are among: a number of another container says nothing here."""
    return str(Path("/proc/self/ns/pid").readlink())


def _new_page(path: Path, header: bytes) -> mmap.mmap:
    """A page with this header, at once whole under its name; its memory is taken now. OSError, ValueError."""
    if len(MAGIC) + len(header) >= SLOTS_AT:
        raise ValueError(f"the header of {path.name} is {len(header)} bytes")
    for left in (2, 1, 0):
        try:
            if not own_folder(path.parent):
                raise OSError(f"{path.parent}: is not this user's own folder")
            _dump_stacks_into(path.with_suffix(".stacks"))
            return _mapped(path, MAGIC + header + b"\n")
        except FileNotFoundError:  # the last rank of the group before has just removed the folder
            if not left:
                raise
    raise AssertionError("not reached")


def _mapped(path: Path, start: bytes) -> mmap.mmap:
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, PAGE_BYTES)
        page = mmap.mmap(descriptor, PAGE_BYTES)
    finally:
        os.close(descriptor)
    page[: len(start)] = start
    fresh.replace(path)
    return page


_stacks: IO[Any] | None = None
"""Where this process writes its stacks when it is asked to. Stays open: a signal may come at any time."""


def _dump_stacks_into(path: Path) -> None:
    """Have the stacks of all threads written into a file at SIGUSR1, whoever holds the interpreter. OSError."""
    global _stacks
    before, _stacks = _stacks, path.open("wb")
    faulthandler.register(signal.SIGUSR1, file=_stacks, all_threads=True, chain=False)
    if before is not None:
        before.close()
