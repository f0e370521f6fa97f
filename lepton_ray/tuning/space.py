"""From the space to the settings of a trial, and everything that can be wrong with a space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.settings.tuning import DimensionSettings, TuningSettings
from lepton_ray.tuning.trials import Segment

TUNABLE = ("training.", "task.options.")
FIXED = {
    "training.workers": "all trials run on the same number of workers",
    "training.cpus_per_worker": "all trials have the same resources",
    "training.gpu": "all trials have the same resources",
    "training.max_failures": "it does not change what is learnt",
    "training.checkpoint": "it does not change what is learnt",
    "training.logging": "it does not change what is learnt",
}
"""Settings that a trial cannot have of its own, and why."""
SAME_EPOCHS = ("training.epochs", "training.evaluate_every_epochs")
"""Must be the same for all trials where trials are compared after the same number of epochs."""
FREE_TO_CHANGE = (
    "tuning.trials", "tuning.concurrent", "training.workers", "training.cpus_per_worker", "training.gpu",
    "training.max_failures", "training.checkpoint", "training.logging", "training.parallel", "publish", "serving",
    "data.source", "data.reading",
)  # fmt: skip
"""Settings that a search which is gone on with may have otherwise than before."""

Check = Callable[[Settings], None]


def trial_settings(settings: Settings, segment: Segment, table_version: int | None) -> Settings:
    """The settings of one run of a trial: those of the search, with the tuned ones in their places.

    Raises UsageError where a value does not fit its setting.
    """
    params: dict[str, Any] = dict(segment.params)
    tree = settings.model_dump(mode="json")
    tree |= {"run": segment.run, "tuning": None}
    tree["data"]["version"] = settings.data.version if table_version is None else table_version
    for path, value in params.items():
        _set(tree, path, value)
    if segment.donor is not None:
        training = tree["training"]
        training["epochs"] -= segment.done_epochs
        training["seed"] += segment.done_epochs  # else it would see the first epochs' order again
        training["initial"] = {"weights": f"run:{segment.donor}", "optimizer": True, "at_least": 1.0}
    return parse_settings(tree, f"trial run {segment.run}")


def tuning_of(settings: Settings) -> TuningSettings:
    """The section `tuning` of a config. Raises UsageError where it has none."""
    if settings.tuning is None:
        raise UsageError("tuning: missing; the config needs a section tuning with search, space and trials")
    return settings.tuning


def check_space(settings: Settings, check: Check) -> None:
    """Try every listed value and every bound in a trial's settings, and the rules of search and scheduler.

    Args:
        settings: of the search; their `tuning` must be given.
        check: raises UsageError for settings that no run can start with (a wrong option of the task).

    Raises UsageError with all faults in one line.
    """
    tuning = tuning_of(settings)
    faults = [fault for key in tuning.space if (fault := _key_fault(key, tuning))]
    if not faults:
        for key, dimension in tuning.space.items():
            faults += _value_faults(settings, key, dimension, check)
    schedule = settings.training.optimizer.schedule.name
    if tuning.scheduler == "pbt":
        if schedule != "constant":
            faults.append(
                f"training.optimizer.schedule.name is {schedule!r}: scheduler pbt changes settings on the way, which "
                "makes a schedule of its own; set it to constant"
            )
        if trial_count(tuning) < 2:
            faults.append("tuning: scheduler pbt needs a population of 2 trials or more")
    if tuning.scheduler == "asha" and tuning.asha.grace_epochs >= settings.training.epochs:
        faults.append(
            f"tuning.asha.grace_epochs is {tuning.asha.grace_epochs}: no trial can end before its last epoch "
            f"({settings.training.epochs}); lower it or raise training.epochs"
        )
    if faults:
        raise UsageError("; ".join(faults))


def trial_count(tuning: TuningSettings) -> int:
    """How many trials the search has."""
    if tuning.trials is not None:
        return tuning.trials
    count = 1
    for dimension in tuning.space.values():
        count *= len(dimension.values)
    return count


def probes(dimension: DimensionSettings) -> list[Any]:
    """The values of a dimension that show whether all of them fit: the listed ones, or both ends."""
    if dimension.kind == "randint":
        low, high = dimension.values
        return [low, high - 1]
    return dimension.values


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two dumped setting trees and must not, as `key was this, is that`."""
    old, new = _flat(before), _flat(now)
    return [
        f"{key} was {shown(old.get(key))}, is {shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]


def _key_fault(key: str, tuning: TuningSettings) -> str | None:
    where = f"tuning.space.{key}"
    if not key.startswith(TUNABLE):
        return f"{where}: only settings under training and task.options can be tuned"
    for fixed, why in FIXED.items():
        if key == fixed or key.startswith(f"{fixed}."):
            return f"{where}: cannot be tuned; {why}"
    if tuning.scheduler != "none" and key in SAME_EPOCHS:
        return f"{where}: cannot be tuned with scheduler {tuning.scheduler}, which compares trials by epochs"
    movable = key.startswith("training.optimizer.") and not key.startswith(
        ("training.optimizer.name", "training.optimizer.groups", "training.optimizer.schedule")
    )
    if tuning.scheduler == "pbt" and not movable:
        return (
            f"{where}: cannot be tuned with scheduler pbt, which changes settings of a model in training; "
            "numbers under training.optimizer can"
        )
    return None


def _value_faults(settings: Settings, key: str, dimension: DimensionSettings, check: Check) -> list[str]:
    """The faults of each listed value or bound, told once each."""
    faults: dict[str, None] = {}
    for value in probes(dimension):
        try:
            check(trial_settings(settings, Segment(settings.run, {key: value}), None))
        except UsageError as error:
            told = str(error).removeprefix(f"trial run {settings.run}: ")
            faults[f"tuning.space.{key}: {told}"] = None
    return list(faults)


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set one key path in a dumped tree; keys on the way that are not there are made, for the model to refuse."""
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UsageError(f"{path}: {parent} holds {shown(child)}, not further keys")
        node = child
    node[last] = value


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, inner in tree.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}
