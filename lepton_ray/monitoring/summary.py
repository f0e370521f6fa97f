"""What there is to say about a run, from its folder: for `lepton-ray runs`, and for the report."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lepton_ray.errors import IntegrityError, NotFoundError
from lepton_ray.monitoring.goodput import goodput
from lepton_ray.monitoring.history import read_history
from lepton_ray.monitoring.incidents import summarised
from lepton_ray.monitoring.ledger import RankEntry
from lepton_ray.monitoring.runs import driver_alive_at, read_entries, read_json, read_record
from lepton_ray.storage import Store

_CHECKPOINT = re.compile(r"step-(\d{1,18})")
_VERSION = re.compile(r"([a-z0-9][-a-z0-9]{0,62}):(\d{1,9})")
MAX_CHECKPOINTS = 20
"""Newest checkpoints that are looked at."""


def brief(store: Store, run: str, now: float | None = None) -> dict[str, Any]:
    """One line about a run: its record and goodput, without its history. Raises as `read_record` does."""
    record = read_record(store, run)
    entries, _ = read_entries(store, run)
    found = goodput(record, entries, now, driver_alive_at(store, run, record))
    step = max((entry.last_step or 0 for entry in entries), default=record.get("step") or 0)
    return {
        "run": run,
        "state": record.get("state"),
        "step": step,
        "total_steps": record.get("total_steps"),
        "metrics": record.get("metrics") or {},
        "goodput": found.ratio,
        "wall_seconds": found.wall,
        "workers": found.workers,
        "failures": record.get("failures") or 0,
        "model_version": record.get("model_version"),
        "created_at": record.get("created_at"),
        "updated_at": record.get("updated_at"),
    }


def summary(store: Store, run: str, now: float | None = None) -> dict[str, Any]:
    """Everything about a run that fits a page, JSON-able; what is missing in the folder is None or empty.

    Args:
        store: where the run is.
        run: its name.
        now: unix seconds, for a run that still runs.

    Raises NotFoundError for an unknown run, IntegrityError for a damaged record.
    """
    record = read_record(store, run)
    entries, skipped = read_entries(store, run)
    found = goodput(record, entries, now, driver_alive_at(store, run, record))
    history = read_history(store, run)
    card = _card(store, record.get("model_version"))
    return {
        "run": run,
        "state": record.get("state"),
        "error": record.get("error"),
        "task": _name(record.get("task")),
        "created_at": record.get("created_at"),
        "finished_at": record.get("finished_at"),
        "updated_at": record.get("updated_at"),
        "step": max((entry.last_step or 0 for entry in entries), default=record.get("step") or 0),
        "total_steps": record.get("total_steps"),
        "metrics": record.get("metrics") or {},
        "model_version": record.get("model_version"),
        "samples_per_second": _median(history.get("samples_per_second", ())),
        "step_seconds": _median(
            sum(parts)
            for parts in zip(
                *(history.get(p, ()) for p in ("data_wait", "forward", "backward", "optimizer")), strict=True
            )
        ),
        "goodput": replace(found, skipped=found.skipped + skipped).to_dict(),
        "attempts": record.get("attempts") or [],
        "generations": _generations(entries),
        "failures": record.get("failures") or 0,
        "incidents": summarised(store, run),
        "checkpoints": _checkpoints(store, run),
        "data": {
            "table": record.get("table"),
            "version": record.get("table_version"),
            "fingerprint": record.get("table_fingerprint"),
            "rows": record.get("rows") or {},
            "samples_exact": record.get("samples_exact"),
        },
        "lineage": card.get("lineage") or {},
        "environment": record.get("environment") or card.get("framework") or {},
    }


def _name(value: Any) -> str | None:
    return value.get("name") if isinstance(value, dict) else value


def _median(values: Iterable[float]) -> float | None:
    known = [value for value in values if value == value]  # noqa: PLR0124 - a NaN is not equal to itself
    return statistics.median(known) if known else None


def _generations(entries: list[RankEntry]) -> list[dict[str, Any]]:
    """One row per worker group, joined over its ranks."""
    rows = []
    for number in sorted({entry.generation for entry in entries}):
        ranks = [entry for entry in entries if entry.generation == number]
        first = [entry.first_step for entry in ranks if entry.first_step is not None]
        rows.append(
            {
                "generation": number,
                "attempt": ranks[0].attempt,
                "ranks": len(ranks),
                "started_at": min(entry.started_at for entry in ranks),
                "updated_at": max(entry.updated_at for entry in ranks),
                "first_step": min(first, default=None),
                "last_step": max((entry.last_step or 0 for entry in ranks), default=0) or None,
                "replayed_steps": max(entry.replayed_steps for entry in ranks),
                "finished": all(entry.finished for entry in ranks),
            }
        )
    return rows


def _checkpoints(store: Store, run: str) -> list[dict[str, Any]]:
    """The newest committed checkpoints, newest first."""
    folder = f"runs/{run}/checkpoints"
    steps = [(int(match.group(1)), name) for name in store.list_names(folder) if (match := _CHECKPOINT.fullmatch(name))]
    found = []
    for step, name in sorted(steps, reverse=True)[:MAX_CHECKPOINTS]:
        try:
            manifest = read_json(store, f"{folder}/{name}/manifest.json")
            files = manifest.get("files")
            sizes = [file["size"] for file in files.values()] if isinstance(files, dict) else []
            size = sum(size for size in sizes if isinstance(size, int))
        except (NotFoundError, IntegrityError, KeyError, TypeError):
            continue  # without a readable manifest there is no checkpoint
        found.append({"step": step, "created_at": manifest.get("created_at"), "bytes": size, "files": len(sizes)})
    return found


def _card(store: Store, version: Any) -> dict[str, Any]:
    """The card of the model version that the run published, `{}` where there is none."""
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        return {}
    try:
        return read_json(store, f"models/{match.group(1)}/versions/{match.group(2)}/model.json")
    except (NotFoundError, IntegrityError):
        return {}
