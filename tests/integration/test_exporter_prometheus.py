"""A real Prometheus scrapes the exporter, and its answers are the figures that were recorded."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus import Prometheus, prometheus_programs
from run_folder import BuiltRun, build_run

from lepton_ray.monitoring.http_server import ExporterServer
from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.monitoring.runs import read_record, run_goodput
from lepton_ray.storage import Store, open_store

LIVE = "runs/live-run"


class Watched:
    """A store with a finished run and an endpoint, its two exporters (one asks for a token) and their Prometheus."""

    def __init__(self, store: Store, built: BuiltRun, exporter: ExporterServer, prometheus: Prometheus) -> None:
        self.store, self.built, self.exporter, self.prometheus = store, built, exporter, prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder: Path = tmp_path_factory.mktemp("prometheus")
    token = folder / "token"
    token.write_text("correct-horse-battery")
    token.chmod(0o400)
    store = open_store((folder / "store").as_uri())
    built = build_run(store)
    endpoint = {"endpoint": "digits", "model": "digits", "version": "3"}
    replica = Recorder(store.uri, "endpoints/digits/metrics/a.json", endpoint)
    for number in range(200):
        replica.count("lepton_serving_requests_total", code="200" if number % 20 else "422")
        replica.observe("lepton_serving_request_seconds", 0.0015 if number % 10 else 0.04)
    replica.flush()
    exporter = ExporterServer(store, every_s=0.2).start()
    locked = ExporterServer(store, every_s=0.2, token_file=token).start()
    targets = {"open": exporter.url.removeprefix("http://"), "locked": locked.url.removeprefix("http://")}
    try:
        assert exporter.exporter.ready.wait(20)
        assert locked.exporter.ready.wait(20)
        with Prometheus(folder, targets, {"locked": token}) as prometheus:
            prometheus.wait_for("count(up == 1)", 2)
            prometheus.wait_for('count(lepton_exporter_build_info{job="open"})', 1)
            yield Watched(store, built, exporter, prometheus)
    finally:
        exporter.close()
        locked.close()


def test_targets_are_up(watched):
    """Both targets, one of them with a bearer token, are scraped within Prometheus' limits."""
    assert watched.prometheus.targets() == {"open": ("up", ""), "locked": ("up", "")}


def test_answers_equal_recorded_figures(watched):
    query, built = watched.prometheus.query, watched.built
    mine = f'job="open",run="{built.run}"'
    assert list(query(f"lepton_training_steps_total{{{mine}}}").values()) == [built.steps["steps"]]
    assert list(query(f"lepton_training_samples_total{{{mine}}}").values()) == [built.steps["rows"]]
    assert list(query(f"lepton_training_step_seconds_count{{{mine}}}").values()) == [built.steps["steps"]] * 2
    assert query(f"lepton_run_state{{{mine}}} == 1") == {(("run", built.run), ("state", "finished")): 1.0}
    (median,) = query(f"histogram_quantile(0.5, sum by (le) (lepton_training_step_seconds_bucket{{{mine}}}))").values()
    assert 0.025 < median < 0.05
    accuracy = query(f'lepton_training_evaluation{{{mine},metric="accuracy"}}')
    assert list(accuracy.values()) == [built.record["metrics"]["accuracy"]]


def test_goodput_buckets_add_up_in_prometheus(watched):
    run = watched.built.run
    ledger = run_goodput(watched.store, run, read_record(watched.store, run))
    buckets = watched.prometheus.query(f'lepton_goodput_seconds{{job="open",run="{run}"}}')
    assert {dict(labels)["bucket"]: value for labels, value in buckets.items()} == pytest.approx(ledger.buckets)
    (total,) = watched.prometheus.query(f'sum(lepton_goodput_seconds{{job="open",run="{run}"}})').values()
    assert total == pytest.approx(ledger.wall * ledger.workers)


def test_request_latency_is_answered(watched):
    labels = 'job="open",endpoint="digits"'
    (rate,) = watched.prometheus.query(
        f'sum(lepton_serving_requests_total{{{labels},code="422"}}) / sum(lepton_serving_requests_total{{{labels}}})'
    ).values()
    assert rate == pytest.approx(0.05)
    quantile = "histogram_quantile({q}, sum by (le) (lepton_serving_request_seconds_bucket{{{labels}}}))"
    (p50,) = watched.prometheus.query(quantile.format(q=0.5, labels=labels)).values()
    (p99,) = watched.prometheus.query(quantile.format(q=0.99, labels=labels)).values()
    assert 0.001 < p50 < 0.002
    assert 0.03 < p99 < 0.05


def test_counters_do_not_fall_at_restart(watched):
    """A new worker group counts from 0 in its own snapshot; Prometheus sees no reset."""
    build_run(watched.store, "live-run", epochs=1, steps_per_epoch=20, state="running", lost_at=None)
    query, expression = watched.prometheus, 'lepton_training_steps_total{job="open",run="live-run"}'
    before = 20 * 2 // 3
    query.wait_for(expression, before)
    second = Recorder(watched.store.uri, f"{LIVE}/metrics/g2-rank0.json", {"run": "live-run", "rank": "0"})
    for done in (1, 2, 3):
        second.step(done, 0.03, 32)
        second.flush()
        query.wait_for(expression, before + done)
    assert list(query.query(f"resets({expression}[5m])").values()) == [0.0]


def test_text_has_no_promtool_finding(watched):
    """`promtool check metrics` has nothing to say about names, types, units and help."""
    _, promtool = prometheus_programs()
    text = httpx.get(f"{watched.exporter.url}/metrics", timeout=10).content
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=60, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
