"""Files with one JSON object per line, as Arrow tables.

Parsed by Python's own reader: Arrow's ends the whole process on a line nested a hundred thousand deep.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from lepton_ray.data.column_types import check_text_columns
from lepton_ray.errors import UsageError, shown

LINE_BYTES = 4 * 2**20
"""The longest line."""
BLOCK_BYTES = 2**20
"""Bytes of lines (or one longer line) that become one table."""


def read_json_lines(path: Path, where: str) -> Iterator[pa.Table]:
    """The rows of a file; columns and their types come from the first MiB.

    Raises UsageError, beginning with `where` and the line, for what is no object, for names that stand twice or come
    up later, and for values of another type than before.
    """
    schema = pa.schema([])
    first = 1
    with path.open("rb") as file:
        while lines := _lines(file, f"{where}: line", first):
            objects = [_object(line, f"{where}: line {first + at}") for at, line in enumerate(lines) if line.strip()]
            span = f"{where}: lines {first} to {first + len(lines) - 1}"
            first += len(lines)
            if not objects:
                continue
            rows = _table(objects, schema, span)
            if not schema.names:
                schema = rows.schema
                check_text_columns(schema, where)
            yield rows


def _lines(file: BinaryIO, where: str, first: int) -> list[bytes]:
    """The next lines of a file, some BLOCK_BYTES of them; [] at its end."""
    lines: list[bytes] = []
    size = 0
    while size < BLOCK_BYTES and (line := file.readline(LINE_BYTES + 1)):
        if len(line) > LINE_BYTES:
            raise UsageError(f"{where} {first + len(lines)} has more than {LINE_BYTES} bytes; is it JSON lines?")
        lines.append(line)
        size += len(line)
    return lines


def _object(line: bytes, where: str) -> dict[str, Any]:
    """One line as an object with distinct names."""
    try:
        value = json.loads(line, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no JSON that can be read, {shown(str(error), 120)}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {shown(value)}; expected an object, a name and a value for each column")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError(f"a name stands twice in {[name for name, _ in pairs]!a}")
    return names


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _table(objects: list[dict[str, Any]], schema: pa.Schema, where: str) -> pa.Table:
    """Objects as rows of a schema; where that is empty, of the types that Arrow finds in them."""
    names = schema.names or list(dict.fromkeys(name for values in objects for name in values))
    if unknown := {name for values in objects for name in values}.difference(names):
        raise UsageError(f"{where}: column {shown(min(unknown))} is not in the lines before; give it in all of them")
    columns = {}
    for name in names:
        try:
            column = pa.array([values.get(name) for values in objects])
        except (pa.ArrowException, OverflowError) as error:
            raise UsageError(f"{where}: column {shown(name)}: {shown(str(error), 120)}") from error
        if schema.names and column.type != (kind := schema.field(name).type):
            # Arrow itself would make 1 of 1.5 and of "1"
            whole_for_fraction = pa.types.is_integer(column.type) and pa.types.is_floating(kind)
            if not (whole_for_fraction or pa.types.is_null(column.type)):
                raise UsageError(f"{where}: column {shown(name)} holds {column.type}; the lines before hold {kind}")
            column = column.cast(kind)
        columns[name] = column
    return pa.table(columns)
