"""What can be wrong with a run before anything starts: all of it in one go."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from lepton_ray.errors import UsageError
from lepton_ray.settings import Settings
from lepton_ray.tasks import AnyTask


def check_run(settings: Settings, task: AnyTask, schema: pa.Schema) -> None:
    """Check the settings against the task and the table's columns.

    Raises one UsageError with every fault, separated by semicolons.
    """
    training = settings.training
    checks: list[Callable[[], object]] = [
        lambda: task.check_columns(schema),
        lambda: task.direction(training.stopping.metric or task.decides[0]),
        lambda: _check_batch(settings),
        lambda: _check_weights(settings, task, schema),
    ]
    faults = []
    for check in checks:
        try:
            check()
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise UsageError("; ".join(faults))


def _check_batch(settings: Settings) -> None:
    training = settings.training
    least = training.most_workers * training.optimizer.accumulate
    if training.global_batch < least:
        raise UsageError(
            f"training.global_batch is {training.global_batch}: {training.most_workers} workers x "
            f"{training.optimizer.accumulate} parts (training.optimizer.accumulate) need {least} rows or more; "
            "raise it or lower the others"
        )


def _check_weights(settings: Settings, task: AnyTask, schema: pa.Schema) -> None:
    sampling = settings.training.sampling
    if sampling.class_weights == "none" and sampling.weighted == "none":
        return
    if task.label not in schema.names:
        return  # told by check_columns
    kind = schema.field(task.label).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UsageError(
            f"training.sampling weighs rows by class: column {task.label} of task {task.name} holds {kind}; expected "
            "labels; set class_weights and weighted to none"
        )
