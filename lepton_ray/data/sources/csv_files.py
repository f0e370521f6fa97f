"""CSV files with a header.

Types come from the first rows, or from the settings; a later value of another kind is an error with its row. No value
is changed: text that only looks like a number stays text.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from lepton_ray.data.column_types import check_text_columns
from lepton_ray.data.images import pixel_columns
from lepton_ray.data.sources.streams import Job
from lepton_ray.errors import UsageError, shown

TYPES = {
    "int": pa.int64(),
    "float": pa.float64(),
    "text": pa.string(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}
"""Arrow types of the names that settings know."""
_LOOKS_LIKE_A_CODE = r"^[+-]?0[0-9]"
_TOO_LONG_FOR_A_FLOAT = r"^[+-]?[0-9]{16,}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_MISSING = ["", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "#N/A", "-NaN", "-nan", "None"]
MOSTLY = 0.9
"""A column of text with a larger share of numbers than this was hardly meant to be text: the user has to say."""
_IN_COLUMN = re.compile(r"(?:In CSV column #(\d+): )?(?:Row #(\d+): )?(.*)", re.DOTALL)


def read_csv(job: Job, known: pa.Schema | None) -> Iterator[pa.Table]:
    """The rows of one file.

    Args:
        job: the file and how to read it.
        known: columns and types of the files before it; None of the first.

    Raises UsageError naming row, column and value for what does not parse, for text that is no UTF-8, for ragged rows,
    and for a header that is not that of the files before.
    """
    reader = _CsvReader(job)
    names = reader.header()
    if known is not None:
        job.check_names(names, known.names)
        types = {field.name: field.type for field in known}
    else:
        types = reader.types(names)
    pixels = [name for name in pixel_columns(names) if pa.types.is_integer(types[name])]
    # pixels parsed as bytes from the start take an eighth of the memory
    yield from reader.rows({**types, **dict.fromkeys(pixels, pa.uint8())})


class _CsvReader:
    def __init__(self, job: Job) -> None:
        self._job = job
        tabs = job.input.path.lower().endswith((".tsv", ".tsv.gz"))
        self._parse = pa.csv.ParseOptions(
            delimiter=job.reading.delimiter or ("\t" if tabs else ","), newlines_in_values=True
        )
        self._names: list[str] = []

    def header(self) -> list[str]:
        """The names of the columns."""
        limit = self._job.reading.limits.max_row_bytes
        with self._job.open(counted=False) as stream:
            start = stream.read(limit)
        text = _text(start, self._job.where)
        try:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=self._parse.delimiter)
            self._names = next((row for row in rows if row), [])
        except csv.Error as error:
            raise UsageError(f"{self._job.where}: header cannot be read, {shown(str(error))}") from error
        if not self._names:
            raise UsageError(f"{self._job.where}: no rows in it; expected a header and rows")
        twice = {name for name in self._names if self._names.count(name) > 1} if len(self._names) < 10_000 else set()
        if twice:
            raise UsageError(f"{self._job.where}: column {shown(min(twice))} stands twice in the header; rename one")
        return self._names

    def types(self, names: list[str]) -> dict[str, pa.DataType]:
        """The type of each column, by the settings or else by the first block of rows."""
        given = {name: TYPES[kind] for name, kind in self._job.reading.types.items()}
        for name in given:
            if name not in names:
                raise UsageError(f"{self._job.where}: no column {shown(name)}; it has {shown(', '.join(names), 200)}")
        with self._opened(dict.fromkeys(names, pa.string())) as reader:
            first = next(iter(reader), None)
        if first is None or not first.num_rows:
            raise UsageError(f"{self._job.where}: no rows in it, only a header")
        with self._opened(given) as reader:
            found = reader.schema
        types = {}
        for field in found:
            kind = field.type
            if field.name not in given:
                kind = _honest(kind, first[field.name])
                if pa.types.is_string(field.type):
                    self._check_mixed(field.name, first[field.name])
            types[field.name] = pa.timestamp("us") if pa.types.is_timestamp(kind) else kind
        check_text_columns(pa.schema(types.items()), self._job.where)
        return types

    def _check_mixed(self, name: str, texts: pa.Array) -> None:
        """Raise UsageError for a column of numbers that one word would silently turn into text."""
        if pc.any(pc.match_substring_regex(texts, _LOOKS_LIKE_A_CODE)).as_py():
            return
        missing = pc.is_in(texts, pa.array(_MISSING))
        number = pc.match_substring_regex(texts, _NUMBER)
        numbers, words = pc.sum(number).as_py(), pc.sum(pc.invert(pc.or_(missing, number))).as_py()
        if words and numbers > MOSTLY * (numbers + words):
            row = pc.index(pc.or_(missing, number), False).as_py()
            raise UsageError(
                f"{self._job.where} row {row + 1}: column {shown(name)} holds {shown(texts[row].as_py())}, and numbers "
                f"in {numbers} other rows; mend it, or say what it is: --type {name}=text"
            )

    def rows(self, types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
        """The rows, some megabytes at a time."""
        with self._opened(types, counted=True) as reader:
            for batch in reader:
                # empty text is a missing value, as it is for numbers; "NA" and "null" are words in a text
                columns = [_empty_to_null(column) for column in batch.columns]
                yield pa.table(columns, names=batch.schema.names)

    @contextlib.contextmanager
    def _opened(self, types: dict[str, pa.DataType], *, counted: bool = False) -> Iterator[pa.csv.CSVStreamingReader]:
        try:
            with self._job.open(counted=counted) as stream:
                watched = _Watched(stream, self._job.where, self._parse.delimiter)
                file = pa.PythonFile(watched, mode="r")
                yield pa.csv.open_csv(
                    file,
                    # without threads an error knows its row, and the speed is the same
                    read_options=pa.csv.ReadOptions(
                        block_size=self._job.reading.limits.max_row_bytes, use_threads=False
                    ),
                    parse_options=self._parse,
                    convert_options=pa.csv.ConvertOptions(column_types=types),
                )
        except (pa.ArrowException, ValueError) as error:
            raise UsageError(f"{self._job.where}{self._told(error, types)}") from error

    def _told(self, error: Exception, types: dict[str, pa.DataType]) -> str:
        """An error of the library with names for its numbers."""
        text = " ".join(str(error).split())
        if "straddling" in text:
            limit = self._job.reading.limits.max_row_bytes
            return f": a row has more than {limit} bytes (is a quote left open?); raise the limit max_row_bytes"
        found = _IN_COLUMN.fullmatch(text)
        column, row, rest = (found[1], found[2], str(found[3])) if found else (None, None, text)
        told = f" row {int(row) - 1}" if row else ""
        if column:
            name = self._names[int(column)]
            told += f": column {shown(name)}"
            if value := re.search(r"invalid value '(.*)'", rest):
                kind = types.get(name) or "the kind of value that the rows before have"
                return f"{told} holds {shown(value[1])}; expected {kind}"
            if "UTF8" in rest:
                return f"{told} is not UTF-8; save the file as UTF-8"
        if ragged := re.match(r"CSV parse error: (?:Row #(\d+): )?Expected (\d+) columns, got (\d+): ?(.*)", rest):
            told = f" row {int(ragged[1]) - 1}" if ragged[1] else told
            return f"{told}: {ragged[3]} values, {shown(ragged[4])}; expected {ragged[2]}, one for each column"
        return f"{told}: {shown(rest, 200)}"


class _Watched:
    """The bytes on their way to the parser, which itself takes zero bytes and an open quote at the end for text."""

    def __init__(self, stream: io.BufferedIOBase, where: str, delimiter: str) -> None:
        self._stream, self._where, self._delimiter = stream, where, delimiter
        self._lines, self._quotes = 1, 0
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        data = self._stream.read(size)
        if (at := data.find(b"\0")) >= 0:
            line = self._lines + data.count(b"\n", 0, at)
            raise UsageError(f"{self._where} line {line}: a zero byte; expected text (UTF-8, not UTF-16)")
        self._lines += data.count(b"\n")
        self._quotes += data.count(b'"')
        if not data and size and self._quotes % 2:
            self._check_quotes()
        return data

    def _check_quotes(self) -> None:
        """An odd number of quotes: fine where one stands within an unquoted value, else a value has no end."""
        self._stream.seek(0)
        lines = codecs.getreader("utf-8")(self._stream, "replace")
        rows = csv.reader(lines, delimiter=self._delimiter, strict=True)
        longest = csv.field_size_limit(2**31 - 1)
        begun = 1
        try:
            for _ in rows:
                begun = rows.line_num + 1
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UsageError(f"{self._where} line {begun}: a quote is opened and never closed; close it") from error
        finally:
            csv.field_size_limit(longest)

    def close(self) -> None:
        """The stream is closed by whoever opened it."""
        self.closed = True


def _text(start: bytes, where: str) -> str:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:1000]:
        raise UsageError(f"{where} line 1: a zero byte; expected text (UTF-8, not UTF-16)")
    return start.decode("utf-8-sig", errors="replace")


def _honest(kind: pa.DataType, texts: pa.Array) -> pa.DataType:
    """The type found, but text where a number would lose what the text says, and where a table has no such type."""
    if pa.types.is_null(kind):  # "NA" and the like, or nothing at all
        return pa.string() if pc.any(pc.not_equal(texts, "")).as_py() else kind
    if pa.types.is_time(kind):
        return pa.string()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        if pc.any(pc.match_substring_regex(texts, _LOOKS_LIKE_A_CODE)).as_py():
            return pa.string()
        if pa.types.is_floating(kind) and pc.any(pc.match_substring_regex(texts, _TOO_LONG_FOR_A_FLOAT)).as_py():
            return pa.string()
    return kind


def _empty_to_null(column: pa.Array) -> pa.Array:
    if not pa.types.is_string(column.type):
        return column
    empty = pc.equal(column, "")
    return pc.if_else(empty, pa.scalar(None, pa.string()), column) if pc.any(empty).as_py() else column
