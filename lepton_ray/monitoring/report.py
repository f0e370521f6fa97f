"""The run report: one HTML file that needs nothing else, in the store beside its run.

Readable on a phone and on paper, light or dark as the reader's system is, without scripts and without links to
elsewhere. What a run does not have (yet) is shown as absent.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lepton_ray.errors import NotFoundError
from lepton_ray.monitoring import figures, figures_text
from lepton_ray.monitoring.goodput import BUCKETS
from lepton_ray.monitoring.history import read_evaluations, read_history
from lepton_ray.monitoring.ledger import RankEntry
from lepton_ray.monitoring.runs import read_entries
from lepton_ray.monitoring.summary import summary
from lepton_ray.storage import Store

TEMPLATE = Path(__file__).with_name("report.html.j2")
MAX_SPEC_CHARS = 20_000
MAX_LANES = 16
"""Ranks that get a line of their own in the timeline."""


def write_report(store: Store, run: str, now: float | None = None) -> str:
    """Write `runs/<run>/report.html` and return its key.

    Args:
        store: where the run is.
        run: its name.
        now: unix seconds; the present where not given.

    Raises NotFoundError for an unknown run, IntegrityError for a damaged record.
    """
    key = f"runs/{run}/report.html"
    store.put(key, render(store, run, time.time() if now is None else now).encode())
    return key


def render(store: Store, run: str, now: float) -> str:
    """The report as HTML. Raises as `write_report` does."""
    import jinja2

    from lepton_ray import __version__

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    for name in ("brief_duration", "clock_time", "data_size", "duration", "number", "percent"):
        environment.filters[name] = getattr(figures_text, name)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(**_page(store, run, now), version=__version__, written_at=now)


def _page(store: Store, run: str, now: float) -> dict[str, Any]:
    """Everything the template shows."""
    import markupsafe

    found = summary(store, run, now)
    history, evaluations = read_history(store, run), read_evaluations(store, run)
    entries, _ = read_entries(store, run)
    rows = found["data"]["rows"]
    whole = found["goodput"]["worker_seconds"] or 1.0
    charts = {
        "loss": figures.loss_chart(history, evaluations),
        "evaluation": figures.evaluation_chart(evaluations),
        "throughput": figures.throughput_chart(history),
        "parts": figures.parts_chart(history),
    }
    lanes, span, restarted = _lanes(found, entries)
    return {
        "run": found,
        "state": found["state"] if found["state"] in ("running", "finished", "failed", "interrupted") else "unknown",
        "metrics": [(name, figures_text.score(name, value)) for name, value in _newest(found, evaluations).items()][:3],
        "held_out_note": f"{rows['held_out']:,} held-out rows" if isinstance(rows.get("held_out"), int) else "",
        "rows_note": f"on {rows['held_out']:,} rows" if isinstance(rows.get("held_out"), int) else "",
        "rows_text": ", ".join(
            f"{figures_text.number(count)} {str(name).replace('_', ' ')}" for name, count in rows.items()
        ),
        "buckets": [
            (bucket, spent, spent / whole, BUCKETS[bucket]) for bucket, spent in found["goodput"]["buckets"].items()
        ],
        # the SVG is matplotlib's, which escapes every text in it
        "charts": {name: markupsafe.Markup(svg) for name, svg in charts.items()},  # noqa: S704 - see above
        "lanes": lanes,
        "span": span,
        "restarted": restarted,
        "drivers": _drivers(found),
        "lineage": [
            (str(name).replace("_", " "), value)
            for name, value in found["lineage"].items()
            if isinstance(value, str | int | float)
            and name not in ("run", "table", "table_version", "table_fingerprint")
        ],
        "environment": [(name, value) for name, value in found["environment"].items() if not isinstance(value, dict)],
        "spec": _spec(store, run),
    }


def _newest(found: dict[str, Any], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's final metrics, or those of its newest evaluation."""
    metrics: dict[str, Any] = found["metrics"] or (evaluations[-1]["metrics"] if evaluations else {})
    return metrics


def _drivers(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The attempts with how long each held the run."""
    drivers = []
    for attempt in found["attempts"]:
        began, ended = attempt.get("started_at"), attempt.get("ended_at")
        held = ended - began if isinstance(began, int | float) and isinstance(ended, int | float) else None
        drivers.append(
            {
                "attempt": attempt.get("attempt"),
                "driver": attempt.get("driver") or "-",
                "started_at": began,
                "held": held,
                "outcome": attempt.get("outcome") or (found["state"] if attempt is found["attempts"][-1] else None),
            }
        )
    return drivers


def _lanes(found: dict[str, Any], entries: list[RankEntry]) -> tuple[list[dict[str, Any]], float, bool]:
    """A line per rank for the timeline, its length in seconds, and whether anything was restarted."""
    begin = float(found["created_at"])
    ends = [entry.updated_at for entry in entries]
    over = found["finished_at"] if found["state"] in ("finished", "failed") else None
    end = max([*ends, over or begin])
    span = end - begin
    if not entries or span <= 0:
        return [], 0.0, False
    begun = {each.get("attempt"): each.get("started_at") for each in found["attempts"]}
    lanes, restarted = [], False
    for rank in range(min(MAX_LANES, max(entry.world_size for entry in entries))):
        segments, cursor, gap, attempt = [], begin, "starting", None
        for entry in sorted((e for e in entries if e.rank == rank), key=lambda e: (e.generation, e.started_at)):
            if attempt not in (None, entry.attempt):  # between two drivers nobody held the run
                cursor = max(cursor, float(begun.get(entry.attempt) or cursor))
            attempt = entry.attempt
            restarted = restarted or gap == "restarting"
            segments.append(_segment(gap, cursor, entry.started_at, begin, span))
            steps = "no step" if entry.first_step is None else f"steps {entry.first_step}-{entry.last_step}"
            title = f"group {entry.generation}: {steps}"
            segments.append(_segment("compute", entry.started_at, entry.updated_at, begin, span, title))
            cursor, gap = max(cursor, entry.updated_at), "restarting"
        if over:
            segments.append(_segment("stopping", cursor, over, begin, span))
        lanes.append({"name": f"rank {rank}", "segments": [each for each in segments if each["width"] > 0]})
    return lanes, span, restarted


def _segment(bucket: str, start: float, end: float, begin: float, span: float, title: str = "") -> dict[str, Any]:
    left = min(max(100 * (start - begin) / span, 0.0), 100.0)
    width = min(max(100 * (end - begin) / span, 0.0), 100.0) - left
    label = f"{title or bucket}, {figures_text.duration(end - start)}"
    return {"bucket": bucket, "left": left, "width": max(0.0, width), "title": label}


def _spec(store: Store, run: str) -> str:
    """The resolved settings that the run started with, "" where there are none."""
    try:
        return store.get(f"runs/{run}/spec.yaml")[:MAX_SPEC_CHARS].decode("utf-8", "replace")
    except NotFoundError:
        return ""
