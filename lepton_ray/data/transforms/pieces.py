"""The training rows in pieces: of a table in memory, or of the data files of a stored one, read where work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lepton_ray.data.evolution import fitted
from lepton_ray.data.parts import Part, decode_part, read_part
from lepton_ray.data.versions import Table
from lepton_ray.storage import Store

PIECE_ROWS = 65_536
"""Rows of a piece of a table in memory."""


class TrainingPieces(Protocol):
    """The rows to learn from. Which rows are in which piece must not depend on who works on them."""

    @property
    def schema(self) -> pa.Schema:
        """Of all pieces."""

    def count(self) -> int:
        """How many pieces there are."""

    def read(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of the rows of one piece, as one chunk each."""


@dataclass(frozen=True)
class InMemory:
    """Rows that are in memory."""

    rows: pa.Table

    @property
    def schema(self) -> pa.Schema:
        """See TrainingPieces."""
        return self.rows.schema

    def count(self) -> int:
        """See TrainingPieces."""
        return -(-int(self.rows.num_rows) // PIECE_ROWS)

    def read(self, index: int, columns: Sequence[str]) -> pa.Table:
        """See TrainingPieces."""
        return self.rows.select(list(columns)).slice(index * PIECE_ROWS, PIECE_ROWS).combine_chunks()


@dataclass(frozen=True)
class Stored:
    """The rows of a version of a table, or those of its training split; a data file is a piece.

    Args:
        store: where the table is.
        name: of the table.
        schema: of the version.
        parts: its data files, in order.
        positions: of the rows to learn from, ascending, counted over all data files; None for all.
    """

    store: Store
    name: str
    schema: pa.Schema
    parts: tuple[Part, ...]
    positions: npt.NDArray[np.int64] | None = None

    def count(self) -> int:
        """See TrainingPieces."""
        return len(self.parts)

    def read(self, index: int, columns: Sequence[str]) -> pa.Table:
        """See TrainingPieces."""
        part = self.parts[index]
        data, _ = read_part(self.store, f"datasets/{self.name}", part.name)
        schema = pa.schema([self.schema.field(name) for name in columns])
        rows = fitted(decode_part(data, f"data file {part.name}", schema.names), schema, part.partition)
        if self.positions is None:
            return rows.combine_chunks()
        first = sum(each.rows for each in self.parts[:index])
        low, high = np.searchsorted(self.positions, (first, first + part.rows))
        return rows.take(pa.array(self.positions[low:high] - first)).combine_chunks()


def training_pieces(store: Store, table: Table, positions: npt.NDArray[np.int64] | None = None) -> Stored:
    """The pieces of an open table, or of the rows at some positions of it (`Split.train`)."""
    return Stored(store, table.name, table.schema, tuple(table.log.parts), positions)
