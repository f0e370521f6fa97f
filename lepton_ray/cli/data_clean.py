"""`lepton-ray data clean|profile|quarantine`: make a table cleaner by a plan, and see what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from lepton_ray.cli import progress
from lepton_ray.cli.output import emit, json_option, printable, reserve_stdout, store_option, table

if TYPE_CHECKING:
    from lepton_ray.data.cleaning.outcome import CleaningOutcome
    from lepton_ray.data.profile import TableProfile

PLAN = """PLAN.yaml is a list of steps, carried out in this order, and how many rows may fail. For example

\b
  max_quarantine: 0.02
  steps:
  - normalise: {columns: [name, comment], html: true}
  - markers: {columns: [age], values: ["?", "n/a"]}
  - type: {columns: [age], to: int64}
  - range: {columns: [age], min: 0, max: 120}
  - missing: {columns: [age], fill: median}
  - check: {rule: "begin <= end"}
  - duplicates: {}

docs/data.md describes every step."""


@click.command(epilog=PLAN)
@click.argument("table_name", metavar="TABLE")
@click.argument("plan", metavar="PLAN.yaml", type=click.Path(dir_okay=False))
@click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")
@click.option(
    "--on", type=click.Choice(["auto", "here", "ray"]), default="auto", show_default=True,
    help="Where: in this process or on Ray Data; auto takes Ray from 1 GiB on, and where RAY_ADDRESS is set.",
)  # fmt: skip
@store_option
@json_option
def clean(table_name: str, plan: str, dry_run: bool, on: Any, store_uri: str | None, as_json: bool) -> None:
    """Make a version of TABLE that keeps to a plan.

    Rows that fail a rule go to the table TABLE-quarantine with file, row, rule and reason. Where more of them fail than
    the plan allows (max_quarantine, 1% by default), the command ends with exit code 4 and nothing is written. Doing it
    again changes nothing.
    """
    if as_json and on != "here":
        reserve_stdout()
    from lepton_ray.data.cleaning.table import clean as carry_out
    from lepton_ray.settings.cleaning import load_plan
    from lepton_ray.storage import open_store

    wanted = load_plan(plan)
    store = open_store(store_uri)
    with progress.doing(table_name) as tell:
        found = carry_out(store, table_name, wanted, dry_run=dry_run, on=on, progress=tell)
    emit(found.to_dict(), as_json, lambda console: _print_outcome(console, found, store.uri))


def _print_outcome(console: Console, found: CleaningOutcome, uri: str) -> None:
    """What was found, in words."""
    made = f"{found.table}@{found.version}"
    if found.state == "already clean":
        console.print(f"{made}: this plan made it; nothing to do")
        return
    if found.state == "unchanged":
        console.print(f"{made}: keeps to the plan; nothing to do")
        return
    would = " would be" if found.state == "dry run" else ""
    console.print(
        f"{made}: {found.rows_written:,} of {found.rows_read:,} rows{would} kept, {found.rows_dropped:,} left out, "
        f"{found.rows_quarantined:,} quarantined"
    )
    rows = [
        [
            step.step,
            step.rule,
            escape(printable(", ".join(step.columns), 60)),
            step.dropped,
            step.quarantined,
            step.changed,
        ]
        for step in found.steps
    ]
    console.print(table(None, ["step", "rule", "columns", "left out", "quarantined", "changed"], rows))
    for example in found.examples[:5]:
        console.print(f"  {escape(printable(example, 160))}")
    if found.quarantine:
        console.print(f"rows that failed are in {found.quarantine}; see lepton-ray data quarantine {found.table}")
    if found.page:
        console.print(f"report {escape(uri)}/{found.page}")


@click.command()
@click.argument("table_name", metavar="TABLE[@VERSION]")
@store_option
@json_option
def profile(table_name: str, store_uri: str | None, as_json: bool) -> None:
    """Look at every column of TABLE and write a page about it.

    The page (HTML, one file that needs nothing else) shows types, missing values, distributions, class balance and
    sample images.
    """
    from lepton_ray.data.profile import profile as look
    from lepton_ray.storage import open_store

    store = open_store(store_uri)
    with progress.doing(table_name):
        found = look(store, table_name)
    emit(found.to_dict(), as_json, lambda console: _print_profile(console, found, store.uri))


def _print_profile(console: Console, found: TableProfile, uri: str) -> None:
    console.print(f"{found.table}@{found.version}: {found.rows:,} rows")
    rows = []
    for each in found.columns:
        about = "" if each.distinct_exact else "about "
        low, _, middle, _, high = each.quantiles or ("", "", "", "", "")
        low, high = each.span or (low, high)
        middle = "" if each.span else middle
        ends = [f"{value:.4g}" if isinstance(value, float) else value for value in (low, middle, high)]
        rows.append([escape(printable(each.name, 60)), each.type, each.missing, f"{about}{each.distinct:,}", *ends])
    console.print(table(None, ["column", "type", "missing", "different", "least", "median", "greatest"], rows))
    console.print("least, median and greatest are lengths for text and bytes")
    console.print(f"page {escape(uri)}/{found.page}")


@click.command()
@click.argument("table_name", metavar="TABLE")
@click.option("--rule", help="Rows of this rule alone, e.g. range.")
@click.option("--limit", type=click.IntRange(0, 10_000), default=20, show_default=True, help="Rows printed at most.")
@store_option
@json_option
def quarantine(table_name: str, rule: str | None, limit: int, store_uri: str | None, as_json: bool) -> None:
    """Print the rows of TABLE that failed a rule of a cleaning: file, row, rule and reason.

    They are in the table TABLE-quarantine with all their columns: lepton-ray data query TABLE-quarantine "SELECT ...".
    """
    from lepton_ray.data.cleaning.publishing import in_quarantine
    from lepton_ray.storage import open_store

    found = in_quarantine(open_store(store_uri), table_name, rule=rule, limit=limit)

    def words(console: Console) -> None:
        total = sum(found["rules"].values())
        console.print(f"{found['quarantine'] or table_name}: {total:,} rows in quarantine")
        for name, count in found["rules"].items():
            console.print(f"  {count:,} x {name}")
        rows = [
            [
                escape(printable(each["key"] or "", 60)),
                each["from"],
                each["row"],
                each["rule"],
                escape(printable(each["reason"], 120)),
            ]
            for each in found["rows"]
        ]
        if rows:
            console.print(table(None, ["key", "from", "row", "rule", "reason"], rows))

    emit(found, as_json, words)


VERBS = (clean, profile, quarantine)
