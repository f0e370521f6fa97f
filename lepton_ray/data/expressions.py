"""SQL expressions over the rows of a table in their order: the `where` of an update or delete, and its new values.

The engine gives no promise about the order of rows and reads data files unchecked. So it is handed the checked rows of
one data file at a time, each with its position, as a table of its own in a temporary folder; `t` in a subquery is still
the whole table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.transaction import AddAction, create_table_with_add_actions

from lepton_ray.data.column_types import storable
from lepton_ray.data.delta import Log
from lepton_ray.data.query import MAX_SQL, Engine, engine_errors, quoted, refuse_silent_casts
from lepton_ray.errors import UsageError, shown

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picked:
    """The rows of one data file that a condition holds for."""

    positions: Positions
    """Of the rows in the file, ascending."""
    values: list[pa.Array]
    """The new values of each column that is set, in the order of these rows and in the column's type."""


class Expressions:
    """A condition and new values of columns, checked against a table and then evaluated file by file.

    Use it as a context manager: it has a temporary folder.

    Args:
        name: of the table.
        log: the version that `t` means in a subquery.
        where: an SQL expression that is true, false or missing (as false) for a row.
        assignments: column -> SQL expression over the row as it was.

    Raises UsageError for an expression that is none, that fails, that gives the wrong type or that compares text with
    numbers; one line, before any row is read.
    """

    def __init__(self, name: str, log: Log, where: str, assignments: Mapping[str, str] | None = None) -> None:
        self._name, self._log, self._where, self._set = name, log, where, dict(assignments or {})
        self._position = "lepton_position"
        while any(self._position in text for text in (*log.schema.names, where, *self._set.values())):
            self._position += "_"  # a row's place in its file is no matter of the user's
        self._folder = tempfile.TemporaryDirectory(prefix="lepton-")
        self._made = 0
        try:
            self._check()
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._folder.cleanup()

    def pick(self, rows: pa.Table) -> Picked:
        """The rows of a file that the condition holds for, and their new values.

        Raises UsageError for values that do not fit their column.
        """
        with engine_errors(self._name, "where" if not self._set else "set ... where"):
            numbers = pa.array(np.arange(rows.num_rows), pa.int64())
            engine = self._engine(rows.append_column(self._position, numbers))
            batches = list(engine.batches(self._statement()))
        found = pa.Table.from_batches(batches) if batches else None
        if found is None or found.num_rows == 0:
            return Picked(np.empty(0, np.int64), [])
        positions = found["position"].to_numpy().astype(np.int64)
        order = np.argsort(positions)
        if len(np.unique(positions)) != len(positions):
            raise UsageError(f"where {shown(self._where)}: gives a row several times; put it another way")
        values = [
            self._fitting(column, found[f"new{index}"].combine_chunks()).take(pa.array(order))
            for index, column in enumerate(self._set)
        ]
        return Picked(positions[order], values)

    def _statement(self) -> str:
        new = "".join(f", (\n{text}\n) AS new{index}" for index, text in enumerate(self._set.values()))
        columns = f"{quoted([self._position])[0]} AS position{new}"
        return f"SELECT {columns} FROM {self._rows_name} AS t WHERE (\n{self._where}\n)"  # noqa: S608 - checked before

    @property
    def _rows_name(self) -> str:
        return f"lepton_rows_{self._made}"

    def _engine(self, rows: pa.Table) -> Engine:
        """An engine that knows the rows beside the table."""
        for left in Path(self._folder.name).iterdir():  # of the file before
            for file in sorted(left.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            left.rmdir()
        self._made += 1
        folder = Path(self._folder.name) / str(self._made)
        folder.mkdir()
        pq.write_table(rows, folder / "rows.parquet", compression="none")
        stats = json.dumps({"numRecords": rows.num_rows})
        size = (folder / "rows.parquet").stat().st_size
        create_table_with_add_actions(
            str(folder), Schema.from_arrow(rows.schema), [AddAction("rows.parquet", size, {}, 0, True, stats)]
        )
        return Engine({**self._log.named(), self._rows_name: DeltaTable(str(folder))})

    def _check(self) -> None:
        """All that can be known without the rows."""
        texts = {"where": self._where, **{f"set {shown(name)}": text for name, text in self._set.items()}}
        with engine_errors(self._name, "where"):
            engine = self._engine(self._log.schema.empty_table())
        for what, text in texts.items():
            if not text.strip() or len(text) > MAX_SQL:
                raise UsageError(f"{what}: {len(text)} characters; expected an SQL expression of 1 to {MAX_SQL}")
            self._check_closed(engine, what, text)
        for what, text in texts.items():
            column = f"(\n{text}\n) AS new" if what != "where" else "1 AS new"
            where = f" WHERE (\n{text}\n)" if what == "where" else ""
            sql = f"SELECT {column} FROM {self._rows_name} AS t{where}"  # noqa: S608 - SQL is what it is for
            with engine_errors(self._name, what):
                _refuse_summaries(engine, sql, text, what)
                refuse_silent_casts(engine, sql, text, self._log.schema, what)
                found = engine.schema(sql)
                list(engine.batches(sql))  # what cannot be planned is told now
            if what != "where":
                self._fitting(what[5:-1], found.empty_table()["new"].combine_chunks(), what)

    def _check_closed(self, engine: Engine, what: str, text: str) -> None:
        """Raise UsageError for a text that leaves the place of an expression: `true) ORDER BY (x`."""
        for before, after in (("(", ")"), ("CASE WHEN true THEN", "END")):
            try:
                sql = f"SELECT {before}\n{text}\n{after} AS new FROM {self._rows_name} AS t"  # noqa: S608 - same
                engine.plan(sql)
            except Exception as error:
                if "ParserError" in str(error) or "TokenizerError" in str(error):
                    reason = " ".join(str(error).split()).partition("at Line")[0].rstrip(' ,"')
                    raise UsageError(f"{what} {shown(text)}: no SQL expression; {shown(reason, 160)}") from error

    def _fitting(self, name: str, values: pa.Array, what: str | None = None) -> pa.Array:
        """Values in the type of their column, none of them changed. Raises UsageError."""
        kind = self._log.schema.field(name).type
        what = what or f"set {shown(name)}"
        if pa.types.is_null(values.type):
            return pa.nulls(len(values), kind)
        plain = storable(pa.table({name: values}), what)[name].combine_chunks()
        given = plain.type
        if given != kind and not _castable(given, kind):
            raise UsageError(
                f"{what}: the expression {shown(self._set[name])} gives {given}, the column holds {kind}; write "
                f"CAST(... AS ...) if the values shall be converted"
            )
        try:
            return plain.cast(kind)
        except pa.ArrowInvalid as error:
            raise UsageError(f"{what}: {shown(str(error), 160)}; the column holds {kind}, no value is cut") from error


def _refuse_summaries(engine: Engine, sql: str, text: str, what: str) -> None:
    """Raise UsageError for `max(x)` or `row_number() OVER ()`, which would sum up one data file and not the table."""
    below = engine.plan(sql).splitlines()[1:2]
    if below and below[0].strip().startswith(("WindowAggr", "Aggregate")):
        raise UsageError(
            f"{what} {shown(text)}: sums up many rows; expected an expression over one row, and a subquery over t for "
            "what is to be found in the whole table"
        )


def _castable(given: pa.DataType, kept: pa.DataType) -> bool:
    """Whether values that fit need no word of the user: whole numbers among each other and to fractions."""
    if pa.types.is_integer(given):
        return bool(pa.types.is_integer(kept) or pa.types.is_floating(kept))
    if pa.types.is_floating(given):
        return bool(pa.types.is_floating(kept))  # a fraction is rounded as any literal is
    return bool(pa.types.is_decimal(given) and pa.types.is_decimal(kept))
