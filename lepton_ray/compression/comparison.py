"""The original beside the compressed model on this machine: size, the deciding metric, latency, rows per second."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from lepton_ray.tasks import Predictor

WARM_UP = 5
"""Calls of each model before any is timed."""
FEWEST = 50
"""Timed calls of each model at least, however slow."""
LATENCY_SHARE = 0.5
"""Share of the time that goes to single rows; the rest to whole batches."""


@dataclass(frozen=True)
class Figures:
    """One model."""

    size: int
    """Bytes of `model.safetensors`."""
    metric: float
    """The deciding metric over the held-out rows."""
    p50_ms: float
    """Median time of one row through inputs, model and answer."""
    p99_ms: float
    rows_per_s: float
    """Rows answered per second, in calls of `batch` rows; from the median time of a call."""


@dataclass(frozen=True)
class Comparison:
    """Both models, measured in turns."""

    metric: str
    direction: Literal["max", "min"]
    original: Figures
    compressed: Figures
    rows: int
    """Held-out rows behind the metric."""
    calls: int
    """Timed single-row calls of each model."""
    threads: int
    batch: int
    load: float
    """Processes that wanted a CPU over the last minute, for each CPU; well above 1 the times are not to be trusted."""

    @property
    def drop(self) -> float:
        """Points (hundredths) by which the deciding metric got worse; negative where it got better."""
        change = (self.original.metric - self.compressed.metric) * 100
        return change if self.direction == "max" else -change

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "drop": self.drop}

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows of (figure, original, compressed, ratio or difference)."""
        one, two = self.original, self.compressed
        return [
            ("size on disk", f"{one.size:,} B", f"{two.size:,} B", f"{two.size / one.size:.3f}x"),
            (
                f"{self.metric} ({self.rows} rows)",
                f"{one.metric:.4f}",
                f"{two.metric:.4f}",
                f"{0 - round(self.drop, 2):+.2f} points",
            ),
            ("latency p50", f"{one.p50_ms:.3f} ms", f"{two.p50_ms:.3f} ms", f"{two.p50_ms / one.p50_ms:.3f}x"),
            ("latency p99", f"{one.p99_ms:.3f} ms", f"{two.p99_ms:.3f} ms", f"{two.p99_ms / one.p99_ms:.3f}x"),
            (
                f"rows/s, {self.batch} per call",
                f"{one.rows_per_s:,.0f}",
                f"{two.rows_per_s:,.0f}",
                f"{two.rows_per_s / one.rows_per_s:.3f}x",
            ),
        ]


def compare(
    original: tuple[Predictor, int],
    compressed: tuple[Predictor, int],
    rows: pa.Table,
    *,
    threads: int,
    seconds: float,
    batch: int,
) -> Comparison:
    """Measure two models.

    Speed is taken in turns, one call each, the order changing from pair to pair, so that a machine that gets slower
    or faster meanwhile does so for both.

    Args:
        original: the predictor and the bytes of its weights.
        compressed: the same of the other.
        rows: held-out rows, one at least.
        threads: torch's threads meanwhile.
        seconds: about how long the timing takes.
        batch: rows per call for rows per second.
    """
    metric, direction = original[0].task.decides
    found = [predictor.evaluate(rows)[metric] for predictor, _ in (original, compressed)]
    predictors = (original[0], compressed[0])
    many = rows.take([index % rows.num_rows for index in range(batch)])
    with torch_threads(threads):
        single = _timed(predictors, _each(rows), seconds * LATENCY_SHARE)
        whole = _timed(predictors, _same(many), seconds * (1 - LATENCY_SHARE))
    figures = [
        Figures(
            size=size,
            metric=value,
            p50_ms=float(np.percentile(one, 50)) * 1e3,
            p99_ms=float(np.percentile(one, 99)) * 1e3,
            rows_per_s=batch / float(np.percentile(all_rows, 50)),
        )
        for (_, size), value, one, all_rows in zip((original, compressed), found, single, whole, strict=True)
    ]
    return Comparison(
        metric=metric,
        direction=direction,
        original=figures[0],
        compressed=figures[1],
        rows=rows.num_rows,
        calls=len(single[0]),
        threads=threads,
        batch=batch,
        load=os.getloadavg()[0] / len(os.sched_getaffinity(0)),
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch's CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _each(rows: pa.Table) -> Iterator[pa.Table]:
    """One row after the other, for ever."""
    while True:
        for index in range(rows.num_rows):
            yield rows.slice(index, 1)


def _same(rows: pa.Table) -> Iterator[pa.Table]:
    while True:
        yield rows


def _timed(
    predictors: tuple[Predictor, Predictor], source: Iterator[pa.Table], seconds: float
) -> tuple[list[float], list[float]]:
    """Seconds of each call of each model, in pairs on the same rows."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM_UP):
        rows = next(source)
        for predictor in predictors:
            predictor.answer_rows(rows)
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[0]) < FEWEST:
        rows = next(source)
        first = len(times[0]) % 2
        for which in (first, 1 - first):
            start = time.perf_counter()
            predictors[which].answer_rows(rows, rows.num_rows)
            times[which].append(time.perf_counter() - start)
    return times
