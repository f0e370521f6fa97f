"""The history of a run: losses, throughput and step-time parts over its steps, and its evaluations.

Rank 0 writes one Parquet file per generation; reading joins them. Where a generation went over steps again, the
newest generation's row counts.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.errors import IntegrityError, LeptonError, NotFoundError
from lepton_ray.monitoring.runs import MAX_JSON_BYTES
from lepton_ray.storage import Store

COLUMNS = (
    "time",
    "loss",
    "learning_rate",
    "gradient_norm",
    "samples_per_second",
    "data_wait",
    "forward",
    "backward",
    "collective",
    "optimizer",
    "checkpoint",
    "logging",
)
"""Of a row per interval of steps, beside `step` and `epoch`: `time` in unix seconds, `samples_per_second` over all
ranks, the step-time parts in seconds per step; each a mean over the interval. `collective` is a share of `backward`."""

MAX_HISTORY_BYTES = 256 * 2**20
MAX_ROWS = 10_000_000
_HISTORY = re.compile(r"history-g(\d{1,9})\.parquet")
_EVALUATIONS = re.compile(r"evaluations-g(\d{1,9})\.json")


def read_history(store: Store, run: str) -> dict[str, list[float]]:
    """Columns of the whole run's history, ordered by step; NaN where a value is absent, `{}` without any history.

    Files that are damaged or too long are left out.
    """
    merged: dict[int, dict[str, Any]] = {}
    for _, key in sorted(_generations(store, run, _HISTORY)):
        rows = _rows(store, key)
        if rows:
            first = min(row["step"] for row in rows)
            merged = {step: row for step, row in merged.items() if step < first}
            merged.update((row["step"], row) for row in rows)
    ordered = [merged[step] for step in sorted(merged)]
    if not ordered:
        return {}
    return {name: [_number(row.get(name)) for row in ordered] for name in ("step", "epoch", *COLUMNS)}


def read_evaluations(store: Store, run: str) -> list[dict[str, Any]]:
    """The evaluations of a run by step, `{"step", "epoch", "time", "metrics": {name: number}}`; newest of each step."""
    found: dict[int, dict[str, Any]] = {}
    for _, key in sorted(_generations(store, run, _EVALUATIONS)):
        try:
            data = store.get(key)
            listed = json.loads(data) if len(data) <= MAX_JSON_BYTES else []
        except (ValueError, RecursionError, NotFoundError):
            continue
        for each in listed if isinstance(listed, list) else []:
            if (
                isinstance(each, Mapping)
                and isinstance(each.get("step"), int)
                and isinstance(each.get("metrics"), dict)
            ):
                metrics = {str(name): _number(value) for name, value in each["metrics"].items()}
                finite = {name: value for name, value in metrics.items() if not math.isnan(value)}
                found[each["step"]] = {**each, "metrics": finite}
    return [found[step] for step in sorted(found)]


def _generations(store: Store, run: str, pattern: re.Pattern[str]) -> list[tuple[int, str]]:
    """(generation, key) of the files of a run's metrics folder that match."""
    folder = f"runs/{run}/metrics"
    found = []
    for entry in store.list(folder):
        match = pattern.fullmatch(entry.key.removeprefix(f"{folder}/"))
        if match and entry.size <= MAX_HISTORY_BYTES:
            found.append((int(match.group(1)), entry.key))
    return found


def _rows(store: Store, key: str) -> list[dict[str, Any]]:
    """The rows of one file that have a step; only known columns, and only where they are plain numbers."""
    try:
        file = pq.ParquetFile(io.BytesIO(store.get(key)))
        schema = file.schema_arrow
        plain = [field.name for field in schema if field.type in (pa.int64(), pa.float64())]
        names = [name for name in ("step", "epoch", *COLUMNS) if name in plain]
        if "step" not in names or schema.field("step").type != pa.int64() or file.metadata.num_rows > MAX_ROWS:
            return []
        rows: list[dict[str, Any]] = file.read(columns=names).to_pylist()
    except (pa.ArrowException, OSError, ValueError, IntegrityError, LeptonError):
        return []
    return [row for row in rows if isinstance(row["step"], int)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
