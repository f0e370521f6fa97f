"""Processes with the beat of a rank and nothing else of it, for tests of who watches them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lepton_ray.training.beat_reading import Sighting

LIMIT_S = 30.0
CHILD = """
import ctypes, sys, time
from pathlib import Path
from lepton_ray.monitoring.ledger import PHASES
from lepton_ray.training.beat import Beat

generation, rank = int(sys.argv[3]), int(sys.argv[4])
beat = Beat(Path(sys.argv[1]), run="digits", attempt=1, generation=generation, rank=rank, world_size=2)
beat.waited = lambda: 0.0
spent = dict.fromkeys(PHASES, 0.0)

def steps(first, last):
    for step in range(first, last):
        for phase in ("data_wait", "forward", "backward"):
            beat.switched(phase)
        beat.exchanging()
        beat.switched("optimizer")
        beat.switched("logging")
        beat.step_done(step, spent)

def keeps_the_lock():
    while True:  # a signal ends the sleep
        ctypes.PyDLL(None).sleep(60)

def waits():
    time.sleep(60)

steps(1, 3)
print("ready", flush=True)
{"steps": lambda: steps(3, 10**9), "keeps_the_lock": keeps_the_lock, "waits": waits}[sys.argv[2]]()
"""


@contextlib.contextmanager
def rank_that(does: str, folder: Path, generation: int = 1, rank: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process that does one of the things below with a beat in the folder; killed at the end of the block."""
    command = [sys.executable, "-c", CHILD, str(folder), does, str(generation), str(rank)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait(LIMIT_S)
        process.stdout.close()


def until(found: Callable[[], Sighting | None], true: Callable[[Sighting], bool]) -> Sighting:
    """The first sighting of which something is true."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        seen = found()
        if seen is not None and true(seen):
            return seen
        time.sleep(0.02)
    raise AssertionError(f"not within {LIMIT_S} s; last seen: {seen}")
