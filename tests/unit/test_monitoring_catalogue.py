"""The catalogue: one declaration per metric, and everything else agrees with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lepton_ray.monitoring.catalogue import LABELS, METRICS, markdown
from lepton_ray.monitoring.goodput import BUCKETS
from lepton_ray.monitoring.ledger import COMPUTE_PHASES, PHASES

ROOT = Path(__file__).parents[2]


def test_docs_equal_the_catalogue():
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert page == markdown(), "run: python -m lepton_ray.monitoring.catalogue > docs/metrics.md"


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metric_follows_naming_rules(metric):
    """Prefix, base units, `_total` on counters only, buckets on histograms only, declared labels, a help sentence."""
    assert re.fullmatch(r"lepton_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert all(label in LABELS for label in metric.labels)
    assert metric.help[0].isupper() or metric.help[0].isdigit()
    assert metric.help.endswith(".")
    assert not re.search(r"_(ms|millis|milliseconds|minutes|kb|mb|percent)(_|$)", metric.name)


def test_phases_and_buckets_match_the_ledger():
    """Labels hold the ledger's phases in its order; each phase has one bucket, the compute phases a common one."""
    assert LABELS["phase"].values == PHASES
    assert LABELS["bucket"].values == tuple(BUCKETS)
    assert [phase for phase in PHASES if phase in COMPUTE_PHASES] == list(COMPUTE_PHASES)
    assert set(PHASES) - set(COMPUTE_PHASES) | {"compute", "restarting", "unreported"} == set(BUCKETS)


def test_code_uses_declared_metrics_only():
    """A metric name anywhere in the package is one of the catalogue's, or a series of one of its histograms."""
    series = {f"{name}_{part}" for name in METRICS for part in ("sum", "count", "bucket") if METRICS[name].buckets}
    used = set()
    for path in (ROOT / "lepton_ray").rglob("*.py"):
        used |= set(re.findall(r'"(lepton_(?:training|checkpoint|process|run|goodput|serving)_\w+)"', path.read_text()))
    assert used
    assert used - METRICS.keys() - series == set()
