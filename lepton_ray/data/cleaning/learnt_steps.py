"""The steps that learn figures from all rows first: missing values, outliers, labels.

What the pieces say is folded in the order of the data files, so the figures are the same to the last bit however many
workers looked at them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.cleaning import rules
from lepton_ray.data.cleaning.fitting import Interpolation, Moments, MostFrequent, Quantiles, positions
from lepton_ray.data.cleaning.steps import (
    Applied,
    Failure,
    Fitting,
    Step,
    array_of,
    check_kind,
    with_column,
)
from lepton_ray.data.cleaning.value_steps import present, refuse_key
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings import cleaning as settings


class Missing(Step[settings.Missing]):
    """Missing values: the row goes, or a value comes."""

    @property
    def leaves_out(self) -> bool:
        """See Step."""
        return self.settings.fill == "drop"

    @property
    def judges(self) -> bool:
        """See Step."""
        return self.settings.fill in ("drop", "refuse", "interpolate")

    def reads(self, schema: pa.Schema) -> set[str]:
        """See Step."""
        return {*self.columns, *([self.settings.along] if self.settings.along else [])}

    def writes(self) -> set[str]:
        """See Step."""
        return set() if self.settings.fill in ("drop", "refuse") else set(self.columns)

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        fill = self.settings.fill
        if fill in ("drop", "refuse"):
            return schema
        refuse_key(self)
        if fill in ("mean", "median", "interpolate"):
            check_kind(schema, self.columns, "number")
        if fill == "interpolate" and self.settings.along is not None:
            check_kind(schema, [self.settings.along], "number or time")
            if self.settings.along in self.columns:
                raise UsageError(f"along {shown(self.settings.along)}: is one of the columns that are filled")
        if fill == "constant":
            for name in self.columns:
                kind = schema.field(name).type
                if len(rules.fitting([self.settings.value], kind)) == 0:
                    raise UsageError(f"column {shown(name)} holds {kind}; value {shown(self.settings.value)} is none")
        return schema

    def fitting(self, schema: pa.Schema) -> Fitting | None:
        """See Step."""
        kinds: dict[str, type[Moments | Quantiles | MostFrequent]] = {
            "mean": Moments, "median": Quantiles, "most_frequent": MostFrequent,
        }  # fmt: skip
        if self.settings.fill in kinds:
            return kinds[self.settings.fill](self.columns)
        if self.settings.along is not None:
            return Interpolation(self.columns, self.settings.along)
        return None

    def told(self, learnt: Any) -> dict[str, Any]:
        """See Step."""
        if self.settings.fill in ("mean", "median", "most_frequent"):
            return {name: _plain(self._value(name, learnt)) for name in self.columns}
        return {}

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        if self.settings.fill in ("drop", "refuse"):
            masks = [(name, rules.missing(array_of(rows, name))) for name in self.columns]
            return Applied(rows, None, [Failure(mask, name, "is missing") for name, mask in masks])
        changed, failures = np.zeros(rows.num_rows, bool), []
        for name in present(rows, self.columns):
            values = array_of(rows, name)
            lacking = rules.missing(values)
            if not lacking.any():
                continue
            if self.settings.along is not None:
                at, nowhere = positions(array_of(rows, self.settings.along))
                failures.append(Failure(lacking & nowhere, name, f"is missing, and so is {self.settings.along}"))
                lacking &= ~nowhere
                found = learnt[name].at(at)
                lacking &= ~np.isnan(found)  # rows that are out already were not asked about
                filled = pa.array(_whole(found[lacking], values.type), values.type)
                values = pc.replace_with_mask(values, pa.array(lacking), filled)
            else:
                fill = pa.scalar(self._value(name, learnt, values.type), values.type)
                values = pc.if_else(pa.array(lacking), fill, values)
            changed |= lacking
            rows = with_column(rows, name, values)
        return Applied(rows, changed, failures)

    def _value(self, name: str, learnt: Any, kind: pa.DataType | None = None) -> Any:
        """What is put in the place of a missing value."""
        if self.settings.fill == "constant":
            return rules.fitting([self.settings.value], kind)[0].as_py() if kind is not None else self.settings.value
        value = learnt[name]
        if value is None:
            raise UsageError(
                f"{self.where()}: column {shown(name)} has no value to learn from; leave it out of the plan"
            )
        if self.settings.fill == "most_frequent":
            return value
        value = value[0]  # of the moments, or of the quantiles
        return round(value) if kind is not None and pa.types.is_integer(kind) else value


class Outliers(Step[settings.Outliers]):
    """Numbers far from the others."""

    @property
    def judges(self) -> bool:
        """See Step."""
        return self.settings.action == "quarantine"

    def writes(self) -> set[str]:
        """See Step."""
        return set(self.columns) if self.settings.action == "clip" else set()

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        check_kind(schema, self.columns, "number")
        return schema

    def fitting(self, schema: pa.Schema) -> Fitting | None:
        """See Step."""
        return Moments(self.columns) if self.settings.by == "zscore" else Quantiles(self.columns, (0.25, 0.75))

    def told(self, learnt: Any) -> dict[str, Any]:
        """See Step."""
        return {name: list(bounds) for name in self.columns if (bounds := self._bounds(learnt[name])) is not None}

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        changed, failures = np.zeros(rows.num_rows, bool), []
        for name in present(rows, self.columns):
            bounds = self._bounds(learnt[name])
            if bounds is None:
                continue
            values = array_of(rows, name)
            low, high = bounds
            far = rules.outside(values, low, high)
            if not far.any():
                continue
            if self.settings.action == "quarantine":
                failures.append(Failure(far, name, f"{low:.6g} to {high:.6g}, by {self.settings.by}", values))
                continue
            if pa.types.is_integer(values.type):
                low, high = math.ceil(low), math.floor(high)
            inside = pc.max_element_wise(
                pc.min_element_wise(values, pa.scalar(high, values.type)), pa.scalar(low, values.type)
            )
            inside = pc.if_else(pc.or_(pc.is_null(values), pa.array(rules.missing(values))), values, inside)
            changed |= far & ~rules.missing(values)
            rows = with_column(rows, name, inside)
        return Applied(rows, changed, failures)

    def _bounds(self, learnt: Any) -> tuple[float, float] | None:
        """Below and above these a value is far; None where nothing can be said."""
        if learnt is None:
            return None
        first, second = learnt
        if self.settings.by == "zscore":  # mean and standard deviation
            reach = (self.settings.limit or 3.0) * second
            return (first - reach, first + reach) if second > 0 else None
        reach = (self.settings.limit or 1.5) * (second - first)
        return first - reach, second + reach


class Labels(Step[settings.Labels]):
    """What must hold of the labels. Conflicts between rows are found by `group_steps.Conflicts`."""

    @property
    def columns(self) -> list[str]:
        """See Step."""
        return [self.settings.column]

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        kind = schema.field(self.settings.column).type
        if self.settings.classes is not None and not pa.types.is_integer(kind):
            raise UsageError(f"column {shown(self.settings.column)} holds {kind}; classes: N needs whole numbers")
        if self.settings.values is not None and len(rules.fitting(list(self.settings.values), kind)) == 0:
            raise UsageError(f"column {shown(self.settings.column)} holds {kind}; none of the values is one")
        return schema

    def fitting(self, schema: pa.Schema) -> Fitting | None:
        """See Step."""
        return MostFrequent(self.columns, counts=True) if self.settings.min_rows > 1 else None

    def told(self, learnt: Any) -> dict[str, Any]:
        """See Step."""
        return {"rare": [_plain(value) for value in self._rare(learnt)]} if learnt else {}

    def apply(self, rows: pa.Table, learnt: Any) -> Applied:
        """See Step."""
        name = self.settings.column
        values = array_of(rows, name)
        failures = [Failure(rules.missing(values), name, "is missing")]
        if self.settings.classes is not None:
            top = self.settings.classes - 1
            failures.append(Failure(rules.outside(values, 0, top), name, f"a class from 0 to {top}", values))
        if self.settings.values is not None:
            options = list(self.settings.values)
            expected = f"one of {shown(', '.join(str(option) for option in options))}"
            failures.append(Failure(rules.not_among(values, options), name, expected, values))
        if learnt and (rare := self._rare(learnt)):
            expected = f"a label of at least {self.settings.min_rows} rows"
            failures.append(Failure(rules.among(values, rare), name, expected, values))
        return Applied(rows, None, failures)

    def _rare(self, learnt: Any) -> list[Any]:
        return [value for value, count in learnt[self.settings.column].items() if count < self.settings.min_rows]


def _whole(numbers: np.ndarray[Any, Any], kind: pa.DataType) -> np.ndarray[Any, Any]:
    """The nearest whole numbers for a column of such."""
    return np.rint(numbers) if pa.types.is_integer(kind) else numbers


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
