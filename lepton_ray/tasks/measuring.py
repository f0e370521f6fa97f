"""How well a model does on rows, exactly: the same figures whatever the number of ranks that share the rows.

Rows are cut to batches at fixed places and each batch is computed as a whole by one rank, so that every output has the
same bits at any world size. What is kept of a batch is either a whole number (counts, added up) or kept per batch and
joined in the order of the batches; means over rows are sums without rounding (`math.fsum`). So no figure depends on
who computed what, and each row counts once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lepton_ray.errors import UsageError
from lepton_ray.tasks.task import AnyTask

if TYPE_CHECKING:
    from torchmetrics import Metric

EVALUATION_BATCH = 256
"""Rows computed together. Part of what a figure is: another size may round the model's outputs otherwise."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


@dataclass(frozen=True)
class Evaluation:
    """What a model does on some rows."""

    metrics: dict[str, float]
    """Value by name. A metric that is not defined for these rows (ROC-AUC of rows of one class) is left out; a mean
    over rows (the loss) is always there, also where it is not finite."""
    tables: dict[str, Any] = field(default_factory=dict)
    """Nested lists by name: `confusion_matrix` has a row per true class and a column per predicted one."""
    rows: int = 0
    """Rows evaluated."""

    def dumps(self) -> bytes:
        """The bytes that `loads` takes; between ranks only, NaN included."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def loads(cls, data: bytes) -> Evaluation:
        """What `dumps` gave."""
        return cls(**json.loads(data))


@dataclass(frozen=True)
class TensorRows:
    """Rows that are in memory: inputs and targets as `Task.inputs` and `Task.targets` make them."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, ids: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the rows `ids`, in that order."""
        chosen = torch.from_numpy(ids).to(self.inputs.device)
        return self.inputs[chosen], self.targets[chosen]


class Measures:
    """What is kept of the batches that one process computed.

    Args:
        task: gives `scores` (a value per row, averaged) and `metrics` (of torchmetrics).
        transforms: the fitted transforms.
        device: where the outputs are.
    """

    def __init__(self, task: AnyTask, transforms: Mapping[str, Any], device: torch.device) -> None:
        self._task, self._transforms = task, transforms
        self._metrics = {name: metric.to(device) for name, metric in _checked(task, transforms).items()}
        self._scores: dict[str, list[torch.Tensor]] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._parts: dict[str, torch.Tensor] = {}
        self._rows = 0

    def update(self, batch: int, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in a batch.

        Args:
            batch: its number, counted over all ranks; each number once.
            outputs: what the model gave for its rows.
            targets: what was to be predicted.
        """
        self._rows += len(targets)
        if outputs.is_floating_point():
            outputs = outputs.float()  # bf16 and fp16 of autocast: a softmax over them would round
        for name, values in self._task.scores(outputs, targets).items():
            self._scores.setdefault(name, []).append(values.detach().double().reshape(-1))
        if self._metrics:
            compared = self._task.compared(outputs, targets, self._transforms)
        for name, metric in self._metrics.items():
            metric.reset()
            metric.update(*compared)
            for state in metric._defaults:  # noqa: SLF001 - torchmetrics has no other list of a metric's states
                self._keep(batch, f"{name}/{state}", getattr(metric, state), metric)

    def _keep(self, batch: int, key: str, value: Any, metric: Metric) -> None:
        """Add whole numbers to those before; keep anything else with the number of its batch."""
        if isinstance(value, list):
            for index, entry in enumerate(value):
                if not isinstance(entry, torch.Tensor):
                    raise TypeError(f"metric {key}: holds {type(entry).__name__}; expected tensors")
                # a copy: safetensors takes no two tensors of one memory, such as a label used twice
                self._parts[f"{key}/{batch:09d}/{index:06d}"] = entry.detach().clone()
        elif not value.is_floating_point() and metric._reductions[key.split("/")[1]] is _sum():  # noqa: SLF001 - as above
            self._counts[key] = self._counts[key] + value if key in self._counts else value
        else:
            self._parts[f"{key}/{batch:09d}"] = value.detach().clone()

    def state(self) -> bytes:
        """All of it as safetensors, for `joined`."""
        scores = {name: exact_parts(torch.cat(values).tolist()) for name, values in self._scores.items()}
        return save_tensors(
            {
                "rows": torch.tensor(self._rows),
                **{f"score/{name}": torch.tensor(parts, dtype=torch.float64) for name, parts in scores.items()},
                **{f"count/{key}": value.cpu().contiguous() for key, value in self._counts.items()},
                **{f"part/{key}": value.cpu().contiguous() for key, value in self._parts.items()},
            }
        )


def joined(task: AnyTask, transforms: Mapping[str, Any], states: Iterable[bytes]) -> Evaluation:
    """The figures over all rows from the states of all processes."""
    scores: dict[str, list[float]] = {}
    counts: dict[str, torch.Tensor] = {}
    parts: dict[str, torch.Tensor] = {}
    rows = 0
    for state in states:
        for key, value in load_tensors(state).items():
            kind, _, name = key.partition("/")
            if kind == "rows":
                rows += int(value)
            elif kind == "score":
                scores.setdefault(name, []).extend(value.tolist())
            elif kind == "count":
                counts[name] = counts[name] + value if name in counts else value
            else:
                parts[name] = value
    metrics = {name: _exact_sum(values) / rows for name, values in scores.items()}
    tables: dict[str, Any] = {}
    for name, metric in _checked(task, transforms).items():
        for key, value in _computed(name, metric, counts, parts).items():
            if value.numel() == 1:
                if not math.isnan(float(value)):
                    metrics[key] = float(value)
            else:
                tables[key] = value.tolist()
    # the one that decides first: where there is room for one, readers show that
    return Evaluation({name: metrics[name] for name in sorted(metrics, key=task.decides[0].__ne__)}, tables, rows)


def exact_parts(values: Sequence[float]) -> list[float]:
    """A few numbers whose exact sum is that of `values`: what is left over is taken up until nothing is.

    With them sums may be cut and joined in any way and still round only once (Shewchuk 1997, "Adaptive precision
    floating-point arithmetic"; `math.fsum`). Where a value is not finite, the plain sum alone.
    """
    parts: list[float] = []
    try:
        while (left := math.fsum([*values, *(-part for part in parts)])) != 0.0:
            parts.append(left)
            if not math.isfinite(left):
                return [left]
    except (ValueError, OverflowError):  # infinities of both signs; a sum beyond the largest number
        return [math.nan]
    return parts


def _exact_sum(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan


def _computed(
    name: str, metric: Metric, counts: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The metric's values, from states set to what all batches together gave."""
    import warnings

    for state, default in metric._defaults.items():  # noqa: SLF001 - as above
        key = f"{name}/{state}"
        own = [parts[part] for part in sorted(parts) if part.startswith(f"{key}/")]  # in the order of the batches
        if isinstance(default, list):
            setattr(metric, state, own)
        elif key in counts:
            setattr(metric, state, counts[key])
        else:
            setattr(metric, state, _reduced(key, own, metric._reductions[state]))  # noqa: SLF001 - as above
    metric._update_count = 1  # noqa: SLF001 - the states were filled without `update`
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not defined is NaN here, and told as such
        value = metric.compute()
    values = value if isinstance(value, Mapping) else {name: value}
    return {str(key): torch.as_tensor(each) for key, each in values.items()}


def _reduced(key: str, own: list[torch.Tensor], reduction: Any) -> torch.Tensor:
    from torchmetrics.utilities import dim_zero_mean

    if reduction is dim_zero_mean:
        raise TypeError(f"metric {key}: averages over processes, which is not the mean over rows; keep sum and count")
    stacked = torch.stack(own)
    if reduction is None:
        return stacked
    reduced: torch.Tensor = reduction(stacked)
    return reduced


def _sum() -> Any:
    from torchmetrics.utilities import dim_zero_sum

    return dim_zero_sum


def _checked(task: AnyTask, transforms: Mapping[str, Any]) -> dict[str, Metric]:
    metrics = task.metrics(transforms)
    for name in metrics:
        if not _NAME.fullmatch(name):
            raise UsageError(f"task {task.name}: metric {name!a}; expected a name of a-z, 0-9 and _, a letter first")
    return metrics
