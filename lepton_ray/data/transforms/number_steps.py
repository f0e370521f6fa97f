"""Steps on numbers: filling in what is missing, and scaling."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.cleaning.fitting import Moments, MostFrequent, Quantiles, numbers_in
from lepton_ray.data.cleaning.rules import fitting as fitting_values
from lepton_ray.data.cleaning.rules import missing
from lepton_ray.data.cleaning.steps import Fitting, Pieces, array_of
from lepton_ray.data.transforms.step import Float64Array, Transform, added, as_float64, family, replaced, with_field
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings import transforms as settings
from lepton_ray.settings.node import Node


class Extremes(Fitting):
    """The smallest and the largest finite number of each column; None where none is."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._found: dict[str, tuple[float, float] | None] = {}

    def look(self, rows: pa.Table) -> Pieces:
        """See Fitting."""
        numbers = [numbers_in(array_of(rows, name)) for name in self._columns]
        low = [float(each.min()) if len(each) else None for each in numbers]
        high = [float(each.max()) if len(each) else None for each in numbers]
        return {"extremes": pa.table({"low": pa.array(low, pa.float64()), "high": pa.array(high, pa.float64())})}

    def narrow(self, answers: Sequence[Pieces]) -> None:
        """See Fitting."""
        for index, name in enumerate(self._columns):
            pairs = [[answer["extremes"][end][index].as_py() for end in ("low", "high")] for answer in answers]
            known = [(low, high) for low, high in pairs if low is not None]
            self._found[name] = (min(low for low, _ in known), max(high for _, high in known)) if known else None
        self.done = True

    def result(self) -> dict[str, tuple[float, float] | None]:
        """See Fitting."""
        return self._found


class Filled(Node):
    """What stands in the place of a missing value, by column."""

    values: dict[str, settings.Value]


class Impute(Transform[settings.Impute]):
    """See `settings.transforms.Impute`. Numbers become float64."""

    Learnt = Filled

    @property
    def kinds(self) -> str:  # type: ignore[override] # it depends on the fill
        """See Transform."""
        return "number" if self.settings.fill in ("mean", "median") else "number or text or bool"

    def after(self, schema: pa.Schema) -> pa.Schema:
        """See Transform."""
        for name in self.columns:
            kind = schema.field(name).type
            if self.settings.fill == "constant" and len(fitting_values([self.settings.value], _target(kind))) == 0:
                raise UsageError(
                    f"{self.where()}: column {shown(name)} holds {kind}; value {shown(self.settings.value)} is none"
                )
            schema = with_field(schema, name, _target(kind))
            if self.settings.indicator:
                if f"{name}_missing" in schema.names:
                    raise UsageError(f"{self.where()}: there is a column {shown(name + '_missing')} already; rename it")
                schema = with_field(schema, f"{name}_missing", pa.int8())
        return schema

    def fitting(self) -> Fitting | None:
        """See Transform."""
        kinds: dict[str, type[Moments | Quantiles | MostFrequent]] = {
            "mean": Moments, "median": Quantiles, "most_frequent": MostFrequent,
        }  # fmt: skip
        return kinds[self.settings.fill](self.columns) if self.settings.fill in kinds else None

    def learn(self, result: Any) -> Filled:
        """See Transform."""
        if self.settings.fill == "constant":
            assert self.settings.value is not None  # noqa: S101 - the settings see to it
            return Filled(values=dict.fromkeys(self.columns, self.settings.value))
        for name in self.columns:
            if result[name] is None:
                raise UsageError(f"{self.where()}: column {shown(name)} has no value to learn from; leave it out")
        most = self.settings.fill == "most_frequent"
        return Filled(values={name: result[name] if most else result[name][0] for name in self.columns})

    def apply(self, rows: pa.Table, learnt: Filled) -> pa.Table:
        """See Transform."""
        for name in self.columns:
            values = array_of(rows, name)
            lacking = missing(values)
            kind = _target(values.type)
            if pa.types.is_floating(kind):
                numbers = as_float64(values, name)
                made = pa.array(np.where(lacking, float(learnt.values[name]), numbers))
            else:
                made = pc.fill_null(values.cast(kind), pa.scalar(learnt.values[name], kind))
            rows = replaced(rows, name, made)
            if self.settings.indicator:
                rows = added(rows, f"{name}_missing", pa.array(lacking.astype(np.int8)))
        return rows


class Scale(Node):
    """A number becomes (number - centre) / width."""

    centre: settings.Finite
    width: settings.Finite


class Scales(Node):
    """By column."""

    columns: dict[str, Scale]


class Scaled(Transform[Any]):
    """Numbers moved and divided; they become float64."""

    Learnt = Scales

    def after(self, schema: pa.Schema) -> pa.Schema:
        """See Transform."""
        for name in self.columns:
            schema = with_field(schema, name, pa.float64())
        return schema

    def learn(self, result: Any) -> Scales:
        """See Transform."""
        made = {}
        for name in self.columns:
            if result[name] is None:
                raise UsageError(f"{self.where()}: column {shown(name)} has no number to learn from; leave it out")
            centre, width = self.scale(result[name])
            if not (math.isfinite(centre) and math.isfinite(width)):
                raise UsageError(
                    f"{self.where()}: column {shown(name)} spreads too far for a float64; clean it or give it in "
                    "another unit"
                )
            made[name] = Scale(centre=centre, width=width if width > 0 else 1.0)  # a column of one value becomes 0
        return Scales(columns=made)

    @abstractmethod
    def scale(self, result: Any) -> tuple[float, float]:
        """Centre and width from what was learnt of one column."""

    def apply(self, rows: pa.Table, learnt: Scales) -> pa.Table:
        """See Transform."""
        for name in self.columns:
            scale = learnt.columns[name]
            with np.errstate(over="ignore"):
                made = self.finish((self.numbers(rows, name) - scale.centre) / scale.width)
            rows = replaced(rows, name, pa.array(made))
        return rows

    def finish(self, numbers: Float64Array) -> Float64Array:
        """What becomes of the scaled numbers."""
        return numbers


class Standardise(Scaled):
    """See `settings.transforms.Standardise`."""

    def fitting(self) -> Fitting:
        """See Transform."""
        return Moments(self.columns)

    def scale(self, result: Any) -> tuple[float, float]:
        """Mean and standard deviation."""
        return result[0], result[1]


class MinMax(Scaled):
    """See `settings.transforms.MinMax`."""

    settings: settings.MinMax
    _PLAIN: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def fitting(self) -> Fitting:
        """See Transform."""
        return Extremes(self.columns)

    def scale(self, result: Any) -> tuple[float, float]:
        """The smallest number, and how far the largest is from it."""
        return result[0], result[1] - result[0]

    def finish(self, numbers: Float64Array) -> Float64Array:
        """Into the range that is wanted."""
        low, high = self.settings.low, self.settings.high
        made = numbers if (low, high) == self._PLAIN else low + numbers * (high - low)
        return np.clip(made, low, high) if self.settings.clip else made


class Robust(Scaled):
    """See `settings.transforms.Robust`."""

    def fitting(self) -> Fitting:
        """See Transform."""
        return Quantiles(self.columns, (0.25, 0.5, 0.75))

    def scale(self, result: Any) -> tuple[float, float]:
        """Median and distance of the quartiles."""
        return result[1], result[2] - result[0]


def _target(kind: pa.DataType) -> pa.DataType:
    """The type of a column that was filled."""
    return {"number": pa.float64(), "text": pa.string()}.get(family(kind), kind)
