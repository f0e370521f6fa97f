"""Snapshots of recorders, checked and joined: many processes in, one set of samples out. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lepton_ray.monitoring.catalogue import LABELS, MAX_LABEL_LENGTH, METRICS, OTHER, Metric
from lepton_ray.monitoring.recorder import MAX_CELLS, SNAPSHOT_VERSION

Labels = tuple[str, ...]
"""Label values in the order of `Metric.labels`."""


@dataclass(frozen=True)
class Distribution:
    """A histogram: observations per upper bound (not cumulative, the last bound is infinite) and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    def plus(self, other: Distribution) -> Distribution:
        """Both together. ValueError where the bounds differ."""
        if self.bounds != other.bounds:
            raise ValueError("histograms with different buckets cannot be added")
        counts = tuple(mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.total + other.total)


Samples = dict[tuple[str, Labels], float | Distribution]
"""(metric, label values) -> value."""


@dataclass(frozen=True)
class Snapshot:
    """What one process had recorded at `written_at` (unix seconds); `dropped` names causes of what was left out."""

    written_at: float
    samples: Samples
    dropped: tuple[str, ...] = ()


def parse_snapshot(value: Any, owner: Mapping[str, str]) -> Snapshot:
    """The snapshot in a JSON value; families that the catalogue does not know in this form are left out.

    `owner` are the labels that follow from where the snapshot lies, such as its run: what it says itself about those
    is not believed. ValueError for anything that is not a snapshot of this version.
    """
    if not isinstance(value, Mapping) or value.get("version") != SNAPSHOT_VERSION:
        raise ValueError(f"not a snapshot of version {SNAPSHOT_VERSION}")
    base, families = value.get("labels"), value.get("families")
    if not isinstance(base, Mapping) or not isinstance(families, list):
        raise ValueError("labels or families are missing")  # noqa: TRY004 - one error class for all damage
    written_at = _number(value.get("written_at"))
    if not 0.0 <= written_at < 1e12:
        raise ValueError("written_at: expected unix seconds")
    base = {**base, **owner}
    samples: Samples = {}
    dropped: list[str] = []
    for family in families:
        metric = METRICS.get(str(family.get("name"))) if isinstance(family, Mapping) else None
        if metric is None or family.get("kind") != metric.kind or not isinstance(family.get("samples"), list):
            dropped.append("unknown_metric")
            continue
        for sample in family["samples"]:
            if len(samples) > MAX_CELLS:
                raise ValueError(f"more than {MAX_CELLS} samples")
            try:
                labels = _labels(metric, {**sample["labels"], **base})
                samples[metric.name, labels] = _value(metric, sample)
            except (ValueError, TypeError, KeyError, AttributeError):
                dropped.append("value")
    return Snapshot(written_at, samples, tuple(dropped))


def _labels(metric: Metric, given: Mapping[str, Any]) -> Labels:
    values = []
    for name in metric.labels:
        text = str(given[name])[:MAX_LABEL_LENGTH]
        allowed = LABELS[name].values
        values.append(OTHER if allowed and text not in allowed else text)
    return tuple(values)


def _value(metric: Metric, sample: Mapping[str, Any]) -> float | Distribution:
    if metric.kind != "histogram":
        value = _number(sample["value"])
        if metric.kind == "counter" and not 0.0 <= value < math.inf:
            raise ValueError("a counter is finite and not negative")
        return value
    bounds = tuple(_number(bound) for bound, _ in sample["buckets"])
    counts = tuple(count for _, count in sample["buckets"])
    total = _number(sample["sum"])
    if bounds != (*metric.buckets, math.inf):
        raise ValueError("other buckets than the catalogue's")
    if not all(isinstance(count, int) and count >= 0 for count in counts) or not 0.0 <= total < math.inf:
        raise ValueError("counts and sum are not negative")
    return Distribution(bounds, counts, total)


def _number(value: Any) -> float:
    """A float from JSON, where NaN and the infinities are strings. ValueError, TypeError otherwise."""
    if isinstance(value, bool) or (isinstance(value, str) and value not in ("NaN", "+Inf", "-Inf")):
        raise ValueError("expected a number")
    return float(value)


class Joined:
    """The samples of many snapshots as one, by metric and labels; label values beyond a bound are `other`."""

    def __init__(self) -> None:
        self.samples: Samples = {}
        self._written: dict[tuple[str, Labels], float] = {}
        self._seen: dict[tuple[str, str], set[str]] = {}

    def add(self, snapshot: Snapshot, *, live: bool) -> None:
        """Join a snapshot; gauges that live and die with their process count only where `live`."""
        for (name, labels), value in snapshot.samples.items():
            metric = METRICS[name]
            if metric.kind == "gauge" and metric.merge == "live" and not live:
                continue
            key = (name, self._bounded(metric, labels))
            before = self.samples.get(key)
            if isinstance(value, Distribution):
                self.samples[key] = before.plus(value) if isinstance(before, Distribution) else value
            elif metric.kind == "counter" or metric.merge == "live":
                self.samples[key] = value + (before if isinstance(before, float) else 0.0)
            elif snapshot.written_at >= self._written.get(key, 0.0):
                self.samples[key] = value
                self._written[key] = snapshot.written_at

    @property
    def series(self) -> int:
        """How many series a scrape makes of the samples: a histogram has one per bucket, its sum and its count."""
        return sum(len(value.bounds) + 2 if isinstance(value, Distribution) else 1 for value in self.samples.values())

    def put(self, metric: str, value: float, *labels: str) -> None:
        """Set a sample that is not from a snapshot."""
        self.samples[metric, tuple(label[:MAX_LABEL_LENGTH] for label in labels)] = float(value)

    def _bounded(self, metric: Metric, labels: Labels) -> Labels:
        values = []
        for name, value in zip(metric.labels, labels, strict=True):
            seen = self._seen.setdefault((metric.name, name), set())
            if value not in seen and len(seen) >= LABELS[name].bound:
                values.append(OTHER)
            else:
                seen.add(value)
                values.append(value)
        return tuple(values)
