"""What is in a table: types, missing values, distributions, class balance, sample images; as figures and as a page.

Two or three looks at the pieces of the table, each adding what all pieces say; memory is that of a piece for each
thread. Distinct values are counted exactly up to 16,383 and estimated beyond from the 16,384 smallest hashes
(Bar-Yossef and others, "Counting distinct elements in a data stream", 2002; about 1% off).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.cleaning import rules
from lepton_ray.data.cleaning.fitting import Moments, Quantiles, numbers_in
from lepton_ray.data.cleaning.passes import Here
from lepton_ray.data.cleaning.pieces import Job
from lepton_ray.data.cleaning.steps import Fitting, Pieces, array_of
from lepton_ray.data.profile_page import BINS, page, samples_of
from lepton_ray.data.row_hash import hash_rows
from lepton_ray.data.tables import open_table
from lepton_ray.errors import UsageError
from lepton_ray.storage import Store

MAX_DIFFERENT = 1000
"""Values are counted one by one in columns of at most this many different ones."""
_HASHES = 16_384
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)

UInt64Array = npt.NDArray[np.uint64]


@dataclass
class ColumnProfile:
    """What is in one column."""

    name: str
    type: str
    missing: int = 0
    """Nulls, and floating point values that are no number."""
    infinite: int = 0
    distinct: int = 0
    """Different values, missing ones aside; estimated where `distinct_exact` is false."""
    distinct_exact: bool = True
    mean: float | None = None
    deviation: float | None = None
    quantiles: list[float] | None = None
    """Least, quartiles and greatest of the finite numbers; of the lengths for text (characters) and bytes."""
    histogram: list[int] = field(default_factory=list)
    """Counts in 24 equal bins between the least and the greatest."""
    top: list[tuple[str, int]] = field(default_factory=list)
    """Most frequent values; empty in columns of more than 1,000 different ones."""
    span: tuple[str, str] | None = None
    """First and last, for dates and times."""


@dataclass
class TableProfile:
    """What is in a table."""

    table: str
    version: int
    rows: int
    bytes: int
    """Of the data files."""
    columns: list[ColumnProfile]
    page: str = ""
    """Key of the HTML page in the store."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def profile(store: Store, ref: str) -> TableProfile:
    """Look at a table and write `reports/<table>/profile-<version>.html`.

    Args:
        store: where the table is.
        ref: `name` or `name@version`.

    Raises UsageError for a table without rows, NotFoundError for one that does not exist.
    """
    table = open_table(store, ref)
    if table.num_rows == 0:
        raise UsageError(f"table {table.ref}: no rows in it; ingest some first")
    columns = _looked_at(Job(store, f"datasets/{table.name}", table.log.parts, table.schema, []))
    found = TableProfile(table.name, table.version, table.num_rows, sum(part.size for part in table.log.parts), columns)
    found.page = f"reports/{table.name}/profile-{table.version:010d}.html"
    store.put(found.page, page(found, samples_of(table)).encode())
    return found


class Basics(Fitting):
    """Missing and infinite values, different ones, the most frequent."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._found: dict[str, dict[str, Any]] = {}

    def look(self, rows: pa.Table) -> Pieces:
        """See Fitting."""
        said = {}
        for name in self._columns:
            values = array_of(rows, name)
            lacking = rules.missing(values)
            known = values.filter(pa.array(~lacking)) if lacking.any() else values
            floating = pa.types.is_floating(values.type)
            infinite = int(pc.sum(pc.is_inf(known)).as_py() or 0) if floating else 0
            hashes = np.unique(hash_rows(pa.table({"value": known}))[:, 0])
            said[name] = pa.table({"hashes": hashes[:_HASHES]}).replace_schema_metadata(
                {"missing": str(int(lacking.sum())), "infinite": str(infinite)}
            )
            if len(hashes) <= MAX_DIFFERENT and _countable(values.type):
                counted = known.value_counts()
                said[f"{name}\0top"] = pa.table(
                    {"value": counted.field(0).cast(pa.string()), "count": counted.field(1)}
                )
        return said

    def narrow(self, answers: Sequence[Pieces]) -> None:
        """See Fitting."""
        for name in self._columns:
            marks = [answer[name].schema.metadata for answer in answers]
            hashes = np.unique(np.concatenate([answer[name]["hashes"].to_numpy() for answer in answers]))[:_HASHES]
            counts: dict[str, int] | None = {}
            for answer in answers:
                top = answer.get(f"{name}\0top")
                if top is None or counts is None or len(counts) > MAX_DIFFERENT:
                    counts = None
                    break
                for value, count in zip(top["value"].to_pylist(), top["count"].to_pylist(), strict=True):
                    counts[value] = counts.get(value, 0) + count
            exact = len(hashes) < _HASHES
            self._found[name] = {
                "missing": sum(int(mark[b"missing"]) for mark in marks),
                "infinite": sum(int(mark[b"infinite"]) for mark in marks),
                "distinct_exact": exact,
                "distinct": len(hashes) if exact else round((_HASHES - 1) * (2.0**64 / float(hashes[-1]))),
                "top": sorted((counts or {}).items(), key=lambda each: (-each[1], each[0])),
            }
        self.done = True

    def result(self) -> dict[str, dict[str, Any]]:
        """See Fitting."""
        return self._found


class Histogram(Fitting):
    """Counts of finite numbers in equal bins between known ends."""

    def __init__(self, ends: dict[str, tuple[float, float]]) -> None:
        self._ends = ends
        self._found: dict[str, list[int]] = {}

    def look(self, rows: pa.Table) -> Pieces:
        """See Fitting."""
        said = {}
        for name, (low, high) in self._ends.items():
            numbers = numbers_in(array_of(rows, name))
            # by hand: numpy's own refuses ends so far apart that their distance overflows
            place = np.floor((numbers / 2 - low / 2) / ((high / 2 - low / 2) / BINS)).astype(np.int64)
            said[name] = pa.table({"counts": np.bincount(np.clip(place, 0, BINS - 1), minlength=BINS)})
        return said

    def narrow(self, answers: Sequence[Pieces]) -> None:
        """See Fitting."""
        for name in self._ends:
            self._found[name] = np.sum([answer[name]["counts"].to_numpy() for answer in answers], axis=0).tolist()
        self.done = True

    def result(self) -> dict[str, list[int]]:
        """See Fitting."""
        return self._found


def _looked_at(job: Job) -> list[ColumnProfile]:
    columns = [ColumnProfile(field.name, str(field.type)) for field in job.schema]
    names = [each.name for each in columns]
    basics, moments, spread = Basics(names), Moments(names), Quantiles(names, _SHARES)
    waiting: list[Fitting] = [basics, moments, spread]
    while waiting:
        _look(job, waiting)
        waiting = [each for each in waiting if not each.done]
    found, mean, quantiles = basics.result(), moments.result(), spread.result()
    for each in columns:
        for name, value in found[each.name].items():
            setattr(each, name, value)
        each.quantiles = quantiles[each.name]
        kind = job.schema.field(each.name).type
        if (told := mean[each.name]) is not None and not _is_time(kind):
            each.mean, each.deviation = told
        if each.quantiles and _is_time(kind):
            ends = pa.array([int(each.quantiles[0]), int(each.quantiles[-1])], pa.int64())
            first, last = (ends.cast(pa.int32()) if pa.types.is_date32(kind) else ends).cast(kind).to_pylist()
            each.span = str(first), str(last)
    ends = {each.name: (each.quantiles[0], each.quantiles[-1]) for each in columns if each.quantiles}
    histogram = Histogram({name: (low, high) for name, (low, high) in ends.items() if low < high})
    _look(job, [histogram])
    for each in columns:
        each.histogram = histogram.result().get(each.name, [])
    return columns


def _look(job: Job, fittings: list[Fitting]) -> None:
    """Have each fitting look at every piece."""
    answers: list[list[Pieces]] = [[] for _ in fittings]
    for said in Here().each(partial(_piece, job, fittings), [b""] * len(job.parts)):
        for index, answer in enumerate(answers):
            mark = f"{index}/"
            answer.append({name.removeprefix(mark): each for name, each in said.items() if name.startswith(mark)})
    for fitting, answer in zip(fittings, answers, strict=True):
        fitting.narrow(answer)


def _piece(job: Job, fittings: list[Fitting], index: int, _: bytes) -> Pieces:
    rows = job.read(index, None)
    plain = pa.table({name: _as_numbers(array_of(rows, name)) for name in rows.column_names})
    said: Pieces = {}
    for place, fitting in enumerate(fittings):
        seen = rows if isinstance(fitting, Basics) else plain
        said |= {f"{place}/{name}": table for name, table in fitting.look(seen).items()}
    return said


def _as_numbers(values: pa.Array) -> pa.Array:
    """A column as numbers with a distribution: itself, days or microseconds, or the lengths of its values."""
    kind = values.type
    if pa.types.is_string(kind):
        return pc.utf8_length(values)
    if pa.types.is_binary(kind):
        return pc.binary_length(values)
    if pa.types.is_nested(kind):
        return pc.list_value_length(values)
    casts = {pa.bool_(): pa.int8(), pa.date32(): pa.int32()}
    other = pa.int64() if pa.types.is_timestamp(kind) else pa.float64() if pa.types.is_decimal(kind) else kind
    return values.cast(casts.get(kind, other))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_date(kind) or pa.types.is_timestamp(kind))


def _countable(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_time(kind))
