"""Training with a loop of one's own: `run_distributed` drives it as the trainer drives a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings import Settings
from lepton_ray.storage import Store, open_store
from lepton_ray.training.driver import Job, RunDriver
from lepton_ray.training.plan import OwnFunction
from lepton_ray.training.progress import Progress
from lepton_ray.training.record import RunRecord
from lepton_ray.training.trainer import TrainingResult


def run_distributed(
    train_function: Callable[..., Any],
    settings: Settings | Mapping[str, Any] | None = None,
    *,
    store: Store | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainingResult:
    """Call a training function on every rank, with checkpoints, exact resume, metrics and the goodput ledger.

    Inside the function `lepton_ray.training.session()` gives rank, device, the wrapped model, batches, and so on.
    The same run name resumes where an earlier attempt stopped; a finished run is not run again.

    Args:
        train_function: takes nothing, or the dictionary `training.options`.
        settings: the tree, or a plain dictionary of it; `run` names the run.
        store: where everything is kept; None takes `LEPTON_STORE`, else `./lepton-store`.
        on_progress: called with the newest figures about once a second.

    Raises UsageError for what is wrong before a worker starts, RefusedError where another driver holds the run,
    LeptonError with the failed rank's own words where the run gives up.
    """
    from lepton_ray.settings import parse_settings

    if not callable(train_function):
        raise UsageError(f"run_distributed: train_function is {shown(train_function)}; expected a function")
    whole = settings if isinstance(settings, Settings) else parse_settings(dict(settings or {}))
    takes = _parameters(train_function)
    if takes > 1:
        raise UsageError(
            f"run_distributed: {train_function.__name__} takes {takes} arguments; expected none, or one (a dictionary)"
        )
    call = train_function if takes == 0 else _with(train_function, dict(whole.training.options))
    kept = store or open_store()
    kept.check_writable()
    driver = RunDriver(whole, kept, on_progress or (lambda _: None))
    name = f"{getattr(train_function, '__module__', '?')}.{getattr(train_function, '__qualname__', '?')}"
    record, resumed = driver.drive(
        _check_same,
        lambda: Job(OwnFunction(call), exact=lambda outcome: outcome["samples_exact"], facts={"function": name}),
    )
    return TrainingResult.of(record, resumed=resumed, generations=len(driver.generations()))


def _parameters(function: Callable[..., Any]) -> int:
    """How many arguments a function must be given."""
    needed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin says nothing of itself
        return 0
    return sum(parameter.kind in needed and parameter.default is parameter.empty for parameter in parameters)


def _with(function: Callable[..., Any], options: dict[str, Any]) -> Callable[[], Any]:
    return lambda: function(options)


def _check_same(record: RunRecord) -> None:
    if record.fields.get("table"):
        raise UsageError(f"run {record.fields['run']}: was started on table {record.fields['table']}; name another run")
