"""How far a run is, read from what its rank 0 writes to the store; the same for every kind of cluster."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass

from lepton_ray.errors import LeptonError, NotFoundError
from lepton_ray.storage import Store

_SNAPSHOT = re.compile(r"g([0-9]+)-rank0\.json")
_CHECKPOINT = re.compile(r"step-([0-9]{12})")


@dataclass(frozen=True)
class Progress:
    """The newest figures of a run."""

    generation: int
    step: int
    total_steps: int
    epoch: int
    loss: float | None
    samples_per_second: float | None
    evaluation: dict[str, float]


def read_progress(store: Store, run: str, after_generation: int = 0) -> Progress | None:
    """The newest progress of a generation beyond `after_generation`; None before the first figures."""
    folder = f"runs/{run}/metrics"
    try:
        generations = [int(found.group(1)) for name in store.list_names(folder) if (found := _SNAPSHOT.fullmatch(name))]
        newest = max(generations, default=0)
        if newest <= after_generation:
            return None
        snapshot = json.loads(store.get(f"{folder}/g{newest}-rank0.json"))
    except (LeptonError, ValueError):  # storage is away: the bar stands still, training does not
        return None
    values = {
        (family["name"], sample["labels"].get("metric", "")): sample.get("value")
        for family in snapshot["families"]
        for sample in family["samples"]
    }

    def figure(name: str) -> float | None:
        return values.get((f"lepton_training_{name}", ""))

    return Progress(
        generation=newest,
        step=int(figure("step") or 0),
        total_steps=int(figure("total_steps") or 0),
        epoch=int(figure("epoch") or 0),
        loss=figure("loss"),
        samples_per_second=figure("samples_per_second"),
        evaluation={
            metric: value
            for (name, metric), value in values.items()
            if name == "lepton_training_evaluation" and value is not None
        },
    )


def newest_step(store: Store, run: str) -> int:
    """The newest step that a run is known to have done, by what its rank 0 noted and its checkpoints; 0 before any.

    Raises UnavailableError where storage is away.
    """
    names = store.list_names(f"runs/{run}/checkpoints")
    steps = [0, *(int(found.group(1)) for name in names if (found := _CHECKPOINT.fullmatch(name)))]
    names = store.list_names(f"runs/{run}/ledger")
    generations = [int(found.group(1)) for name in names if (found := _SNAPSHOT.fullmatch(name))]
    for generation in sorted(generations)[-3:]:  # what those before did, these have done again or gone on from
        with contextlib.suppress(ValueError, TypeError, AttributeError, NotFoundError):  # damaged: it tells nothing
            entry = json.loads(store.get(f"runs/{run}/ledger/g{generation}-rank0.json"))
            steps.append(int(entry.get("last_step") or 0))
    return max(steps)


class ProgressWatch:
    """Reads the progress at most every `every_s` seconds and hands on what is new."""

    def __init__(self, store: Store, run: str, after_generation: int, every_s: float = 1.0) -> None:
        self._store, self._run, self._after, self._every_s = store, run, after_generation, every_s
        self._next = 0.0
        self._last: Progress | None = None

    def poll(self, *, now: bool = False) -> Progress | None:
        """The progress where it changed since the last call, else None; `now` asks the store in any case."""
        if time.monotonic() < self._next and not now:
            return None
        self._next = time.monotonic() + self._every_s
        progress = read_progress(self._store, self._run, self._after)
        if progress is None or progress == self._last:
            return None
        self._last = progress
        return progress
