"""What happened in a scenario, in order: every act, by whom, when it began and ended, and what it was answered.

One JSON line where an act begins and one where it is answered, appended, so that any number of threads and processes
write one file and a killed one leaves an act without an answer. The clock is CLOCK_MONOTONIC, which all processes of a
host share. An answer that leaves open whether the act was done, and one that never came, end at infinity: from then on
its effect may show at any time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK = "ok"
KEPT = "kept"
"""The step had a good checkpoint already, which stands."""
FENCED = "fenced"
"""Refused, since another attempt has the run; what was on its way may show all the same."""
UNKNOWN = "unknown"
"""Done or not: nobody can tell from the answer."""
FAILED = "failed"
"""Certainly not done."""


@dataclass(frozen=True)
class Event:
    """One act."""

    act: str
    """`acquire`, `gone`, `lost`, `resume`, `train`, `commit`, `retain`, `drop`, `collect`, `damage`, `fault`, `look`,
    `finish`, `crash`."""
    who: str
    """Who did it: a driver, the harness."""
    start: float
    """Seconds of the monotonic clock."""
    end: float
    """The same; infinity where the answer is ambiguous or never came."""
    answer: str = OK
    facts: dict[str, Any] = field(default_factory=dict)
    """What the act was about, and what was answered."""

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]


class Call:
    """An act that has begun; `answer` it once, with further facts if there are any."""

    def __init__(self, history: History, number: str) -> None:
        self._history, self._number = history, number

    def answer(self, answer: str = OK, **facts: Any) -> None:
        """Note the answer."""
        self._history._append({"end": self._number, "answer": answer, "facts": facts})


class History:
    """An append-only file of events."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def begin(self, act: str, who: str, **facts: Any) -> Call:
        """Note that an act begins."""
        number = f"{os.getpid()}-{next(self._numbers)}"
        self._append({"begin": number, "act": act, "who": who, "facts": facts})
        return Call(self, number)

    def note(self, act: str, who: str, **facts: Any) -> None:
        """Note an act that is over at once."""
        self.begin(act, who, **facts).answer()

    def events(self) -> list[Event]:
        """All acts, by the time at which they began."""
        return read(self.path)

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock:  # the clock is read inside, so that lines stand in its order
            data = json.dumps({"at": time.monotonic(), **line}).encode() + b"\n"
            if os.write(self._file, data) != len(data):
                raise OSError("the history could not be written whole")


def read(path: Path) -> list[Event]:
    """The events of a file, by the time at which they began; a last line that is not whole counts as never written."""
    begun: dict[str, dict[str, Any]] = {}
    for line in _lines(path):
        if "begin" in line:
            begun[line["begin"]] = line
        else:
            open_until = math.inf if line["answer"] in (UNKNOWN, FENCED) else line["at"]
            begun[line["end"]] |= {"until": open_until, "answer": line["answer"], "more": line["facts"]}
    return [
        Event(
            line["act"], line["who"], line["at"], line.get("until", math.inf), line.get("answer", UNKNOWN),
            {**line["facts"], **line.get("more", {})},
        )
        for line in begun.values()
    ]  # fmt: skip


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for raw in path.read_bytes().split(b"\n")[:-1]:
        yield json.loads(raw)
