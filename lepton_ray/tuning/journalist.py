"""What Ray Tune tells of its trials, written into the journal; and the sign that ends trials or the whole search."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from ray import tune

from lepton_ray.errors import escaped
from lepton_ray.tuning.actor import AGAIN, DONE, METRICS, SEGMENT
from lepton_ray.tuning.draws import NUMBER, OBJECTIVE
from lepton_ray.tuning.journal import Journal
from lepton_ray.tuning.schedulers import EPOCH
from lepton_ray.tuning.trials import FAILED, FINISHED, RUNNING, STOPPED, Evaluation, Segment, Trial, run_name


class Halt(tune.Stopper):  # type: ignore[misc] # Ray is untyped here
    """Ends a trial that has told its outcome, and everything once `now` is set."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this was a trial's last report."""
        return bool(result.get(DONE))

    def stop_all(self) -> bool:
        """Whether the search is to end."""
        return self.now.is_set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Halt:
        """The same one: Ray copies its settings."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray writes its settings to a scratch folder that nobody reads."""
        return {}


class Journalist(tune.Callback):  # type: ignore[misc] # Ray is untyped here
    """Writes down what Ray Tune tells of its trials."""

    def __init__(self, journal: Journal, run: str, on_change: Callable[[Trial], None], halt: Halt) -> None:
        self._journal, self._run, self._on_change, self._halt = journal, run, on_change, halt
        self._began: dict[int, float] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Journalist:
        """The same one: Ray copies its settings."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray writes its settings to a scratch folder that nobody reads."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process stands: for the first time, after a pause or after an exploit."""
        number = _number(trial)
        params = {key: value for key, value in trial.config.items() if key != NUMBER}
        known = self._journal.trials.get(number) or Trial(number, (Segment(run_name(self._run, number), params),))
        self._began[number] = time.monotonic()
        self._keep(dataclasses.replace(known, state=RUNNING, error=None))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial was evaluated, or has ended with its outcome."""
        if result[AGAIN]:
            return
        known = self._journal.trials[_number(trial)]
        evaluation = Evaluation(int(result[EPOCH]), {name: float(value) for name, value in result[METRICS].items()})
        known = known.evaluated(Segment(**json.loads(result[SEGMENT])), evaluation, float(result[OBJECTIVE]))
        self._keep(dataclasses.replace(known, state=FINISHED if result[DONE] else RUNNING))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself, or by its scheduler."""
        known = self._journal.trials[_number(trial)]
        if known.state != FINISHED and not self._halt.now.is_set():
            self._keep(dataclasses.replace(known, state=STOPPED))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; the others go on."""
        if not self._halt.now.is_set():
            known = self._journal.trials[_number(trial)]
            self._keep(dataclasses.replace(known, state=FAILED, error=error_line(trial.get_error() or "")))

    def _keep(self, trial: Trial) -> None:
        now = time.monotonic()
        spent = now - self._began.get(trial.number, now)
        self._began[trial.number] = now
        trial = dataclasses.replace(trial, seconds=round(trial.seconds + spent, 3))
        self._journal.keep(trial)
        self._on_change(trial)


def error_line(text: str) -> str:
    """The last line of what Ray tells of a failed trial, without the name of the exception."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    line = (
        re.sub(r"^(?:[\w]+\.)+\w*(?:Error|Exception|Exit)\w*: ", "", lines[-1].strip()) if lines else "no reason told"
    )
    return escaped(line, 300)


def _number(trial: Any) -> int:
    return int(str(trial).removeprefix("t"))
