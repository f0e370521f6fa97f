"""The `Task` interface: everything that training and serving need to know of what is learnt."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.loading import describe_errors

if TYPE_CHECKING:
    import torch
    from torchmetrics import Metric

ENTRY_POINT_GROUP = "lepton_ray.tasks"

SHIPPED = {
    "image_classification": "lepton_ray.tasks.image_classification:ImageClassification",
    "tabular_classification": "lepton_ray.tasks.tabular:TabularClassification",
    "tabular_regression": "lepton_ray.tasks.tabular:TabularRegression",
    "text_classification": "lepton_ray.tasks.text_classification:TextClassification",
}
"""Tasks of this package. They need no installed metadata, so a source tree sent as a job's working folder has them."""

CLASSIFICATION: Mapping[str, Literal["max", "min"]] = {
    "f1": "max",
    "precision": "max",
    "recall": "max",
    "roc_auc": "max",
}
"""Directions of the metrics that `lepton_ray.tasks.metrics.classification` gives."""

OptionsT = TypeVar("OptionsT", bound=BaseModel)
RequestT = TypeVar("RequestT", bound=BaseModel)


class Task(ABC, Generic[OptionsT, RequestT]):
    """One kind of learning problem. A subclass is found by name through the entry point group `lepton_ray.tasks`.

    `fit` and the checks run in the driver, which computes nothing else: a task imports torch where it needs it, not at
    its top. Rows are Arrow tables as the data room stores them; `transforms` is the JSON-able result of `fit` on the
    training rows, stored with the model and applied unchanged in serving.
    """

    name: ClassVar[str]
    """The name in `task.name`, in the entry point and in a model's card."""
    Options: ClassVar[type[BaseModel]]
    """The type of `task.options`; frozen, unknown keys refused."""
    Request: ClassVar[type[BaseModel]]
    """One thing to predict, as a client sends it."""
    Answer: ClassVar[type[BaseModel]]
    """What is predicted for it."""
    columns: ClassVar[tuple[str, ...]]
    """Columns that a table must have to be learnt from."""
    label: ClassVar[str] = "label"
    """The column to predict."""
    decides: ClassVar[tuple[str, Literal["max", "min"]]]
    """The metric that says which model is better, and in which direction."""
    directions: ClassVar[Mapping[str, Literal["max", "min"]]] = {"loss": "min"}
    """Every other metric by which a run may be stopped, with its better direction; known without torch, so that a
    metric that the task lacks is told before a worker starts."""

    @classmethod
    def direction(cls, metric: str) -> tuple[str, Literal["max", "min"]]:
        """A metric with its better direction. Raises UsageError for one that the task lacks."""
        known = {cls.decides[0]: cls.decides[1], **cls.directions}
        if metric not in known:
            raise UsageError(f"metric {shown(metric)}: task {cls.name} has {', '.join(sorted(known))}")
        return metric, known[metric]

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def check_columns(self, schema: pa.Schema) -> None:
        """Raise UsageError where the table lacks a column of the task."""
        missing = [column for column in self.columns if column not in schema.names]
        if missing:
            raise UsageError(
                f"table lacks column {', '.join(missing)}: task {self.name} needs {', '.join(self.columns)}, "
                f"it has {shown(', '.join(schema.names))}; ingest it with these columns"
            )

    @abstractmethod
    def fit(self, rows: pa.Table) -> dict[str, Any]:
        """Learn the transforms on the training rows only.

        Raises UsageError for rows that cannot be learnt from (e.g. a label outside the classes).
        """

    @abstractmethod
    def check_rows(self, rows: pa.Table, transforms: Mapping[str, Any]) -> None:
        """Raise UsageError for labelled rows that a model with these transforms cannot take."""

    @abstractmethod
    def build(self, transforms: Mapping[str, Any]) -> torch.nn.Module:
        """The untrained model. It takes what `inputs` returns (a batch of it) and gives the outputs."""

    @abstractmethod
    def inputs(self, rows: pa.Table, transforms: Mapping[str, Any]) -> torch.Tensor:
        """Rows as one tensor, first dimension the rows, in the cheapest type that loses nothing."""

    @abstractmethod
    def targets(self, rows: pa.Table, transforms: Mapping[str, Any]) -> torch.Tensor:
        """What is to be predicted, one entry per row."""

    def augment(self, inputs: torch.Tensor, seeds: npt.NDArray[np.uint64]) -> torch.Tensor:
        """Training inputs, changed at random.

        `seeds` holds one 64-bit seed per row, a function of run seed and sample position alone, so that a sample is
        changed in the same way whatever the number of ranks and after any restart. The default changes nothing.
        """
        return inputs

    @abstractmethod
    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
        """The loss of each row, shape `[rows]`."""

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Per metric the value of each row, shape `[rows]`; the metric is its mean over all rows.

        A task gives scores, `metrics`, or both; the metric that `decides` must be among them.
        """
        return {}

    def metrics(self, transforms: Mapping[str, Any]) -> dict[str, Metric]:
        """Metrics that are no mean over rows, by name: new ones at each call; see `lepton_ray.tasks.metrics`.

        One that computes a table (a confusion matrix) is told as a table, one that computes a dictionary of numbers as
        one metric for each of its keys.
        """
        return {}

    def compared(self, outputs: torch.Tensor, targets: torch.Tensor, transforms: Mapping[str, Any]) -> tuple[Any, Any]:
        """Predictions and truth of a batch as each of `metrics` takes them; the default gives outputs and targets."""
        return outputs, targets

    @abstractmethod
    def rows_of(self, requests: Sequence[RequestT], transforms: Mapping[str, Any]) -> pa.Table:
        """Requests as rows without a label.

        Raises UsageError naming what does not fit, e.g. an image of another size.
        """

    @abstractmethod
    def example(self, transforms: Mapping[str, Any]) -> RequestT:
        """One request that fits the model: warms a replica up and shows clients what to send."""

    @abstractmethod
    def answers(self, outputs: torch.Tensor, transforms: Mapping[str, Any]) -> list[BaseModel]:
        """Outputs of the model as answers, one per row."""


AnyTask = Task[Any, Any]


def find_task(name: str, options: Mapping[str, Any] | None = None) -> AnyTask:
    """The task of that name with its options checked.

    Raises UsageError for an unknown name (listing what is installed) or a wrong option.
    """
    shipped = (importlib.metadata.EntryPoint(*item, ENTRY_POINT_GROUP) for item in SHIPPED.items())
    found = {entry.name: entry for entry in (*importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), *shipped)}
    if name not in found:
        raise UsageError(f"task.name is {shown(name)}: no such task; installed: {', '.join(sorted(found))}")
    kind = found[name].load()
    try:
        return kind(kind.Options.model_validate(dict(options or {})))  # type: ignore[no-any-return]
    except ValidationError as error:
        raise UsageError(describe_errors(error, kind.Options, prefix="task.options.")) from error
