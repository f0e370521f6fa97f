"""The types that columns of a table may have, and the refusal of those that could run code.

Arrow extension types are refused before any value is looked at: a type registered by another library in the same
process may unpickle foreign bytes when a column is converted (CVE-2026-41486 was one of these).
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pyarrow as pa

from lepton_ray.errors import RefusedError, UsageError, shown

MAX_COLUMNS = 10_000
"""Columns of a table at most."""
MAX_NAME = 255
"""Characters of a column's name at most."""

EXTENSION_MARK = b"ARROW:extension:name"
"""Stands in the metadata of every file that has a column of an extension type."""

_KEPT = {
    pa.int8(),
    pa.int16(),
    pa.int32(),
    pa.int64(),
    pa.bool_(),
    pa.float32(),
    pa.float64(),
    pa.string(),
    pa.binary(),
    pa.date32(),
}
_KEPT_AS = {
    # Delta tables have no unsigned integers: each goes to the signed type that holds it (uint64 if its values fit)
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.int64(),
    pa.float16(): pa.float32(),
    pa.large_string(): pa.string(),
    pa.string_view(): pa.string(),
    pa.large_binary(): pa.binary(),
    pa.binary_view(): pa.binary(),
    pa.date64(): pa.date32(),
}
"""What a column is turned into, without a changed value, where a table has not its own type."""


def refuse_extensions(schema: pa.Schema, where: str) -> None:
    """Raise RefusedError where a column is of an Arrow extension type, at any depth."""
    for field in schema:
        if _has_extension(field):
            raise refusal(where, f"column {shown(field.name)}")


def refuse_marked_extensions(source: bytes | Path | io.BufferedIOBase, where: str) -> None:
    """Raise RefusedError where the footer of a Parquet file announces an Arrow extension type.

    Looks for the announcement in the bytes of the footer: whoever lets the library open the file has already run the
    code of a registered type, since it parses the Arrow schema in the footer at once.
    """
    footer = _footer(source)
    if any(mark in footer for mark in _MARKS):
        raise refusal(where, "a column")


def _footer(source: bytes | Path | io.BufferedIOBase) -> bytes:
    """The metadata at the end of a Parquet file; all of it where its length makes no sense."""
    if isinstance(source, Path):
        with source.open("rb") as opened:
            return _footer(opened)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, size - 8 - length))
    return file.read()


def _marks() -> list[bytes]:
    """The announcement as base64 shows it at each of the three places it can take in a group of three bytes."""
    marks = []
    for before in range(3):
        text = base64.b64encode(b"\0" * before + EXTENSION_MARK)
        # the characters that are made of the announcement's own bits alone
        marks.append(text[(before * 8 + 5) // 6 : (before + len(EXTENSION_MARK)) * 8 // 6])
    return marks


def refusal(where: str, what: str) -> RefusedError:
    """The error for a column of an extension type."""
    return RefusedError(f"{where}: {what} is of an Arrow extension type, which may run code; store it as a plain type")


def _has_extension(field: pa.Field) -> bool:
    if isinstance(field.type, pa.BaseExtensionType) or EXTENSION_MARK in (field.metadata or {}):
        return True
    if pa.types.is_dictionary(field.type):
        return _has_extension(pa.field("value", field.type.value_type))
    if pa.types.is_nested(field.type):
        return any(_has_extension(field.type.field(index)) for index in range(field.type.num_fields))
    return False


def storable(rows: pa.Table, where: str) -> pa.Table:
    """The rows with each column in the type that a table keeps: nullable, without metadata, never a changed value.

    Raises RefusedError for extension types, UsageError for types that a table has not, for values that do not fit,
    and for names that are empty, not printable, longer than 255 characters or equal but for case.
    """
    refuse_extensions(rows.schema, where)
    _check_names(rows.schema.names, where)
    fields = [pa.field(field.name, _kept_type(field, where)) for field in rows.schema]
    columns = []
    for field, column in zip(fields, rows.columns, strict=True):
        try:
            columns.append(column if column.type == field.type else column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = shown(str(error), 160)
            raise UsageError(f"{where}: column {shown(field.name)} of {column.type}: {reason}") from error
    return pa.table(columns, schema=pa.schema(fields))


def _check_names(names: list[str], where: str) -> None:
    if len(names) > MAX_COLUMNS:
        raise UsageError(f"{where}: {len(names)} columns; a table has at most {MAX_COLUMNS}")
    seen: dict[str, str] = {}
    for name in names:
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise UsageError(f"{where}: column {shown(name)}; a name has 1 to {MAX_NAME} printable characters")
        if name.lower() in seen:
            other = shown(seen[name.lower()])
            raise UsageError(f"{where}: columns {other} and {shown(name)}; names must differ in more than case")
        seen[name.lower()] = name


def _kept_type(field: pa.Field, where: str) -> pa.DataType:
    """The type that a table keeps a column in."""
    kind = field.type
    if pa.types.is_dictionary(kind):
        return _kept_type(pa.field(field.name, kind.value_type), where)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(pa.field("element", _kept_type(pa.field(field.name, kind.value_type), where)))
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", tz="UTC" if kind.tz else None)
    kept = _KEPT_AS.get(kind, kind)
    if kept in _KEPT or pa.types.is_decimal128(kept):
        return kept
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    raise UsageError(
        f"{where}: column {shown(field.name)} holds {shown(kind)}; a table keeps numbers, text, bytes, true or false, "
        "dates, dates with a time of day, and lists of these"
    )


def check_text_columns(schema: pa.Schema, where: str) -> None:
    """Raise UsageError for columns that a reader of text made because it could not read what is in them."""
    if len(schema) > MAX_COLUMNS:
        raise UsageError(f"{where}: {len(schema)} columns; a table has at most {MAX_COLUMNS}")
    for field in schema:
        if pa.types.is_binary(field.type):  # what Arrow makes of bytes that are no UTF-8
            raise UsageError(f"{where}: column {shown(field.name)} is not UTF-8; save the file as UTF-8")
        if pa.types.is_null(field.type):
            raise UsageError(f"{where}: column {shown(field.name)} has no values at the start; leave it out")


_MARKS = _marks()
