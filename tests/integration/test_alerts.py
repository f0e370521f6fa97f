"""Alerts: each fires on the figures of its fault and is silent on healthy ones, in a real Prometheus' rule engine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus import prometheus_programs

from lepton_ray.monitoring import alerts
from lepton_ray.monitoring.alerts import ALERTS, RECORDINGS, metrics_in, rules_yaml
from lepton_ray.monitoring.incidents import INCIDENT_KINDS

ROOT = Path(__file__).parents[2]
MODEL = 'endpoint="digits",model="digits",version="3"'

HEALTHY: dict[str, str] = {
    'lepton_run_state{run="r",state="running"}': "1x240",
    'lepton_run_state{run="r",state="failed"}': "0x240",
    'lepton_run_updated_timestamp_seconds{run="r"}': "0+30x240",
    'lepton_run_failures{run="r"}': "0x240",
    'lepton_training_step{run="r"}': "0+10x240",
    'lepton_training_steps_total{run="r"}': "0+10x240",
    'lepton_training_nonfinite_steps_total{run="r"}': "0x240",
    'lepton_checkpoint_last_commit_timestamp_seconds{run="r"}': "0+30x240",
    'lepton_checkpoint_interval_seconds{run="r"}': "60x240",
    'lepton_goodput_seconds{run="r",bucket="compute"}': "0+50x240",
    'lepton_goodput_seconds{run="r",bucket="data_wait"}': "0+6x240",
    'lepton_goodput_seconds{run="r",bucket="starting"}': "40x240",
    'lepton_training_phase_seconds_total{run="r",rank="0",phase="forward"}': "0+25x240",
    'lepton_training_phase_seconds_total{run="r",rank="0",phase="data_wait"}': "0+3x240",
    **{f'lepton_incidents_total{{run="r",kind="{kind}"}}': "0x240" for kind in INCIDENT_KINDS},
    f'lepton_serving_requests_total{{{MODEL},code="200"}}': "0+300x240",
    f'lepton_serving_requests_total{{{MODEL},code="422"}}': "0+30x240",
    f'lepton_serving_requests_total{{{MODEL},code="500"}}': "0x240",
    f'lepton_serving_request_seconds_bucket{{{MODEL},le="0.1"}}': "0+330x240",
    f'lepton_serving_request_seconds_bucket{{{MODEL},le="2.5"}}': "0+330x240",
    f'lepton_serving_request_seconds_bucket{{{MODEL},le="+Inf"}}': "0+330x240",
    f"lepton_serving_queue_seconds_sum{{{MODEL}}}": "0+3x240",
    f"lepton_serving_queue_seconds_count{{{MODEL}}}": "0+330x240",
    'lepton_exporter_build_info{version="0.1.0"}': "1x240",
    "lepton_exporter_refreshed_timestamp_seconds": "0+30x240",
    'lepton_exporter_errors_total{cause="storage"}': "0x240",
    'lepton_recorder_errors_total{cause="storage"}': "0x240",
}
"""Two hours of a run and an endpoint with nothing wrong, a sample each 30 s; what is 0 is so from the beginning."""

ONCE = "0x60 1x180"
"""A counter that goes up by one after half an hour."""
STOPPED = "0+30x60 1800x180"
"""A time stamp that stops after half an hour."""


def incident(kind: str) -> dict[str, str]:
    return {f'lepton_incidents_total{{run="r",kind="{kind}"}}': ONCE}


FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "LeptonTrainingHang": (incident("hang"), "31m"),
    "LeptonTrainingStraggler": (incident("straggler"), "31m"),
    "LeptonTrainingDivergence": (incident("divergence"), "31m"),
    "LeptonTrainingOutOfMemory": (incident("out_of_memory"), "31m"),
    "LeptonTrainingStorageAway": (incident("storage"), "31m"),
    "LeptonTrainingStalled": ({'lepton_training_step{run="r"}': "0+10x60 600x180"}, "46m"),
    "LeptonTrainingRestartLoop": ({'lepton_run_failures{run="r"}': "0x60 1x10 2x10 3x160"}, "62m"),
    "LeptonTrainingLossNotFinite": ({'lepton_training_nonfinite_steps_total{run="r"}': "0x60 2x180"}, "31m"),
    "LeptonCheckpointTooOld": ({'lepton_checkpoint_last_commit_timestamp_seconds{run="r"}': STOPPED}, "43m"),
    "LeptonGoodputLow": (
        {'lepton_goodput_seconds{run="r",bucket="compute"}': "0+50x60 3000x180",
         'lepton_goodput_seconds{run="r",bucket="restarting"}': "0x60 0+50x180"},
        "85m",
    ),
    "LeptonDataStarved": (
        {'lepton_training_phase_seconds_total{run="r",rank="0",phase="data_wait"}': "0+3x60 180+15x180"}, "50m",
    ),
    "LeptonRunSilent": ({'lepton_run_updated_timestamp_seconds{run="r"}': STOPPED}, "36m"),
    "LeptonRunFailed": (
        {'lepton_run_state{run="r",state="running"}': "1x60 0x180",
         'lepton_run_state{run="r",state="failed"}': "0x60 1x180",
         'lepton_run_updated_timestamp_seconds{run="r"}': STOPPED},
        "32m",
    ),
    "LeptonServingErrors": ({f'lepton_serving_requests_total{{{MODEL},code="500"}}': "0x60 0+10x180"}, "37m"),
    "LeptonServingOverloaded": ({f"lepton_serving_queue_seconds_sum{{{MODEL}}}": "0+3x60 180+330x180"}, "38m"),
    "LeptonServingSlow": (
        {f'lepton_serving_request_seconds_bucket{{{MODEL},le="0.1"}}': "0+330x60 19800+300x180"}, "42m",
    ),
    "LeptonExporterDown": ({'lepton_exporter_build_info{version="0.1.0"}': "1x60 _x180"}, "42m"),
    "LeptonExporterStale": ({"lepton_exporter_refreshed_timestamp_seconds": STOPPED}, "35m"),
    "LeptonExporterSkipsSources": ({'lepton_exporter_errors_total{cause="storage"}': "0x60 0+1x180"}, "50m"),
    "LeptonRecorderDropsFigures": ({'lepton_recorder_errors_total{cause="storage"}': "0x60 0+1x180"}, "50m"),
}  # fmt: skip
"""Alert -> what is other than healthy after half an hour, and the minute by which it must have fired."""


def case(name: str, series: dict[str, str], checks: list[tuple[str, str, int]]) -> dict[str, Any]:
    """One test of promtool: counts of alerts that fire, at minutes."""
    return {
        "name": name, "interval": "30s",
        "input_series": [{"series": series_, "values": values} for series_, values in series.items()],
        "promql_expr_test": [
            {"expr": expression, "eval_time": at,
             "exp_samples": [{"labels": "{}", "value": count}] if count else []}
            for expression, at, count in checks
        ],
    }  # fmt: skip


def firing(name: str) -> str:
    return f'count(ALERTS{{alertname="{name}",alertstate="firing"}})'


@pytest.fixture(scope="module")
def promtool() -> str:
    return prometheus_programs()[1]


def run(promtool: str, *arguments: str) -> str:
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_each_alert_fires_on_its_fault_and_none_without_one(promtool: str, tmp_path: Path) -> None:
    """Before the fault it is silent, too; no other alert of the same severity or a higher one is needed to see it."""
    assert FAULTS.keys() == ALERTS.keys()
    (tmp_path / "rules.yaml").write_text(rules_yaml())
    minutes = ("5m", "31m", "50m", "85m", "119m")
    tests = [case("healthy", HEALTHY, [('count(ALERTS{alertstate="firing"})', at, 0) for at in minutes])]
    for name, (changed, by) in FAULTS.items():
        tests.append(case(name, {**HEALTHY, **changed}, [(firing(name), "29m", 0), (firing(name), by, 1)]))
    told = {"rule_files": ["rules.yaml"], "evaluation_interval": "30s", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    assert "SUCCESS" in run(promtool, "test", "rules", str(tmp_path / "tests.yaml"))


def test_a_finished_run_fires_nothing(promtool: str, tmp_path: Path) -> None:
    """Its time stamps and its step stand still for ever."""
    (tmp_path / "rules.yaml").write_text(rules_yaml())
    ended = {
        'lepton_run_state{run="r",state="running"}': "1x60 0x180",
        'lepton_run_state{run="r",state="finished"}': "0x60 1x180",
        'lepton_run_updated_timestamp_seconds{run="r"}': STOPPED, 'lepton_training_step{run="r"}': "0+10x60 600x180",
        'lepton_checkpoint_last_commit_timestamp_seconds{run="r"}': STOPPED,
        'lepton_goodput_seconds{run="r",bucket="compute"}': "0+50x60 3000x180",
        'lepton_training_steps_total{run="r"}': "0+10x60 600x180",
    }  # fmt: skip
    checks = [('count(ALERTS{alertstate="firing"})', at, 0) for at in ("40m", "60m", "119m")]
    told = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "30s",
        "tests": [case("ended", {**HEALTHY, **ended}, checks)],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    run(promtool, "test", "rules", str(tmp_path / "tests.yaml"))


def test_the_shipped_files_are_the_rules(promtool: str) -> None:
    """The chart's rules and the page of runbooks; every rule is one that Prometheus takes and lints."""
    shipped = ROOT / "helm" / "lepton-ray" / "files" / "rules.yaml"
    assert shipped.read_text(encoding="utf-8") == rules_yaml()
    assert (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8") == alerts.page()
    assert "SUCCESS" in run(promtool, "check", "rules", str(shipped))


def test_rules_read_nothing_but_the_catalogue() -> None:
    read = set().union(*(metrics_in(rule.expression) for rule in (*RECORDINGS, *ALERTS.values())))
    assert "lepton_training_step" in read
    with pytest.raises(ValueError, match="lepton_training_stepz"):
        metrics_in("rate(lepton_training_stepz[5m])")
