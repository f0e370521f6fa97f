"""What is done to the processes of a real run, at which step, drawn from a seed; and the hand that does it.

The hand reads the ranks' beats from the node's shared memory, as the watchdog does, so it strikes at a step and not at
a time. A strike is a name and a function of the ranks that are seen: another one is one line in `DEEDS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from history import History

from lepton_ray.errors import LeptonError
from lepton_ray.storage import Store
from lepton_ray.training.beat import beats_folder
from lepton_ray.training.beat_reading import Sighting, sight

LIMIT_S = 240.0


def _send(ranks: list[Sighting], number: signal.Signals) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, number)


DEEDS: dict[str, Callable[[list[Sighting], random.Random], None]] = {
    "kill one": lambda ranks, draw: _send([draw.choice(ranks)], signal.SIGKILL),
    "kill all": lambda ranks, _: _send(ranks, signal.SIGKILL),
}
"""Name -> what is done to the ranks of the newest worker group."""


@dataclass(frozen=True)
class Strike:
    """One deed."""

    deed: str
    at: int
    """Steps of the run that must be done."""


def draw_strikes(seed: int, total: int, deeds: tuple[str, ...], count: int) -> list[Strike]:
    """Strikes at random steps of a run of `total`, a tenth of it apart at least and none in its last fifth."""
    draw = random.Random(f"strikes {seed}")  # noqa: S311 - not a secret
    span = total * 4 // 5 // count
    return [Strike(draw.choice(deeds), part * span + draw.randint(max(10, total // 10), span)) for part in range(count)]


class Hand(threading.Thread):
    """Does the strikes of a run that is starting or under way; a context manager that stops with it."""

    def __init__(self, store: Store, run: str, strikes: list[Strike], history: History, seed: int) -> None:
        super().__init__(name="hand", daemon=True)
        self._onlooker, self._strikes, self._history = Onlooker(store, run), list(strikes), history
        self._draw = random.Random(f"hand {seed}")  # noqa: S311 - not a secret
        self._over = threading.Event()
        self.done: list[tuple[str, int, int]] = []
        """Deed, steps that were done when it was done, generation that it hit."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(10)

    def run(self) -> None:
        """Wait for each strike's step in a worker group that was not struck yet."""
        deadline = time.monotonic() + LIMIT_S
        while self._strikes and time.monotonic() < deadline and not self._over.wait(0.005):
            ranks = self._onlooker.ranks()
            if not ranks or max(rank.step for rank in ranks) < self._strikes[0].at:
                continue
            generation = ranks[0].generation
            if len(ranks) < ranks[0].world_size or generation in [hit for _, _, hit in self.done]:
                continue
            strike, step = self._strikes.pop(0), max(rank.step for rank in ranks)
            call = self._history.begin("fault", "hand", kind=strike.deed, step=step, generation=generation, warm=0)
            DEEDS[strike.deed](ranks, self._draw)
            call.answer()
            self.done.append((strike.deed, step, generation))


class Onlooker:
    """Sees the ranks of a run's first attempt on this machine, also while its store is away."""

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._run = store, run
        self._where: tuple[Path, int] | None = None

    def ranks(self) -> list[Sighting]:
        """The newest worker group; none before there is one."""
        if self._where is None:
            with contextlib.suppress(LeptonError, ValueError, LookupError):
                record = json.loads(self._store.get(f"runs/{self._run}/record.json"))
                folder = beats_folder(self._store.uri, self._run, record["created_at"])
                self._where = folder, int(record["attempts"][-1]["attempt"])
        return sight(*self._where) if self._where is not None else []

    def step(self) -> int:
        """Steps that the newest worker group has done."""
        return max((rank.step for rank in self.ranks()), default=0)
