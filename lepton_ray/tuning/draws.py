"""The settings that trials get: a grid, random draws, or draws of Optuna. Domains are those of Ray Tune.

Listed values are drawn by their position, so that any value (a list, a mapping, null) can be listed and comes out as it
was written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.variant_generator import generate_variants

from lepton_ray.errors import UsageError
from lepton_ray.settings.tuning import DimensionSettings, TuningSettings
from lepton_ray.tuning.trials import ENDED, Direction, Trial

NUMBER = "trial"
"""Key of a trial's number in what Ray Tune calls its config."""
OBJECTIVE = "objective"
"""Key of the tuned value in what a trial reports."""


def domain(dimension: DimensionSettings) -> Any:
    """A dimension as Ray Tune has it; listed values by position."""
    values = dimension.values
    if dimension.kind == "grid":
        return tune.grid_search(list(range(len(values))))
    if dimension.kind == "choice":
        return tune.choice(list(range(len(values))))
    return getattr(tune, dimension.kind)(*values)


def value_of(dimension: DimensionSettings, drawn: Any) -> Any:
    """What was drawn as the plain value of the setting."""
    if dimension.kind in ("grid", "choice"):
        return dimension.values[int(drawn)]
    return int(drawn) if dimension.kind == "randint" else float(drawn)


def drawn_of(dimension: DimensionSettings, value: Any) -> Any:
    """The other way round. Raises ValueError for a value that is not listed."""
    return dimension.values.index(value) if dimension.kind in ("grid", "choice") else value


def draw_all(tuning: TuningSettings) -> list[dict[str, Any]]:
    """All trials' settings of a grid or random search; a function of space, number and seed alone.

    The first trials stay the same when `trials` is raised.
    """
    space = {key: domain(dimension) for key, dimension in tuning.space.items()}
    random = np.random.RandomState(tuning.seed)
    return [
        {key: value_of(tuning.space[key], spec["config"][key]) for key in tuning.space}
        for _ in range(tuning.trials or 1)
        for _, spec in generate_variants({"config": space}, random_state=random)
    ]


class OptunaDraws(Searcher):  # type: ignore[misc] # Ray is untyped here
    """Hands out first the trials that an earlier driver left unfinished, then what Optuna's TPE asks for.

    Args:
        tuning: the search.
        direction: of the tuned value.
        known: all trials of the journal: ended ones teach Optuna, the others are handed out again.
    """

    def __init__(self, tuning: TuningSettings, direction: Direction, known: list[Trial]) -> None:
        super().__init__(metric=OBJECTIVE, mode=direction)
        self._space = tuning.space
        self._left = [trial for trial in known if trial.state not in ENDED]
        self._next, self._count = max((trial.number for trial in known), default=-1) + 1, tuning.trials or 0
        self._again: dict[str, Trial] = {}
        # a search that goes on must not draw its first random points once more
        self._optuna = _optuna_search(self._space, direction, tuning.seed + len(known))
        for trial in known:
            if trial.state in ENDED and trial.value is not None:
                self._teach(trial, trial.value)

    @property
    def to_come(self) -> int:
        """Trials that will be handed out."""
        return len(self._left) + self._count - self._next

    def suggest(self, trial_id: str) -> Any:
        """The next trial's number and settings."""
        if self._left:
            trial = self._left.pop(0)
            self._again[trial_id] = trial
            return {NUMBER: trial.number, **trial.params}
        if self._next >= self._count:
            return Searcher.FINISHED
        drawn = self._optuna.suggest(trial_id)
        number, self._next = self._next, self._next + 1
        return {NUMBER: number, **{key: value_of(self._space[key], drawn[key]) for key in self._space}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell Optuna how a trial that it asked for is doing."""
        if trial_id not in self._again:
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended."""
        if trial_id not in self._again:
            self._optuna.on_trial_complete(trial_id, result, error)
        elif result and not error:
            self._teach(self._again[trial_id], float(result[OBJECTIVE]))

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the journal holds what a search is gone on with."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing; see `save_to_dir`."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called; see `save_to_dir`."""

    def _teach(self, trial: Trial, value: float) -> None:
        drawn = {key: drawn_of(self._space[key], trial.params[key]) for key in self._space}
        self._optuna.add_evaluated_point(drawn, value)


def check_optuna() -> None:
    """Raise UsageError where Optuna is not installed."""
    try:
        import optuna  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise UsageError(
            "tuning.search is 'optuna': it is not installed; pip install 'lepton-ray[tune]' or set search to random"
        ) from error


def _optuna_search(space: dict[str, DimensionSettings], direction: Direction, seed: int) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = OptunaSearch.convert_search_space({key: domain(dimension) for key, dimension in space.items()})
    return OptunaSearch(distributions, metric=OBJECTIVE, mode=direction, sampler=optuna.samplers.TPESampler(seed=seed))
