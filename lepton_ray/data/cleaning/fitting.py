"""Figures over all rows of a table, from what its pieces say: moments, quantiles, counts, neighbours along a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lepton_ray.data.cleaning import rules
from lepton_ray.data.cleaning.quantiles import Search
from lepton_ray.data.cleaning.steps import Fitting, Mask, Pieces, array_of
from lepton_ray.errors import UsageError, shown

Float64Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]

MAX_DIFFERENT = 1_000_000
"""Different values of a column that are counted; a column with more has no most frequent one to speak of."""


def numbers_in(values: pa.Array) -> Float64Array:
    """The finite numbers of a column."""
    made: Float64Array = values.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return made[np.isfinite(made)]


def positions(values: pa.Array) -> tuple[AnyArray, Mask]:
    """Numbers or times as comparable numbers, and where there is none."""
    nowhere = rules.missing(values)
    if pa.types.is_floating(values.type):
        numbers = values.cast(pa.float64())
    elif pa.types.is_date32(values.type):
        numbers = values.cast(pa.int32()).cast(pa.int64())
    else:
        numbers = values.cast(pa.int64())
    return numbers.fill_null(0).to_numpy(zero_copy_only=False), nowhere


class Moments(Fitting):
    """Mean and standard deviation (of the population) of the finite numbers of each column; None where none is.

    Pieces are joined by the formula of Chan, Golub and LeVeque (1979), which does not cancel.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._found: dict[str, tuple[float, float] | None] = {}

    def look(self, rows: pa.Table) -> Pieces:
        """See Fitting."""
        figures = []
        for name in self._columns:
            numbers = numbers_in(array_of(rows, name))
            with np.errstate(over="ignore", invalid="ignore"):  # of numbers near the largest there are
                mean = float(np.mean(numbers)) if len(numbers) else 0.0
                mean = mean if math.isfinite(mean) else float(np.sum(numbers / len(numbers)))
                squares = float(np.sum((numbers - mean) ** 2))
            figures.append((len(numbers), mean, squares))
        counts, means, spreads = zip(*figures, strict=True)
        return {"moments": pa.table({"count": counts, "mean": means, "squares": spreads})}

    def narrow(self, answers: Sequence[Pieces]) -> None:
        """See Fitting."""
        for index, name in enumerate(self._columns):
            count, mean, squares = 0, 0.0, 0.0
            for answer in answers:
                more, other, its = (answer["moments"][each][index].as_py() for each in ("count", "mean", "squares"))
                if more:
                    apart = other - mean
                    squares += its + apart * apart * (count * more / (count + more))
                    mean += apart * (more / (count + more))
                    count += more
            self._found[name] = (mean, math.sqrt(squares / count)) if count else None
        self.done = True

    def result(self) -> dict[str, tuple[float, float] | None]:
        """See Fitting."""
        return self._found


class Quantiles(Fitting):
    """Quantiles of the finite numbers of each column; None where none is."""

    def __init__(self, columns: Sequence[str], shares: tuple[float, ...] = (0.5,)) -> None:
        self._searches = {name: Search(shares) for name in columns}

    def look(self, rows: pa.Table) -> Pieces:
        """See Fitting."""
        open_ = {name: search for name, search in self._searches.items() if not search.done}
        return {name: pa.table({"n": each.look(numbers_in(array_of(rows, name)))}) for name, each in open_.items()}

    def narrow(self, answers: Sequence[Pieces]) -> None:
        """See Fitting."""
        for name, search in self._searches.items():
            if not search.done:
                search.narrow([answer[name]["n"].to_numpy() for answer in answers])
        self.done = all(search.done for search in self._searches.values())

    def result(self) -> dict[str, list[float] | None]:
        """See Fitting."""
        return {name: search.quantiles() for name, search in self._searches.items()}


class MostFrequent(Fitting):
    """The value that stands most often in each column (of several the smallest), or how often each one does."""

    def __init__(self, columns: Sequence[str], *, counts: bool = False) -> None:
        self._columns, self._counts = list(columns), counts
        self._found: dict[str, dict[Any, int]] = {name: {} for name in columns}

    def look(self, rows: pa.Table) -> Pieces:
        """See Fitting."""
        said = {}
        for name in self._columns:
            values = array_of(rows, name)
            counted = values.filter(pa.array(~rules.missing(values))).value_counts()
            said[name] = pa.table({"value": counted.field("values"), "count": counted.field("counts")})
        return said

    def narrow(self, answers: Sequence[Pieces]) -> None:
        """See Fitting."""
        for name, counts in self._found.items():
            for answer in answers:
                for value, count in zip(*(answer[name][each].to_pylist() for each in ("value", "count")), strict=True):
                    counts[value] = counts.get(value, 0) + count
                if len(counts) > MAX_DIFFERENT:
                    raise UsageError(f"column {shown(name)}: more than {MAX_DIFFERENT} different values to count")
        self.done = True

    def result(self) -> dict[str, Any]:
        """See Fitting."""
        if self._counts:
            return {name: dict(sorted(counts.items())) for name, counts in self._found.items()}
        return {
            name: min(counts, key=lambda value: (-counts[value], value)) if counts else None
            for name, counts in self._found.items()
        }


@dataclass
class Line:
    """What stands for the missing values of a column along another one."""

    places: AnyArray
    """Where values are missing, ascending."""
    values: Float64Array

    def at(self, places: AnyArray) -> Float64Array:
        """The values at places; NaN where none was missing among the rows that were looked at."""
        if len(self.places) == 0:
            return np.full(len(places), np.nan)
        index = np.minimum(np.searchsorted(self.places, places), len(self.places) - 1)
        return np.where(self.places[index] == places, self.values[index], np.nan)


class Interpolation(Fitting):
    """Linear interpolation of columns along another one: first where values are missing, then the neighbours of each.

    Memory: 50 bytes for each different place where a value is missing.
    """

    def __init__(self, columns: Sequence[str], along: str) -> None:
        self._columns, self._along = list(columns), along
        self._places: dict[str, AnyArray] = {}
        self._lines: dict[str, Line] = {}

    def look(self, rows: pa.Table) -> Pieces:
        """See Fitting."""
        at, nowhere = positions(array_of(rows, self._along))
        said = {}
        for name in self._columns:
            values = array_of(rows, name)
            lacking = rules.missing(values)
            if not self._places:
                said[name] = pa.table({"place": np.unique(at[lacking & ~nowhere])})
                continue
            known = ~lacking & ~nowhere
            numbers = values.filter(pa.array(known)).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            order = np.argsort(at[known], kind="stable")
            said[name] = _neighbours(at[known][order], numbers[order], self._places[name])
        return said

    def narrow(self, answers: Sequence[Pieces]) -> None:
        """See Fitting."""
        if not self._places:
            for name in self._columns:
                self._places[name] = np.unique(np.concatenate([answer[name]["place"].to_numpy() for answer in answers]))
            self.done = not any(len(places) for places in self._places.values())
            if self.done:
                self._lines = {name: Line(places, np.empty(0)) for name, places in self._places.items()}
            return
        for name, places in self._places.items():
            self._lines[name] = Line(places, _joined(places, [answer[name] for answer in answers], name))
        self.done = True

    def result(self) -> dict[str, Line]:
        """See Fitting."""
        return self._lines


def _neighbours(at: AnyArray, numbers: Float64Array, places: AnyArray) -> pa.Table:
    """For each place the nearest known value at or before it and at or after it."""
    before = np.searchsorted(at, places, side="right") - 1
    after = np.searchsorted(at, places, side="left")
    has_before, has_after = before >= 0, after < len(at)
    said: dict[str, AnyArray] = {"has_before": has_before, "has_after": has_after}
    for side, index, has in (("before", before, has_before), ("after", after, has_after)):
        safe = np.where(has, index, 0)
        said[f"at_{side}"] = at[safe] if len(at) else np.zeros(len(places), places.dtype)
        said[side] = numbers[safe] if len(at) else np.zeros(len(places))
    return pa.table(said)


def _joined(places: AnyArray, answers: list[pa.Table], name: str) -> Float64Array:
    """The values between the nearest neighbours over all pieces."""
    best: dict[str, tuple[AnyArray, AnyArray, Float64Array]] = {}
    for side in ("before", "after"):
        has, at, value = np.zeros(len(places), bool), np.zeros(len(places), places.dtype), np.zeros(len(places))
        for answer in answers:
            its, its_at, its_value = (answer[each].to_numpy() for each in (f"has_{side}", f"at_{side}", side))
            nearer = its & (~has | (its_at > at if side == "before" else its_at < at))
            has, at, value = has | its, np.where(nearer, its_at, at), np.where(nearer, its_value, value)
        best[side] = has, at, value
    (has_before, at_before, before), (has_after, at_after, after) = best["before"], best["after"]
    if not (has_before | has_after).all():
        raise UsageError(f"column {shown(name)} has no value to learn from; leave it out of the plan")
    whole = np.where(has_before & has_after, (at_after - at_before).astype(np.float64), 0.0)
    share = np.divide((places - at_before).astype(np.float64), whole, out=np.zeros(len(places)), where=whole > 0)
    between: Float64Array = before * (1 - share) + after * share
    return np.where(has_before & has_after, between, np.where(has_before, before, after))
