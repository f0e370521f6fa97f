"""Reading the beats of a node's ranks from outside, with what the system says of their processes."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_ray.training.beat import (
    LONGEST,
    MAGIC,
    NOTED,
    PAGE_BYTES,
    PHASE,
    PLACE,
    PLACES,
    PULSE,
    RING,
    RING_AT,
    SINCE,
    SLOTS_AT,
    STEP,
    pid_namespace,
    started_ticks,
)

TRIES = 20
"""Readings of a page that is being changed. A process may be stopped in the midst of a change: then it is taken so."""
_NAME = re.compile(r"a(\d{1,9})-g(\d{1,9})-rank(\d{1,9})\.beat")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class StepTime:
    """One step of one rank."""

    step: int
    whole_s: float
    """From the end of the step before, without checkpoints and evaluations."""
    own_s: float
    """Of it, what the rank computed itself; NaN where that is not known."""


@dataclass(frozen=True)
class Sighting:
    """One rank, as its page and the system show it. Times are those of its own node's monotonic clock."""

    rank: int
    world_size: int
    generation: int
    pid: int
    ticks: int
    """When its process started; see `started_ticks`."""
    host: str
    stacks: str
    """File that its process writes its stacks to at SIGUSR1; empty where it does not."""
    step: int
    """Steps that are done."""
    phase: str
    """One of `beat.PLACES`."""
    place: int
    """Grows as the rank goes on: step by step, and in a step phase by phase."""
    since: float
    """When that began."""
    pulse: int
    """Grows for as long as its interpreter runs."""
    noted: int
    """Steps of this worker group beyond the first."""
    longest_s: float
    """The longest of them."""
    times: tuple[StepTime, ...]
    """The newest of them, oldest first."""
    state: str
    """Of its process, as in `ps`: R, S, D, T, t, Z; empty where it is gone."""
    cpu_s: float
    """CPU time that its process has used."""
    at: float
    """When this was seen."""
    settled: bool = True
    """Whether the page is whole; else each figure by itself is right, but not all of them are of one moment."""


def sight(folder: Path, attempt: int) -> list[Sighting]:
    """The ranks of an attempt's newest worker group on this node, by rank; damaged and foreign pages are left out."""
    try:
        names = [(found, entry) for entry in folder.iterdir() if (found := _NAME.fullmatch(entry.name))]
    except OSError:
        return []
    mine = [(int(name.group(2)), path) for name, path in names if int(name.group(1)) == attempt]
    newest = max((generation for generation, _ in mine), default=0)
    seen = [read_page(path) for generation, path in mine if generation == newest]
    return sorted((each for each in seen if each is not None), key=lambda each: each.rank)


def read_page(path: Path) -> Sighting | None:
    """The rank that a page is of; None where it is gone, damaged, or of a process that cannot be looked at."""
    try:
        data, settled = _settled(path)
        if len(data) < PAGE_BYTES or not data.startswith(MAGIC):
            return None
        header = json.loads(data[len(MAGIC) : data.index(b"\n", len(MAGIC))])
        if header["namespace"] != pid_namespace():
            return None
        return _sighting(header, data, settled=settled)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def process_of(pid: int, ticks: int) -> tuple[str, float]:
    """State and CPU seconds of a process; an empty state where it is gone, or the number is another's by now."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0.0
    if int(fields[19]) != ticks:
        return "", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) * _TICK_S


def is_process(pid: int, ticks: int) -> bool:
    """Whether this very process is there."""
    try:
        return started_ticks(pid) == ticks
    except OSError:
        return False


def _settled(path: Path) -> tuple[bytes, bool]:
    """The bytes of a page, and whether nobody changed them meanwhile, which can be had within some tries mostly."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(TRIES):
            data = os.pread(descriptor, PAGE_BYTES, 0)
            before = data[SLOTS_AT : SLOTS_AT + 8]
            changing = int.from_bytes(before, sys.byteorder) % 2
            if not changing and os.pread(descriptor, 8, SLOTS_AT) == before:
                return data, True
        return data, False
    finally:
        os.close(descriptor)


def _sighting(header: Mapping[str, Any], data: bytes, *, settled: bool) -> Sighting:
    numbers = struct.unpack_from("=16Q", data, SLOTS_AT)
    seconds = struct.unpack_from("=16d", data, SLOTS_AT)
    pid, ticks = int(header["pid"]), int(header["ticks"])
    state, cpu_s = process_of(pid, ticks)
    return Sighting(
        rank=int(header["rank"]), world_size=int(header["world_size"]), generation=int(header["generation"]),
        pid=pid, ticks=ticks, host=str(header["host"]), stacks=str(header["stacks"]),
        step=numbers[STEP], phase=PLACES[numbers[PHASE]], place=numbers[PLACE], since=seconds[SINCE],
        pulse=numbers[PULSE], noted=numbers[NOTED], longest_s=seconds[LONGEST], times=_times(data, numbers[NOTED]),
        state=state, cpu_s=cpu_s, at=time.monotonic(), settled=settled,
    )  # fmt: skip


def _times(data: bytes, noted: int) -> tuple[StepTime, ...]:
    ring = list(struct.iter_unpack("=3d", data[RING_AT : RING_AT + 24 * RING]))
    kept = [ring[number % RING] for number in range(max(0, noted - RING), noted)]
    return tuple(StepTime(int(step), whole, own) for step, whole, own in kept)
