"""The report of a cleaning in the store: a page for people, a Parquet file for programs."""

from __future__ import annotations

import json

import pyarrow as pa

from lepton_ray.data.cleaning.outcome import CleaningOutcome
from lepton_ray.data.page import Bar, Section, bars, cut, figure, percent, render
from lepton_ray.data.parts import encode_part
from lepton_ray.storage import Store


def report_key(table: str, version: int, ending: str) -> str:
    """Where the report of the cleaning that made a version lies."""
    return f"reports/{table}/cleaning-{version:010d}.{ending}"


def write_report(store: Store, outcome: CleaningOutcome) -> str:
    """Write both files; returns the key of the page."""
    rows: pa.Table = outcome.to_arrow()
    store.put(report_key(outcome.table, outcome.version, "parquet"), encode_part(rows))
    key = report_key(outcome.table, outcome.version, "html")
    store.put(key, page(outcome).encode())
    return key


def page(found: CleaningOutcome) -> str:
    """The report as HTML."""
    read = found.rows_read
    tiles = [
        ("rows kept", f"{found.rows_written:,}", f"of {read:,}"),
        ("left out", f"{found.rows_dropped:,}", "duplicates and the like"),
        ("quarantined", f"{found.rows_quarantined:,}", percent(found.rows_quarantined, read)),
        ("steps", f"{len({step.step for step in found.steps})}", f"in {found.seconds:.1f} s"),
    ]
    kept = found.rows_written
    outcome = Section("Where the rows went", f"{read:,} rows of {found.table}@{found.from_version}")
    for label, rows, tone in (
        ("kept", kept, "good"),
        ("left out", found.rows_dropped, "warn"),
        ("quarantined", found.rows_quarantined, "bad"),
    ):
        outcome.bars.append(Bar(label, rows, rows / read if read else 0, f"{rows:,} ({percent(rows, read)})", tone))
    sections = [outcome]
    for title, note, name, tone in (
        ("Rows that failed", "by step; they are in quarantine", "quarantined", "bad"),
        ("Rows left out", "by step; the version before still has them", "dropped", "warn"),
        ("Rows changed", "by step; rows that stay, with another value", "changed", "accent"),
    ):
        counts = [(f"{step.step}. {step.rule}", getattr(step, name)) for step in found.steps if getattr(step, name)]
        if counts:
            sections.append(Section(title, note, bars=bars([(who, rows, f"{rows:,}") for who, rows in counts], tone)))
    lacking = [(name, before, f"{before:,} to {after:,}") for name, (before, after) in found.missing.items() if before]
    if lacking:
        sections.append(Section("Missing values", "before, and after among the rows kept", bars=bars(lacking, "warn")))
    sections.append(
        Section(
            "Steps",
            head=["step", "rule", "columns", "left out", "quarantined", "changed", "learnt"],
            rows=[
                [
                    str(step.step),
                    step.rule,
                    cut(", ".join(step.columns)),
                    figure(step.dropped),
                    figure(step.quarantined),
                    figure(step.changed),
                    cut(_learnt(step.learnt), 400),
                ]
                for step in found.steps
            ],
        )
    )
    if found.examples:
        sections.append(
            Section("Why rows failed", head=["the first of them"], rows=[[cut(each, 400)] for each in found.examples])
        )
    subtitle = f"made from {found.table}@{found.from_version} by the plan {found.plan_sha256[:12]}"
    if found.quarantine:
        subtitle += f"; rows that failed are in {found.quarantine}"
    return render("cleaning report", f"{found.table}@{found.version}", subtitle, tiles, sections)


def _learnt(learnt: dict[str, object]) -> str:
    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return ", ".join(f"{name}: {json.dumps(plain(value))}" for name, value in learnt.items())
