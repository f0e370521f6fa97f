"""Rows of numbers and categories: a class or a number for each row. The model is an MLP with embeddings."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lepton_ray.data.transforms import Pipeline, matrix
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.transforms import Transforms, TransformStep
from lepton_ray.tasks.classifying import ClassifiesByLabels, LabelAnswer
from lepton_ray.tasks.task import CLASSIFICATION, Task

if TYPE_CHECKING:
    import torch
    from torchmetrics import Metric

MAX_CLASSES = 10_000
MAX_COLUMNS = 10_000
Cell = bool | int | float | str | None


class TabularOptions(BaseModel):
    """Options of both tasks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    columns: Annotated[list[str], Field(min_length=1, max_length=MAX_COLUMNS)] | None = None
    """The columns to learn from; all but `key` and `label` where none are given."""
    transforms: Annotated[list[TransformStep], Field(min_length=1)] | None = None
    """How they become numbers (docs/transforms.md). Where none are given: missing numbers are filled with the median,
    which a column of its own tells, and standardised; text and bool become embeddings."""
    hidden: Annotated[list[Annotated[int, Field(ge=1, le=65_536)]], Field(max_length=64)] = [128, 64]
    """Width of each hidden layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of activations dropped after each hidden layer in training."""
    embedding: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Numbers that stand for a category; by default 1.6 times the 0.56th power of their count, 50 at most."""

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ValueError("columns: one stands twice; name each once")
        return self


class TabularRequest(BaseModel):
    """One row: a value for each column that the model takes; null where it is missing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    row: Annotated[dict[str, Cell], Field(min_length=1, max_length=MAX_COLUMNS)]


class ValueAnswer(BaseModel):
    """The predicted number."""

    value: float


class _Tabular(Task[TabularOptions, TabularRequest]):
    """What both tasks have in common."""

    Options: ClassVar[type[BaseModel]] = TabularOptions
    Request: ClassVar[type[BaseModel]] = TabularRequest
    columns: ClassVar[tuple[str, ...]] = ("label",)

    def fit(self, rows: pa.Table) -> dict[str, Any]:
        """The pipeline, fitted; the columns in the order in which the model takes them; what the label needs."""
        if rows.num_rows == 0:
            raise UsageError("training rows: there are none; ingest a table with rows")
        columns = self.options.columns or [name for name in rows.column_names if name not in ("key", "label")]
        for name in columns:
            if name not in rows.column_names:
                raise UsageError(f"task.options.columns: no column {shown(name)}; the table has "
                                 f"{shown(', '.join(rows.column_names), 200)}")  # fmt: skip
        told = Transforms(steps=self.options.transforms) if self.options.transforms else default_steps(rows, columns)
        pipeline = Pipeline.fit(told, rows.select(columns))
        after = pipeline.apply(rows.select(columns).slice(0, 1))
        categories = _categories(pipeline, after.column_names)
        numbers = [name for name in after.column_names if name not in categories]
        plain = {name: _kind(rows.schema.field(name).type) for name in columns}
        return {
            "pipeline": pipeline.to_json(), "columns": plain, "numbers": numbers, "categories": categories,
            "width": int(matrix(after, numbers).shape[1]), "example": {name: typical(rows[name]) for name in columns},
            **self.fit_labels(rows),
        }  # fmt: skip

    @abstractmethod
    def fit_labels(self, rows: pa.Table) -> dict[str, Any]:
        """What is learnt of the labels."""

    @abstractmethod
    def outputs_wanted(self, transforms: Mapping[str, Any]) -> int:
        """Numbers that the model gives for a row."""

    def build(self, transforms: Mapping[str, Any]) -> torch.nn.Module:
        """The MLP for the fitted columns."""
        from lepton_ray.tasks.mlp import TabularMlp

        return TabularMlp(
            numbers=transforms["width"], categories=list(transforms["categories"].values()),
            embedding=self.options.embedding, hidden=self.options.hidden, outputs=self.outputs_wanted(transforms),
            dropout=self.options.dropout,
        )  # fmt: skip

    def inputs(self, rows: pa.Table, transforms: Mapping[str, Any]) -> torch.Tensor:
        """Numbers, and after them the number of each category, as float32 `[rows, columns]`."""
        import torch

        pipeline = Pipeline.parse(transforms["pipeline"])
        after = pipeline.apply(rows.select([name for name in transforms["columns"] if name in rows.column_names]))
        return torch.from_numpy(matrix(after, [*transforms["numbers"], *transforms["categories"]]))

    def rows_of(self, requests: Sequence[TabularRequest], transforms: Mapping[str, Any]) -> pa.Table:
        """Requests as rows of the types that the model was trained on."""
        kinds: Mapping[str, str] = transforms["columns"]
        for position, request in enumerate(requests):
            lacking, beyond = kinds.keys() - request.row.keys(), request.row.keys() - kinds.keys()
            if lacking or beyond:
                what = "lacks" if lacking else "has unknown"
                raise UsageError(
                    f"row of item {position} {what} {shown(min(lacking or beyond))}: expected "
                    f"{shown(', '.join(kinds), 200)} (null where a value is missing)"
                )
        return pa.table(
            {name: _column(name, kind, [each.row[name] for each in requests]) for name, kind in kinds.items()}
        )

    def example(self, transforms: Mapping[str, Any]) -> TabularRequest:
        """A typical value for each column."""
        return TabularRequest(row=transforms["example"])


class TabularClassification(ClassifiesByLabels, _Tabular):
    """One of a fixed number of labels for each row.

    Rows: any columns of numbers, text or bool, and `label` (whole numbers, text or bool).
    """

    name: ClassVar[str] = "tabular_classification"
    Answer: ClassVar[type[BaseModel]] = LabelAnswer
    decides: ClassVar[tuple[str, Literal["max", "min"]]] = ("accuracy", "max")
    directions: ClassVar[Mapping[str, Literal["max", "min"]]] = {"loss": "min", **CLASSIFICATION}

    def fit_labels(self, rows: pa.Table) -> dict[str, Any]:
        """The labels, sorted."""
        labels = sorted(set(_labels(rows)))
        if not 2 <= len(labels) <= MAX_CLASSES:
            raise UsageError(
                f"label has {len(labels)} different values: expected 2 to {MAX_CLASSES}; clean the table, or use task "
                "tabular_regression for numbers"
            )
        return {"labels": labels}

    def outputs_wanted(self, transforms: Mapping[str, Any]) -> int:
        """One for each label."""
        return len(transforms["labels"])

    def check_rows(self, rows: pa.Table, transforms: Mapping[str, Any]) -> None:
        """UsageError for a column that the model cannot take, or a label that the training rows do not have."""
        Pipeline.parse(transforms["pipeline"]).check(rows.schema)
        known = set(transforms["labels"])
        wrong = next((label for label in _labels(rows) if label not in known), None)
        if wrong is not None:
            raise UsageError(f"label is {shown(wrong)}: the model knows {shown(transforms['labels'])}; clean the table")

    def targets(self, rows: pa.Table, transforms: Mapping[str, Any]) -> torch.Tensor:
        """Places of the labels among the sorted labels, as int64 `[rows]`."""
        import torch

        self.check_rows(rows, transforms)
        places = {label: place for place, label in enumerate(transforms["labels"])}
        return torch.from_numpy(np.array([places[label] for label in _labels(rows)], np.int64))


class TabularRegression(_Tabular):
    """A number for each row. Rows: any columns of numbers, text or bool, and `label` (a number)."""

    name: ClassVar[str] = "tabular_regression"
    Answer: ClassVar[type[BaseModel]] = ValueAnswer
    decides: ClassVar[tuple[str, Literal["max", "min"]]] = ("rmse", "min")
    directions: ClassVar[Mapping[str, Literal["max", "min"]]] = {"loss": "min", "mae": "min"}

    def fit_labels(self, rows: pa.Table) -> dict[str, Any]:
        """Mean and standard deviation: the model learns the label standardised."""
        labels = _values(rows)
        deviation = float(labels.std())
        return {"mean": float(labels.mean()), "deviation": deviation if deviation > 0 else 1.0}

    def outputs_wanted(self, transforms: Mapping[str, Any]) -> int:
        """One, in units of the label's standard deviation from its mean."""
        return 1

    def check_rows(self, rows: pa.Table, transforms: Mapping[str, Any]) -> None:
        """UsageError for a column that the model cannot take, or a label that is no finite number."""
        Pipeline.parse(transforms["pipeline"]).check(rows.schema)
        _values(rows)

    def targets(self, rows: pa.Table, transforms: Mapping[str, Any]) -> torch.Tensor:
        """Labels minus their mean, in units of their standard deviation, float64 `[rows]`."""
        import torch

        return torch.from_numpy((_values(rows) - transforms["mean"]) / transforms["deviation"])

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
        """Squared difference of each row, in units of the label's variance."""
        return (outputs[:, 0] - targets.to(outputs.dtype)) ** 2

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Squared difference of each row, in units of the label's variance: 1 is as good as always saying the mean."""
        return {"loss": (outputs[:, 0].double() - targets) ** 2}

    def metrics(self, transforms: Mapping[str, Any]) -> dict[str, Metric]:
        """Root mean squared error and mean absolute error, in the label's own unit."""
        from lepton_ray.tasks.metrics import regression

        return regression()

    def compared(self, outputs: torch.Tensor, targets: torch.Tensor, transforms: Mapping[str, Any]) -> tuple[Any, Any]:
        """Predicted and true numbers, float64 `[rows]`."""
        deviation, mean = transforms["deviation"], transforms["mean"]
        return outputs[:, 0].double() * deviation + mean, targets.double() * deviation + mean

    def answers(self, outputs: torch.Tensor, transforms: Mapping[str, Any]) -> list[BaseModel]:
        """The numbers, in the label's own unit."""
        values = outputs[:, 0].double() * transforms["deviation"] + transforms["mean"]
        return [ValueAnswer(value=value) for value in values.tolist()]


def default_steps(rows: pa.Table, columns: Sequence[str]) -> Transforms:
    """What is done where the options say nothing, from the types of the columns and which of them lack values."""
    numbers = [name for name in columns if _kind(rows.schema.field(name).type) in ("integer", "float")]
    others = [name for name in columns if name not in numbers]
    steps: list[dict[str, Any]] = []
    for indicator in (True, False):
        lacking = [name for name in numbers if bool(_missing(rows[name])) is indicator]
        if lacking:
            steps.append({"impute": {"columns": lacking, "fill": "median", "indicator": indicator}})
    if numbers:
        steps.append({"standardise": {"columns": numbers}})
    if others:
        steps.append({"ordinal": {"columns": others}})
    return Transforms.model_validate({"steps": steps})


def typical(column: pa.ChunkedArray) -> Cell:
    """A value that a column may have, of no row in particular: the median, or the most frequent one; None for none.

    The example of a request is shown to every client; a training row is nobody's business.
    """
    known = column.drop_null()
    if pa.types.is_floating(column.type):
        known = known.filter(pc.is_finite(known))
    if len(known) == 0:
        return None
    if _kind(column.type) in ("integer", "float"):
        value: Cell = pc.quantile(known, 0.5, interpolation="nearest")[0].as_py()
        return value
    counted = known.value_counts()
    most: Cell = counted[int(np.argmax(counted.field("counts").to_numpy()))]["values"].as_py()
    return most


def _missing(column: pa.ChunkedArray) -> int:
    return int(pc.sum(pc.is_null(column, nan_is_null=pa.types.is_floating(column.type))).as_py() or 0)


def _categories(pipeline: Pipeline, names: Sequence[str]) -> dict[str, int]:
    """The columns that end as numbers of categories, and how many there are, 0 included."""
    found: dict[str, int] = {}
    for step, learnt in zip(pipeline.told.steps, pipeline.learnt, strict=True):
        if step.ordinal is not None:
            values: Mapping[str, Any] = learnt.values  # type: ignore[attr-defined] # what ordinal learns
            found |= {name: 1 + len(values[name]) for name in step.ordinal.columns}
        elif step.hashing is not None:
            found |= dict.fromkeys(step.hashing.columns, 1 + step.hashing.buckets)
    return {name: count for name, count in found.items() if name in names}


def _kind(kind: pa.DataType) -> str:
    """What a cell of a request must be."""
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    raise UsageError(f"a column holds {kind}: expected numbers, text or bool; leave it out by task.options.columns")


def _column(name: str, kind: str, values: Sequence[Cell]) -> pa.Array:
    """Cells of requests as a column. Raises UsageError for a value of another type: nothing is cast."""
    takes: tuple[type, ...] = {"bool": (bool,), "integer": (int,), "float": (int, float), "text": (str,)}[kind]
    for position, value in enumerate(values):
        if value is None:
            continue
        right = isinstance(value, takes) and isinstance(value, bool) == (kind == "bool")
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(f"{shown(name)} of item {position} is {shown(value)}: expected {kind}, or null")
    types = {"bool": pa.bool_(), "integer": pa.int64(), "float": pa.float64(), "text": pa.string()}
    try:
        return pa.array(values, types[kind])
    except (pa.ArrowInvalid, OverflowError) as error:
        raise UsageError(f"{shown(name)}: {shown(str(error), 120)}; expected {kind} of 64 bits") from error


def _labels(rows: pa.Table) -> list[Any]:
    column = rows["label"]
    if pa.types.is_boolean(column.type):
        column = pc.cast(column, pa.int64())
    elif _kind(column.type) not in ("integer", "text"):
        raise UsageError(f"column label holds {column.type}: expected whole numbers or text; use task "
                         "tabular_regression for numbers")  # fmt: skip
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise UsageError(f"label of row {row} is null: expected a label in every row; clean the table")
    found: list[Any] = column.to_pylist()
    return found


def _values(rows: pa.Table) -> np.ndarray[Any, np.dtype[np.float64]]:
    column = rows["label"]
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise UsageError(
            f"column label holds {column.type}: expected numbers; use task tabular_classification for classes"
        )
    values: np.ndarray[Any, np.dtype[np.float64]] = pc.fill_null(pc.cast(column, pa.float64()), float("nan")).to_numpy()
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise UsageError(f"label of row {row} is {shown(column[row].as_py())}: expected a number; clean the table")
    return values
