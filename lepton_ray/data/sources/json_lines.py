"""Files with one JSON object per line, as Arrow tables.

Parsed by Python's own reader: Arrow's ends the whole process on a line nested a hundred thousand deep.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

import pyarrow as pa

from lepton_ray.data.column_types import check_text_columns
from lepton_ray.data.sources.csv_files import TYPES
from lepton_ray.data.sources.streams import Job
from lepton_ray.errors import UsageError, shown

BLOCK_BYTES = 2**20
"""Bytes of lines (or one longer line) that become one table."""


@dataclass(frozen=True)
class _Line:
    number: int
    values: dict[str, Any]


def read_json_lines(job: Job, known: pa.Schema | None) -> Iterator[pa.Table]:
    """The rows of a file; columns and their types come from the settings, the files before, or the first MiB.

    Raises UsageError naming line, column and value for what is no object, for names that stand twice or come up later,
    and for values of another type than before.
    """
    schema = known
    first = 1
    with job.open() as file:
        while lines := _lines(file, job, first):
            objects = [
                _Line(first + at, parse_object(line, f"{job.where} line {first + at}"))
                for at, line in enumerate(lines)
                if line.strip()
            ]
            first += len(lines)
            if not objects:
                continue
            if schema is None:
                schema = _schema_of(objects, job)
            yield _table(objects, schema, job.where)


def _lines(file: BufferedIOBase, job: Job, first: int) -> list[bytes]:
    """The next lines of a file, some BLOCK_BYTES of them; [] at its end."""
    limit = job.reading.limits.max_row_bytes
    lines: list[bytes] = []
    size = 0
    while size < BLOCK_BYTES and (line := file.readline(limit + 1)):
        if len(line) > limit:
            raise UsageError(
                f"{job.where} line {first + len(lines)}: has more than {limit} bytes; is it JSON lines? (limit "
                "max_row_bytes)"
            )
        lines.append(line.removeprefix(b"\xef\xbb\xbf") if first + len(lines) == 1 else line)
        size += len(line)
    return lines


def parse_object(line: bytes | str, where: str) -> dict[str, Any]:
    """One JSON object with distinct names. Raises UsageError, beginning with `where`."""
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


def _schema_of(objects: list[_Line], job: Job) -> pa.Schema:
    """Columns and types of the first lines; what the settings say comes first."""
    names = list(dict.fromkeys(name for line in objects for name in line.values))
    given = {name: TYPES[kind] for name, kind in job.reading.types.items()}
    if missing := given.keys() - set(names):
        has = shown(", ".join(names), 200)
        raise UsageError(f"{job.where}: no column {shown(min(missing))} in the first lines; they have {has}")
    fields = []
    for name in names:
        column = None if name in given else _column(objects, name, None, job.where)
        fields.append(pa.field(name, given[name] if column is None else column.type))
    schema = pa.schema(fields)
    check_text_columns(schema, job.where)
    return schema


def _table(objects: list[_Line], schema: pa.Schema, where: str) -> pa.Table:
    """Objects as rows of a schema."""
    names = set(schema.names)
    for line in objects:
        if unknown := line.values.keys() - names:
            raise UsageError(
                f"{where} line {line.number}: column {shown(min(unknown))} is not in the lines before; give it in all "
                "of them"
            )
    return pa.table([_column(objects, field.name, field.type, where) for field in schema], schema=schema)


def _column(objects: list[_Line], name: str, kind: pa.DataType | None, where: str) -> pa.Array:
    """The values of a column; of the type that Arrow finds in them where none is given."""
    try:
        column = pa.array([line.values.get(name) for line in objects])
        if kind is None or column.type == kind:
            return column
        # Arrow itself would make 1 of 1.5 and of "1"
        whole_for_fraction = pa.types.is_integer(column.type) and pa.types.is_floating(kind)
        text_for_time = pa.types.is_string(column.type) and pa.types.is_temporal(kind)
        if whole_for_fraction or text_for_time or pa.types.is_null(column.type):
            return column.cast(kind)
        fault = f"holds {column.type}; expected {kind}"
    except (pa.ArrowException, OverflowError, ValueError) as error:
        fault = shown(" ".join(str(error).split()), 120)
    line = _first_other(objects, name, kind)
    raise UsageError(f"{where} line {line.number}: column {shown(name)}: {shown(line.values.get(name))}, {fault}")


def _first_other(objects: list[_Line], name: str, kind: pa.DataType | None) -> _Line:
    """The first line whose value is not of a type; of that of the first value where none is given."""
    for line in objects:
        value = line.values.get(name)
        if value is None:
            continue
        try:
            found = pa.array([value]).type
            if kind is not None and pa.types.is_temporal(kind):
                pa.array([value]).cast(kind)
                found = kind
        except (pa.ArrowException, OverflowError, ValueError):
            return line
        kind = kind or found
        both_numbers = pa.types.is_floating(kind) and pa.types.is_integer(found)
        if found != kind and not both_numbers:
            return line
    return objects[0]
