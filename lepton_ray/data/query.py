"""SQL over tables: which statements are let through, how they are run, and what their errors mean.

The engine is DataFusion as the Delta Lake library brings it: it reads the very version that was opened, on S3 with the
same credentials, leaves out files by partition and bounds, and needs no further package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import DeltaError

from lepton_ray.errors import IntegrityError, LeptonError, RefusedError, UnavailableError, UsageError, shown

MAX_SQL = 100_000
"""Characters of a statement or expression at most."""
# possessive, so that a thousand comments do not take for ever
_FIRST_WORD = re.compile(r"(?:\s|--[^\n]*+\n?|/\*.*?\*/|\()*+([A-Za-z]+)", re.DOTALL)
_WRITING_WORD = re.compile(r"\b(insert|update|delete|merge|copy|create|drop|alter|truncate|into)\b", re.IGNORECASE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_AWAY = re.compile(
    r"error sending request|Error performing [A-Z]+|connection (refused|closed)|timed out", re.IGNORECASE
)
_LOST = re.compile(r"parquet|object.?store|No such file", re.IGNORECASE)
_EXPLICIT_CAST = re.compile(r"cast\s*\(|::|to_number|arrow_cast", re.IGNORECASE)
_NUMBER = r"(?:U?Int\d+|Float\d+|Decimal\d+\([^)]*\))"
_TEXT = r'(?:Large)?Utf8(?:View)?\("(?:(?!"\) AS )[\s\S])*"\)'
_COLUMN = r"(?:(?! AS )[^()])+"
_TEXT_AS_NUMBER = re.compile(rf"CAST\((?P<what>{_TEXT}|{_COLUMN}) AS {_NUMBER}\)")


def refuse_writing(sql: str) -> None:
    """Raise RefusedError for a statement that could write: the engine would copy rows to any file of this machine."""
    if len(sql) > MAX_SQL:
        raise UsageError(f"query of {len(sql)} characters: at most {MAX_SQL}")
    word = _FIRST_WORD.match(sql)
    first = word[1].lower() if word else ""
    if first not in ("select", "with"):
        raise RefusedError(
            f"query {shown(sql)}: only SELECT is carried out; rows are changed by lepton-ray data update, delete, merge"
        )
    # SELECT cannot contain a writing statement, WITH can begin one; quotes and comments are not looked into, since
    # what this would take for quoted the engine might not
    if first == "with" and (writing := _WRITING_WORD.search(sql)):
        raise RefusedError(f"query {shown(sql)}: the word {writing[0].upper()} may not stand in a WITH query")


class Engine:
    """Tables by name, and SELECTs over them.

    Args:
        tables: by the names that statements use.
        threads: that work on one statement; None leaves it to the engine.
    """

    def __init__(self, tables: Mapping[str, DeltaTable], threads: int | None = None) -> None:
        settings = {"datafusion.execution.target_partitions": str(threads)} if threads else None
        self._builder = QueryBuilder(settings)
        for name, table in tables.items():
            self._builder.register(name, table)

    def batches(self, sql: str) -> Iterator[pa.RecordBatch]:
        """The result of a statement, batch by batch. Raises what the engine raises; see `engine_errors`."""
        yield from self._reader(sql)

    def schema(self, sql: str) -> pa.Schema:
        """The columns of a statement's result; no row is read."""
        return self._reader(sql).schema

    def plan(self, sql: str) -> str:
        """The engine's plan of a statement when each value has got its type, before anything is simplified."""
        plan = ""
        for row in pa.Table.from_batches(self._reader(f"EXPLAIN VERBOSE {sql}")).to_pylist():
            if row["plan"] != "SAME TEXT AS ABOVE":
                plan = row["plan"]
            if row["plan_type"] == "logical_plan after type_coercion":
                break
        return plan

    def _reader(self, sql: str) -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_stream(self._builder.execute(sql))


def select(tables: Mapping[str, DeltaTable], sql: str, name: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The result of one SELECT, batch by batch.

    Args:
        tables: by the names that the statement may use.
        sql: the statement.
        name: of the table, for messages.
        schema: of the table.

    Raises RefusedError for what is no SELECT, UsageError for one that fails or takes text for numbers in silence.
    """
    refuse_writing(sql)
    with engine_errors(name, "query"):
        engine = Engine(tables)
        refuse_silent_casts(engine, sql, sql, schema, "query")
        yield from engine.batches(sql)


def refuse_silent_casts(engine: Engine, sql: str, written: str, schema: pa.Schema, what: str) -> None:
    """Raise UsageError where the engine would turn text into numbers by itself: `label = '3'`, `name > 2`.

    Args:
        engine: which knows the tables.
        sql: the whole statement.
        written: what the user wrote of it; who writes a cast there may have any.
        schema: of the table.
        what: `query`, `where` or the like, for messages.
    """
    if _EXPLICIT_CAST.search(written):
        return
    for found in _TEXT_AS_NUMBER.finditer(engine.plan(sql)):
        text = found["what"].startswith(("Utf8", "LargeUtf8"))
        column = found["what"].rpartition(".")[2].strip('"')
        if text or (column in schema.names and pa.types.is_string(schema.field(column).type)):
            thing = shown(found["what"]) if text else f"column {shown(column)} of text"
            raise UsageError(
                f"{what} {shown(written)}: compares or computes with {thing} as if it were a number; write numbers "
                "without quotes and texts with them, or CAST(... AS ...)"
            )


class engine_errors:  # noqa: N801 - used like contextlib's functions, and these lose a panic
    """The engine's errors within the block in the house's own words: through the statement, or what lies beneath.

    Args:
        name: of the table.
        what: `query` or the like.
    """

    def __init__(self, name: str, what: str) -> None:
        self._name, self._what = name, what

    def __enter__(self) -> None:
        """Nothing yet."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, LeptonError):
            return
        if isinstance(error, DeltaError | pa.ArrowException | OSError):
            raise self._translated(error) from error
        # a panic of the engine is no Exception in its binding; Ctrl-C and the like pass
        if type(error).__name__ == "PanicException":
            reason = shown(str(error), 200)
            raise UsageError(f"{self._what}: the engine failed, {reason}; put it another way") from error

    def _translated(self, error: BaseException) -> LeptonError:
        text, reason = str(error), one_line(error, 300)
        if _AWAY.search(text):
            return UnavailableError(f"table {shown(self._name)}: the store does not answer, {reason}; try again")
        if _LOST.search(text):
            return IntegrityError(f"table {shown(self._name)}: a data file cannot be read, {reason}")
        return UsageError(f"{self._what}: {reason}; the table is called {shown(self._name)} or t")


def one_line(error: BaseException, limit: int) -> str:
    """A library's words in one line, without its colours."""
    return shown(" ".join(_COLOUR.sub("", str(error)).split()), limit)


def quoted(names: Iterable[str]) -> list[str]:
    """Names of columns as SQL has them, whatever their letters."""
    return ['"' + name.replace('"', '""') + '"' for name in names]
