"""The steps that compare rows with each other: equal rows, nearly equal ones, labels that contradict each other.

Each brings together what a bucket's rows have in common (`entries` on a piece, `reduce` on a bucket) and decides from
the pairs that come out, in the order of the table.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lepton_ray.data.cleaning import duplicates, near
from lepton_ray.data.cleaning.ingesting import KEY
from lepton_ray.data.cleaning.media import image_hashes
from lepton_ray.data.cleaning.steps import S, Step, array_of, check_kind
from lepton_ray.data.images import SHAPE_COLUMNS, is_image_table
from lepton_ray.errors import UsageError
from lepton_ray.settings import cleaning as settings

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
Place = tuple[int, int]
"""Number of a data file, and of a row within it."""
Reduce = Callable[[pa.Table], pa.Table]
COMPARED_AT_ONCE = 20_000
"""Rows whose pieces are held in memory to be compared."""


class GroupStep(Step[S]):
    """A step that compares rows with each other."""

    @abstractmethod
    def entries(self, rows: pa.Table, places: Int64Array, part: int, buckets: int) -> pa.Table:
        """What of a piece must meet: a table with a column `bucket`."""

    @property
    @abstractmethod
    def reduce(self) -> Reduce:
        """What becomes of a bucket: a table of `part`, `row`, `of_part`, `of_row`."""

    def compared(self, rows: pa.Table, places: Int64Array) -> dict[str, pa.Table] | None:
        """What some rows must tell so that pairs of them can be compared; None where the bucket knew all."""
        return None

    def failing(self, pairs: Int64Array) -> Int64Array:
        """The rows that fail, each once, with the row on whose account; as the pairs, which are sorted."""
        return pairs

    def said(self, of: str) -> str:
        """Why a row fails, given the place of the other row."""
        return f"row: the same as {of}"


class Duplicates(GroupStep[settings.Duplicates]):
    """Rows that are equal to an earlier one."""

    drops = True

    def reads(self, schema: pa.Schema) -> set[str]:
        """See Step."""
        return set(self.settings.columns or [name for name in schema.names if name != KEY])

    def entries(self, rows: pa.Table, places: Int64Array, part: int, buckets: int) -> pa.Table:
        """See GroupStep."""
        names = sorted(self.reads(rows.schema))
        return duplicates.hashed(rows.select(names), places, part, buckets)

    @property
    def reduce(self) -> Reduce:
        """See GroupStep."""
        return duplicates.later_ones


class Conflicts(GroupStep[settings.Labels]):
    """Rows equal in all but key and label, whose labels differ."""

    @property
    def columns(self) -> list[str]:
        """See Step."""
        return [self.settings.column]

    def reads(self, schema: pa.Schema) -> set[str]:
        """See Step."""
        return {name for name in schema.names if name != KEY}

    def entries(self, rows: pa.Table, places: Int64Array, part: int, buckets: int) -> pa.Table:
        """See GroupStep."""
        label = self.settings.column
        names = sorted(name for name in rows.column_names if name not in (KEY, label))
        return duplicates.hashed(rows.select(names), places, part, buckets, rows.select([label]))

    @property
    def reduce(self) -> Reduce:
        """See GroupStep."""
        return duplicates.conflicting

    def said(self, of: str) -> str:
        """See GroupStep."""
        return f"{self.settings.column}: not that of {of}, which is the same but for it"


class NearDuplicates(GroupStep[settings.NearDuplicates]):
    """Rows much like an earlier one that stays."""

    drops = True

    @property
    def columns(self) -> list[str]:
        """See Step."""
        return [self.settings.column]

    def reads(self, schema: pa.Schema) -> set[str]:
        """See Step."""
        return {self.settings.column, *(SHAPE_COLUMNS if self._is_raw(schema) else ())}

    def check(self, schema: pa.Schema) -> pa.Schema:
        """See Step."""
        super().check(schema)
        check_kind(schema, self.columns, "text" if self.settings.kind == "text" else "bytes")
        self._raw = self._is_raw(schema)  # of all columns: a piece that is compared has only those that are read
        return schema

    def entries(self, rows: pa.Table, places: Int64Array, part: int, buckets: int) -> pa.Table:
        """See GroupStep."""
        column = self.settings.column
        if self.settings.kind == "image":
            hashes, known = image_hashes(rows, column, self._raw)
            bands = near.image_bands(hashes[known], self.settings.distance)
            return near.entries(bands, hashes[known], places[known], part, buckets)
        texts, places = self._texts(rows, places)
        bands = np.empty((len(texts), near.banding(self.settings.threshold)[0]), np.uint64)
        for low, high in near.slices(texts):
            bands[low:high] = near.band_hashes(*near.pieces_of(texts[low:high]), self.settings.threshold)
        return near.entries(bands, np.zeros(len(texts), np.uint64), places, part, buckets)

    @property
    def reduce(self) -> Reduce:
        """See GroupStep."""
        distance = self.settings.distance if self.settings.kind == "image" else None
        return lambda bucket: near.proposed(bucket, distance)

    def compared(self, rows: pa.Table, places: Int64Array) -> dict[str, pa.Table] | None:
        """See GroupStep."""
        if self.settings.kind == "image":
            return None
        texts, places = self._texts(rows, places)
        distinct = []
        for low, high in near.slices(texts):
            pieces, starts = near.pieces_of(texts[low:high])
            distinct += [np.unique(pieces[one:other]) for one, other in itertools.pairwise(starts.tolist())]
        return {
            "pieces": pa.table({"row": places, "pieces": pa.array(distinct, pa.list_(pa.uint64()))}),
        }

    def near_pairs(self, pairs: Int64Array, told: dict[Place, UInt64Array]) -> Iterator[list[int]]:
        """Of the pairs proposed those that are near, compared exactly."""
        for pair in pairs.tolist():
            one, other = told.get((pair[0], pair[1])), told.get((pair[2], pair[3]))
            if one is not None and other is not None and near.similarity(one, other) >= self.settings.threshold:
                yield pair

    def failing(self, pairs: Int64Array) -> Int64Array:
        """A row goes on account of the first earlier one that is like it and stays: no chains of likeness."""
        gone: dict[Place, Place] = {}
        for part, row, of_part, of_row in pairs.tolist():
            if (of_part, of_row) not in gone and (part, row) not in gone:
                gone[part, row] = (of_part, of_row)
        return np.array([[*one, *other] for one, other in gone.items()], np.int64).reshape(-1, 4)

    def said(self, of: str) -> str:
        """See GroupStep."""
        return f"{self.settings.column}: nearly the same as in {of}"

    def _is_raw(self, schema: pa.Schema) -> bool:
        return self.settings.kind == "image" and self.settings.column == "image" and is_image_table(schema)

    def _texts(self, rows: pa.Table, places: Int64Array) -> tuple[pa.Array, Int64Array]:
        values = array_of(rows, self.settings.column)
        known = values.is_valid()
        return values.filter(known), places[known.to_numpy(zero_copy_only=False)]


def check_no_key(step: Step[Any]) -> None:
    """Raise UsageError where rows are compared by their keys, which always differ."""
    if KEY in step.columns:
        raise UsageError(f"column {KEY}: differs in every row; leave it out of the columns")
