"""What is known of one trial: the settings it has, the runs it consists of, what was measured, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lepton_ray.errors import UsageError
from lepton_ray.settings import Settings

WAITING, RUNNING, FINISHED, STOPPED, FAILED = "waiting", "running", "finished", "stopped", "failed"
ENDED = (FINISHED, STOPPED)
"""States in which a trial is not begun again."""
WORST = 1e30
"""Stands for a value that is not finite, on the side of the worse: percentiles and Optuna take no NaN."""
LONGEST_RUN = 63

Direction = Literal["max", "min"]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a trial after some epochs."""

    epoch: int
    """Epochs of the whole trial that were complete."""
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """How a trial that ran to its end did."""

    epoch: int
    """Epochs of its last run that were complete; fewer than asked for where training stopped early."""
    metrics: Mapping[str, float]
    """The metrics of the model that is published."""


RunTrial = Callable[[Settings, str, Callable[[Evaluation], None]], Outcome]
"""Trains with these settings in the store of this URI, tells each evaluation (the newest as often as it likes), returns
at the end; the same run name resumes. An exception from telling ends it. It travels to other processes: a function of a
module."""


@dataclass(frozen=True)
class Segment:
    """A run of a trial. A trial is one run, but for population based training: there each exploit begins another."""

    run: str
    params: Mapping[str, Any]
    """Key path of a setting to the value it has in this run."""
    done_epochs: int = 0
    """Epochs of the trial before this run."""
    donor: str | None = None
    """The run whose weights and optimiser state it begins with."""


@dataclass(frozen=True)
class Trial:
    """One trial of a search."""

    number: int
    segments: tuple[Segment, ...]
    """Its runs, the last one being the one that goes on or is the result."""
    state: str = WAITING
    evaluations: tuple[Evaluation, ...] = ()
    value: float | None = None
    """The tuned metric: of the finished trial, else of its last evaluation."""
    error: str | None = None
    seconds: float = field(default=0.0, compare=False)
    """Wall time that the trial ran, over all drivers."""

    @property
    def name(self) -> str:
        """`t000`, `t001`, ..."""
        return trial_name(self.number)

    @property
    def run(self) -> str:
        """The name of its newest run."""
        return self.segments[-1].run

    @property
    def params(self) -> Mapping[str, Any]:
        """The tuned settings of its newest run."""
        return self.segments[-1].params

    @property
    def epoch(self) -> int:
        """Epochs that were evaluated."""
        return self.evaluations[-1].epoch if self.evaluations else 0

    def evaluated(self, segment: Segment, evaluation: Evaluation, value: float) -> Trial:
        """The trial after one more evaluation, perhaps in a new run."""
        segments = self.segments if segment == self.segments[-1] else (*self.segments, segment)
        return replace(self, segments=segments, evaluations=(*self.evaluations, evaluation), value=value, state=RUNNING)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON: no NaN, no infinity."""
        tree = asdict(self)
        tree["evaluations"] = [
            {"epoch": each.epoch, "metrics": {name: finite(value) for name, value in each.metrics.items()}}
            for each in self.evaluations
        ]
        return {**tree, "segments": list(tree["segments"]), "value": finite(self.value)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Trial:
        """What `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            number=int(tree["number"]),
            segments=tuple(Segment(**each) for each in tree["segments"]),
            state=str(tree["state"]),
            evaluations=tuple(
                Evaluation(int(each["epoch"]), {n: math.nan if v is None else v for n, v in each["metrics"].items()})
                for each in tree["evaluations"]
            ),
            value=None if tree["value"] is None else float(tree["value"]),
            error=tree["error"],
            seconds=float(tree["seconds"]),
        )


def trial_name(number: int) -> str:
    """The name of a trial by its number, which its runs end with."""
    return f"t{number:03d}"


def run_name(tuning_run: str, number: int, part: int = 1) -> str:
    """The name of a trial's run: `<run>-t003`, after an exploit `<run>-t003-p2`. Raises UsageError where too long."""
    name = f"{tuning_run}-{trial_name(number)}" + (f"-p{part}" if part > 1 else "")
    if len(name) > LONGEST_RUN:
        raise UsageError(f"run is {tuning_run!r}: its trials would be {name!r}, longer than {LONGEST_RUN}; shorten it")
    return name


def finite(value: float | None) -> float | None:
    """The value where it is a number, else None."""
    return value if value is not None and math.isfinite(value) else None


def objective(value: float, direction: Direction) -> float:
    """The value as searchers and schedulers take it: one that is not finite becomes the worst."""
    if math.isfinite(value):
        return float(value)
    return -WORST if direction == "max" else WORST


def best_of(trials: list[Trial], direction: Direction) -> Trial | None:
    """The finished trial with the best value, the first of equals; None where none has finished with a number."""
    sign = 1.0 if direction == "max" else -1.0
    finished = [trial for trial in trials if trial.state == FINISHED and finite(trial.value) is not None]
    return max(finished, key=lambda trial: (sign * float(trial.value or 0.0), -trial.number), default=None)
