"""Which trials go on: Ray Tune's schedulers, with the memory of what earlier drivers saw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

from lepton_ray.settings.tuning import TuningSettings
from lepton_ray.tuning.draws import OBJECTIVE
from lepton_ray.tuning.trials import Direction, Trial, objective

EPOCH = "epoch"
"""Key of the complete epochs in what a trial reports; the time by which trials are compared."""


def make_scheduler(
    tuning: TuningSettings,
    direction: Direction,
    epochs: int,
    metric: str,
    known: list[Trial],
    *,
    in_turns: bool = False,
) -> Any:
    """The scheduler of a search.

    Args:
        tuning: the search.
        direction: of the tuned value.
        epochs: of a whole trial.
        metric: name of the tuned metric.
        known: trials that ended under earlier drivers; they count at the rungs that they passed.
        in_turns: there are more trials than can run at the same time.
    """
    if tuning.scheduler == "asha":
        asha = ASHAScheduler(
            time_attr=EPOCH,
            metric=OBJECTIVE,
            mode=direction,
            max_t=epochs,
            grace_period=tuning.asha.grace_epochs,
            reduction_factor=tuning.asha.reduction,
        )
        _remember(asha, direction, metric, known)
        return asha
    if tuning.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=EPOCH,
            metric=OBJECTIVE,
            mode=direction,
            perturbation_interval=tuning.pbt.interval_epochs,
            hyperparam_mutations={key: _mutation(tuning, key) for key in tuning.space},
            quantile_fraction=tuning.pbt.quantile,
            resample_probability=tuning.pbt.resample,
            custom_explore_fn=Within(tuning),
            log_config=False,
            # who trains in turns must wait for the others: else the one that has just trained is always the better one
            synch=in_turns,
        )
    return FIFOScheduler()


class Within:
    """Keeps what population based training makes of a number inside the space: Ray multiplies without looking."""

    def __init__(self, tuning: TuningSettings) -> None:
        self._space = tuning.space

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config with each number of the space between its bounds."""
        for key, dimension in self._space.items():
            if dimension.kind in ("uniform", "loguniform"):
                low, high = dimension.values
                config[key] = float(min(max(config[key], low), high))
            elif dimension.kind == "randint":
                low, high = dimension.values
                config[key] = int(min(max(config[key], low), high - 1))
        return config


def _mutation(tuning: TuningSettings, key: str) -> Any:
    """How a setting changes: listed values to a neighbour, numbers by a factor, or a fresh draw."""
    dimension = tuning.space[key]
    if dimension.kind in ("grid", "choice"):
        return list(dimension.values)
    return getattr(tune, dimension.kind)(*dimension.values)


def _remember(asha: Any, direction: Direction, metric: str, known: list[Trial]) -> None:
    """Tell ASHA what ended trials had at each epoch, so that a search that goes on has the same rungs."""
    for trial in known:
        past = SimpleNamespace(trial_id=trial.name)
        asha.on_trial_add(None, past)
        for evaluation in trial.evaluations:
            value = objective(evaluation.metrics[metric], direction)
            asha.on_trial_result(None, past, {EPOCH: evaluation.epoch, OBJECTIVE: value})
        asha.on_trial_remove(None, past)
