"""`lepton-ray runs`: list, show, report."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lepton_ray.cli.output import emit, json_option, store_option, table


@click.group()
def runs() -> None:
    """List, show and report training runs."""


@runs.command("list")
@store_option
@json_option
def list_command(store_uri: str | None, as_json: bool) -> None:
    """List the runs of a store, the newest first."""
    from lepton_ray.errors import IntegrityError, NotFoundError
    from lepton_ray.monitoring.runs import list_runs
    from lepton_ray.monitoring.summary import brief
    from lepton_ray.storage import open_store

    store = open_store(store_uri)
    found: list[dict[str, Any]] = []
    damaged: list[str] = []
    for run in list_runs(store):
        try:
            found.append(brief(store, run, time.time()))
        except IntegrityError as error:
            damaged.append(str(error))
        except NotFoundError:
            continue  # a folder that has no record yet
    found.sort(key=lambda each: -float(each["created_at"] or 0))

    def words(console: Console) -> None:
        if not found and not damaged:
            console.print(f"no runs in {store.uri}; start one with: lepton-ray train CONFIG.yaml", markup=False)
        if found:
            _print_table(console, table(None, _COLUMNS, [_line(each) for each in found]))
        for line in damaged:
            console.print(f"skipped: {line}", markup=False)

    emit({"store": store.uri, "runs": found, "damaged": damaged}, as_json, words)


@runs.command()
@click.argument("run")
@store_option
@json_option
def show(run: str, store_uri: str | None, as_json: bool) -> None:
    """Show what is known of RUN: state, metrics, goodput, restarts, checkpoints."""
    from lepton_ray.monitoring.summary import summary
    from lepton_ray.storage import open_store

    found = summary(open_store(store_uri), run, time.time())
    emit(found, as_json, lambda console: _show(console, found))


@runs.command()
@click.argument("run")
@store_option
@json_option
def report(run: str, store_uri: str | None, as_json: bool) -> None:
    """Write the report of RUN: one HTML file beside the run, without links to elsewhere."""
    from lepton_ray.monitoring.report import write_report
    from lepton_ray.storage import open_store

    store = open_store(store_uri)
    key = write_report(store, run)
    uri = f"{store.uri}/{key}"
    emit({"run": run, "key": key, "uri": uri}, as_json, lambda console: console.print(uri, markup=False))


_COLUMNS = ("run", "state", "steps", "held-out", "goodput", "wall time", "model", "started")


def _print_table(console: Console, made: Table) -> None:
    """A table with whole names, cut to the width of a terminal but not where a file or program takes the output."""
    made.columns[0].no_wrap = True
    made.columns[0].overflow = "fold"
    if not console.is_terminal:
        console.width = 240
    console.print(made)


def _line(run: dict[str, Any]) -> tuple[object, ...]:
    from lepton_ray.monitoring.figures_text import duration, percent, score

    return (
        run["run"],
        run["state"],
        f"{run['step']}/{run['total_steps'] or '?'}",
        next((f"{name} {score(name, value)}" for name, value in run["metrics"].items()), "-"),
        percent(run["goodput"]),
        duration(run["wall_seconds"]),
        run["model_version"] or "-",
        f"{duration(time.time() - run['created_at'])} ago",
    )


def _show(console: Console, run: dict[str, Any]) -> None:
    from lepton_ray.monitoring.figures_text import clock_time, data_size, duration, number, percent, score

    goodput, data = run["goodput"], run["data"]
    metrics = ", ".join(f"{name} {score(name, value)}" for name, value in run["metrics"].items())
    facts = [
        ("state", run["state"]),
        ("error", run["error"]),
        ("task", run["task"]),
        ("table", f"{data['table']}@{data['version']}" if data["table"] else None),
        ("steps", f"{run['step']} of {run['total_steps'] or '?'}"),
        ("held-out", metrics or None),
        ("model", run["model_version"]),
        ("started", clock_time(run["created_at"])),
        ("wall time", f"{duration(goodput['wall_seconds'])} x {_workers(goodput)}"),
        ("throughput", f"{number(run['samples_per_second'])} samples/s" if run["samples_per_second"] else None),
        ("failures", f"{run['failures']} ({goodput['replayed_steps']} steps done again)"),
    ]
    console.print(f"run {run['run']}", style="bold", markup=False)
    for name, value in facts:
        if value is not None:
            console.print(f"  {name:<11}{value}", markup=False)
    console.print()
    whole = goodput["worker_seconds"] or 1.0
    rows = [
        (bucket, f"{spent:.2f}", percent(spent / whole), "#" * round(30 * spent / whole))
        for bucket, spent in goodput["buckets"].items()
        if spent >= 0.005
    ]
    rows.append(("total", f"{goodput['worker_seconds']:.2f}", percent(1.0), "wall time x workers"))
    title = f"goodput {percent(goodput['ratio'])}"
    _print_table(console, table(title, ("bucket", "worker-seconds", "share", ""), rows))
    if run["incidents"]:
        _show_incidents(console, run["incidents"])
    if run["checkpoints"]:
        newest = run["checkpoints"][0]
        when = clock_time(newest["created_at"])
        size = data_size(newest["bytes"])
        console.print(f"\nnewest checkpoint: step {newest['step']}, {size}, {when}", markup=False)


def _workers(goodput: dict[str, Any]) -> str:
    return f"{'up to ' if goodput['elastic'] else ''}{goodput['workers']} workers"


def _show_incidents(console: Console, found: list[dict[str, Any]]) -> None:
    """When, what, where and why; the evidence is in the JSON document."""
    from lepton_ray.monitoring.figures_text import clock_time

    rows = [
        (
            clock_time(each["at"]),
            each["kind"],
            "-" if each["rank"] is None else str(each["rank"]),
            "-" if each["step"] is None else str(each["step"]),
            each["reason"],
        )
        for each in found
    ]
    console.print()
    _print_table(console, table("incidents", ("when", "kind", "rank", "step", "what was seen"), rows))
