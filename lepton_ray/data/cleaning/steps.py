"""What a step of a plan is: how it judges and changes a piece of a table, and what it must learn from all of it first.

A step sees pieces: some columns of the rows of one data file. `apply` works on them with what was learnt; what it needs
of the whole table it asks for in `fitting` (figures folded over all pieces) or `grouping` (rows brought together by a
hash). The kinds of steps are in `value_steps`, `learnt_steps` and `group_steps`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.node import Node

Mask = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
Pieces = dict[str, pa.Table]
"""What a piece has to say: tables by name."""
S = TypeVar("S", bound=Node)


@dataclass(frozen=True)
class Failure:
    """Rows that fail, and what to tell about each."""

    mask: Mask
    column: str
    expected: str
    values: pa.Array | None = None
    """What stands in the column; None where that says nothing."""

    def reason(self, row: int) -> str:
        """One line about one row."""
        if self.values is None:
            return f"{self.column}: {self.expected}"
        value = self.values[row].as_py()
        seen = f"{len(value)} bytes" if isinstance(value, bytes) else "missing" if value is None else shown(value)
        return f"{self.column} is {seen}; expected {self.expected}"


@dataclass
class Applied:
    """What a step did to a piece."""

    rows: pa.Table
    changed: Mask | None = None
    """Rows of which it changed a value; None for none."""
    failures: Sequence[Failure] = ()


class Fitting(ABC):
    """Figures over all rows, learnt in one or more looks at every piece."""

    done: bool = False

    @abstractmethod
    def look(self, rows: pa.Table) -> Pieces:
        """What a piece (rows that are still in) has to say."""

    @abstractmethod
    def narrow(self, answers: Sequence[Pieces]) -> None:
        """Take in what all pieces said, in the order of the data files; sets `done` when nothing more is needed."""

    @abstractmethod
    def result(self) -> Any:
        """What was learnt."""


class Step(ABC, Generic[S]):
    """One step of a plan."""

    drops: ClassVar[bool] = False
    """Rows that fail are left out by the plan's own wish, and not put into quarantine."""

    def __init__(self, index: int, rule: str, settings: S) -> None:
        self.index, self.rule, self.settings = index, rule, settings

    @property
    def leaves_out(self) -> bool:
        """Whether rows that fail are dropped rather than put into quarantine."""
        return self.drops

    @property
    def judges(self) -> bool:
        """Whether rows can fail."""
        return True

    @property
    def columns(self) -> list[str]:
        """The columns it is about."""
        return list(getattr(self.settings, "columns", None) or [])

    def reads(self, schema: pa.Schema) -> set[str]:
        """The columns it looks at."""
        return set(self.columns)

    def writes(self) -> set[str]:
        """The columns it changes."""
        return set()

    def check(self, schema: pa.Schema) -> pa.Schema:
        """The schema after this step. Raises UsageError where the table has not what it needs."""
        for name in sorted(self.reads(schema)):
            if name not in schema.names:
                has = shown(", ".join(schema.names), 200)
                raise UsageError(f"no column {shown(name)}; the table has {has}")
        return schema

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """Judge and change a piece that has at least the columns read."""
        return Applied(rows)

    def fitting(self, schema: pa.Schema) -> Fitting | None:
        """What it must learn before `apply`; None for nothing."""
        return None

    def told(self, learnt: Any) -> dict[str, Any]:
        """What was learnt, as plain JSON for the report."""
        return {}

    def where(self) -> str:
        """The step's place in the plan, for messages."""
        return f"steps.{self.index}.{self.rule}"


def array_of(rows: pa.Table, name: str) -> pa.Array:
    """A column as one array."""
    column = rows[name]
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else (
        pa.array([], column.type)
    )  # fmt: skip


def with_column(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The rows with other values in a column."""
    return rows.set_column(rows.column_names.index(name), pa.field(name, values.type), values)


def check_kind(schema: pa.Schema, columns: Sequence[str], kinds: str) -> None:
    """Raise UsageError where a column is not of one of the kinds `text`, `number`, `time`, `bytes`."""
    for name in columns:
        kind = schema.field(name).type
        fits = {
            "text": pa.types.is_string(kind),
            "number": pa.types.is_integer(kind) or pa.types.is_floating(kind),
            "time": pa.types.is_date(kind) or pa.types.is_timestamp(kind),
            "bytes": pa.types.is_binary(kind),
        }
        if not any(fits[each] for each in kinds.split(" or ")):
            raise UsageError(f"column {shown(name)} holds {kind}; expected {kinds} (see the step type)")
