"""What one step of the transforms is: what it learns from the training rows, and what it makes of rows afterwards.

`apply` looks at each row alone, and does to it, bit for bit, the same in a table of a million rows and in a request of
one: elementwise arithmetic in float64, whole-number sums, or one row at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.cleaning.rules import missing
from lepton_ray.data.cleaning.steps import Fitting, array_of
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.node import Node

Float64Array = npt.NDArray[np.float64]
S = TypeVar("S", bound=Node)


class Nothing(Node):
    """What a step has learnt that learns nothing."""


class Transform(ABC, Generic[S]):
    """One step. `learnt` is what `learn` gave, or the same read from a stored model."""

    Learnt: ClassVar[type[Node]] = Nothing
    """What it learns: JSON-able, checked when it is read back."""
    kinds: ClassVar[str] = "number"
    """What its columns may hold: see `family`."""

    def __init__(self, index: int, rule: str, settings: S) -> None:
        self.index, self.rule, self.settings = index, rule, settings

    @property
    def columns(self) -> list[str]:
        """The columns that it changes."""
        several = getattr(self.settings, "columns", None)
        return list(several) if several else [getattr(self.settings, "column")]  # noqa: B009 - typed by the subclass

    @property
    def reads(self) -> list[str]:
        """The columns that it looks at."""
        return self.columns

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that it looks at where there are such."""
        return ()

    def check(self, schema: pa.Schema) -> pa.Schema:
        """The schema after this step. Raises UsageError where a column is missing or holds something else."""
        for name in self.reads:
            if name not in schema.names:
                raise UsageError(
                    f"{self.where()}: no column {shown(name)}; there are {shown(', '.join(schema.names), 200)}"
                )
        for name in self.columns:
            found = family(schema.field(name).type)
            if found not in self.kinds.split(" or "):
                raise UsageError(
                    f"{self.where()}: column {shown(name)} holds {schema.field(name).type}; expected {self.kinds}"
                )
        return self.after(schema)

    def after(self, schema: pa.Schema) -> pa.Schema:
        """The schema after this step, whose columns are known to fit."""
        return schema

    def fitting(self) -> Fitting | None:
        """What is to be learnt from all training rows; None for nothing."""
        return None

    def learn(self, result: Any) -> Node:
        """What the step keeps of it. Raises UsageError where nothing can be learnt."""
        return self.Learnt()

    def complete(self, learnt: Any) -> bool:
        """Whether what was read back says something of each column."""
        found = getattr(learnt, "columns", None) or getattr(learnt, "values", None)
        return not isinstance(found, dict) or set(found) == set(self.columns)

    @abstractmethod
    def apply(self, rows: pa.Table, learnt: Any) -> pa.Table:
        """The rows after this step. Raises UsageError naming the row and the column of a value that does not fit."""

    def where(self) -> str:
        """The step's place, for messages."""
        return f"steps.{self.index}.{self.rule}"

    def numbers(self, rows: pa.Table, name: str) -> Float64Array:
        """The numbers of a column. Raises UsageError for a missing one, or one that is not finite."""
        made = as_float64(array_of(rows, name), name)
        wrong = ~np.isfinite(made)
        if wrong.any():
            row = int(np.argmax(wrong))
            value = array_of(rows, name)[row].as_py()
            raise UsageError(
                f"{self.where()}: {shown(name)} of row {row} is {'missing' if value is None else shown(value)}; "
                "expected a number: put an impute step before this one, or clean the table"
            )
        return made


def family(kind: pa.DataType) -> str:
    """What a column holds: `number`, `text`, `bool`, `bytes`, `tokens` (lists of one length), or its type's own name.

    Tables of a family are interchangeable for a model: an int32 where it was trained with int64 is the same number.
    """
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytes"
    return str(kind)


def as_float64(values: pa.Array, name: str) -> Float64Array:
    """Numbers of any type as float64, NaN where one is missing. Raises UsageError where one has no exact float64."""
    try:
        made = values.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise UsageError(
            f"column {shown(name)}: {shown(str(error), 120)}; scale it down or give it as float"
        ) from error
    return made.fill_null(float("nan")).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def first_missing(values: pa.Array) -> int | None:
    """The first row without a value."""
    mask = missing(values)
    return int(np.argmax(mask)) if mask.any() else None


def replaced(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The rows with other values, perhaps of another type, in a column."""
    return rows.set_column(rows.column_names.index(name), pa.field(name, values.type), values)


def added(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The rows with one more column."""
    return rows.append_column(pa.field(name, values.type), values)


def with_field(schema: pa.Schema, name: str, kind: pa.DataType) -> pa.Schema:
    """The schema with a column of another type, or with one more."""
    if name in schema.names:
        return schema.set(schema.get_field_index(name), pa.field(name, kind))
    return schema.append(pa.field(name, kind))


def vectors(values: npt.NDArray[Any]) -> pa.Array:
    """`[rows, width]` as lists of one length."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def codes_of(values: pa.Array, known: Sequence[Any]) -> npt.NDArray[np.int32]:
    """The place of each value among the known ones, from 0; -1 where it is missing or unknown."""
    places = pc.index_in(values, pa.array(known, values.type))
    return places.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)  # type: ignore[no-any-return]
