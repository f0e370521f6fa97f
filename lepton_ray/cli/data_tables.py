"""`lepton-ray data update|delete|merge|restore|compact|vacuum`: change tables, version by version."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape

from lepton_ray.cli import progress
from lepton_ray.cli.data_reading import reading_of, reading_options
from lepton_ray.cli.output import emit, json_option, store_option, table

if TYPE_CHECKING:
    from lepton_ray.data.edits import Change
    from lepton_ray.data.merging import Matched, Unmatched
    from lepton_ray.data.retention import VacuumReport

EXPRESSIONS = """EXPR is an SQL expression over one row, e.g. "label = 3 AND split = 'test'"; a subquery may read the
whole table as t. A change makes a new version; the old ones stay readable until a vacuum."""

dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")


@click.command(epilog=EXPRESSIONS)
@click.argument("table_name", metavar="TABLE")
@click.option("--set", "assignments", multiple=True, required=True, metavar="COLUMN=EXPR", help="A new value.")
@click.option("--where", required=True, metavar="EXPR", help="Which rows; true for all.")
@dry_run_option
@store_option
@json_option
def update(
    table_name: str, assignments: tuple[str, ...], where: str, dry_run: bool, store_uri: str | None, as_json: bool
) -> None:
    """Set columns of the rows that a condition holds for; the rows keep their places."""
    from lepton_ray.data import edits
    from lepton_ray.storage import open_store

    new = _assignments(assignments)
    with progress.data_files(f"updating {table_name}") as tell:
        change = edits.update(open_store(store_uri), table_name, new, where=where, dry_run=dry_run, progress=tell)
    _tell(change, as_json)


def _assignments(given: tuple[str, ...]) -> dict[str, str]:
    from lepton_ray.errors import UsageError, shown

    found: dict[str, str] = {}
    for text in given:
        column, equals, expression = text.partition("=")
        if not equals or not column.strip():
            raise UsageError(f"--set {shown(text)}: expected COLUMN=EXPR, e.g. label=3 or name='cat'")
        if column.strip() in found:
            raise UsageError(f"--set {shown(text)}: column {shown(column.strip())} is set twice")
        found[column.strip()] = expression
    return found


@click.command(epilog=EXPRESSIONS)
@click.argument("table_name", metavar="TABLE")
@click.option("--where", required=True, metavar="EXPR", help="Which rows; true for all.")
@dry_run_option
@store_option
@json_option
def delete(table_name: str, where: str, dry_run: bool, store_uri: str | None, as_json: bool) -> None:
    """Take away the rows that a condition holds for."""
    from lepton_ray.data import edits
    from lepton_ray.storage import open_store

    with progress.data_files(f"deleting from {table_name}") as tell:
        change = edits.delete(open_store(store_uri), table_name, where=where, dry_run=dry_run, progress=tell)
    _tell(change, as_json)


@click.command(epilog="SOURCE is what lepton-ray data ingest takes; its rows are held in memory.")
@click.argument("source")
@click.argument("table_name", metavar="TABLE")
@click.option("--on", default="key", show_default=True, metavar="COLUMN", help="The column that both have.")
@click.option(
    "--matched", type=click.Choice(["update", "keep", "delete"]), default="update", show_default=True,
    help="What becomes of rows of the table that the source has, too.",
)  # fmt: skip
@click.option(
    "--unmatched", type=click.Choice(["insert", "skip"]), default="insert", show_default=True,
    help="What becomes of rows of the source that the table has not.",
)  # fmt: skip
@click.option("--evolve", is_flag=True, help="Take new columns in; columns that SOURCE lacks keep their values.")
@reading_options
@dry_run_option
@store_option
@json_option
def merge(
    source: str, table_name: str, on: str, matched: Matched, unmatched: Unmatched, evolve: bool, format_: str | None,
    delimiter: str | None, types: tuple[str, ...], limits: tuple[str, ...], dry_run: bool, store_uri: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Put the rows of SOURCE in the place of those of TABLE with the same key, and add the others."""
    from lepton_ray.data import merging
    from lepton_ray.storage import open_store

    reading = reading_of(format_, delimiter, types, limits)
    with progress.reading(source) as tell:
        change = merging.merge(
            open_store(store_uri), table_name, source, on=on, matched=matched, unmatched=unmatched, evolve=evolve,
            dry_run=dry_run, reading=reading, progress=tell,
        )  # fmt: skip
    _tell(change, as_json)


@click.command(epilog="Example: lepton-ray data restore digits@3, or digits@2026-11-22T10:00:00Z")
@click.argument("ref", metavar="TABLE@VERSION|TIME")
@dry_run_option
@store_option
@json_option
def restore(ref: str, dry_run: bool, store_uri: str | None, as_json: bool) -> None:
    """Make a new version that holds what an older one holds."""
    from lepton_ray.data import upkeep
    from lepton_ray.storage import open_store

    _tell(upkeep.restore(open_store(store_uri), ref, dry_run=dry_run), as_json)


@click.command()
@click.argument("table_name", metavar="TABLE")
@dry_run_option
@store_option
@json_option
def compact(table_name: str, dry_run: bool, store_uri: str | None, as_json: bool) -> None:
    """Join small data files into few; the rows stay what they are."""
    from lepton_ray.data import upkeep
    from lepton_ray.storage import open_store

    _tell(upkeep.compact(open_store(store_uri), table_name, dry_run=dry_run), as_json)


@click.command()
@click.argument("table_name", metavar="TABLE")
@click.option(
    "--keep-days", type=float, default=7.0, show_default=True, help="How long versions stay that others followed."
)
@dry_run_option
@store_option
@json_option
def vacuum(table_name: str, keep_days: float, dry_run: bool, store_uri: str | None, as_json: bool) -> None:
    """Remove data files of old versions; those that runs, models and evaluations name stay."""
    from lepton_ray.data import retention
    from lepton_ray.storage import open_store

    report = retention.vacuum(open_store(store_uri), table_name, keep_days=keep_days, dry_run=dry_run)
    emit(report.to_dict(), as_json, lambda console: _tell_vacuum(console, report))


def _tell(change: Change, as_json: bool) -> None:
    """What a change did, in words or as JSON."""

    def words(console: Console) -> None:
        made = change.version != change.base
        told = [
            f"{count:,} {what}"
            for what, count in (
                ("updated", change.updated), ("inserted", change.inserted), ("deleted", change.deleted),
            )
            if count
        ]  # fmt: skip
        rows = f"{', '.join(told) or 'no row changed'}; {change.rows_before:,} rows before, {change.rows_after:,} after"
        if change.dry_run:
            console.print(f"dry run, {change.table}@{change.base} stays: {rows}")
        elif made:
            console.print(f"{change.table}@{change.version}: {rows}")
        else:
            console.print(f"{change.table}@{change.base}: {rows}; no new version")
        if change.matched:
            console.print(f"  matched {change.matched:,}")
        files = f"{change.files_added:,} written ({_size(change.bytes_added)}), {change.files_removed:,} left out"
        console.print(f"  data files {files}")
        console.print(f"  fingerprint {change.fingerprint}")

    emit(change.to_dict(), as_json, words)


def _tell_vacuum(console: Console, report: VacuumReport) -> None:
    does = "would remove" if report.dry_run else "removed"
    console.print(f"{report.table}: {does} {report.files_removed:,} data files, {_size(report.bytes_removed)}")
    if report.protected:
        rows = [(version, escape(", ".join(by)[:200])) for version, by in report.protected.items()]
        console.print(table("kept beside the newest, since named elsewhere", ["version", "by"], rows))
    if report.lost:
        names = ", ".join(map(str, report.lost[:20])) + (", ..." if len(report.lost) > 20 else "")
        console.print(f"  versions that cannot be read {'then' if report.dry_run else 'any more'}: {names}")


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"


VERBS = (update, delete, merge, restore, compact, vacuum)
"""The commands, for the group `lepton-ray data`."""
