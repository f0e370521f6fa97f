"""Alert and recording rules for Prometheus, declared once, each alert with what it means and what to do.

`python -m lepton_ray.monitoring.alerts rules` prints what the chart ships (`helm/lepton-ray/files/rules.yaml`), and
`... page` prints `docs/alerts.md`; a test holds both equal to this file. Rules rest on what the exporter serves, so a
rule that names a metric which is not in the catalogue fails a test too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from lepton_ray.monitoring.catalogue import METRICS

RUNNING = 'on (run) (lepton_run_state{state="running"} == 1)'
"""Restricts a vector with the label `run` to runs that are under way."""
SERIES = re.compile(r"lepton_[a-z0-9_]+")
_SUFFIXES = ("_bucket", "_count", "_sum")


@dataclass(frozen=True)
class Recording:
    """A figure that several rules and dashboards use, computed once."""

    name: str
    """As Prometheus' own guide has it: level, metric, operation."""
    expression: str
    help: str


@dataclass(frozen=True)
class Alert:
    """One alert."""

    name: str
    expression: str
    hold: str
    """How long it must be true."""
    severity: Literal["critical", "warning", "info"]
    """`critical`: somebody should look now. `warning`: today. `info`: nothing is lost yet."""
    summary: str
    """One line; `{{ $labels.run }}` and the like are filled in by Prometheus."""
    meaning: str
    """What has been seen, for the runbook."""
    action: str
    """What to do, for the runbook."""


def _incident(
    name: str, kind: str, severity: Literal["critical", "warning"], summary: str, meaning: str, action: str
) -> Alert:
    """An alert on an incident that a run reported within the last quarter of an hour."""
    expression = f'increase(lepton_incidents_total{{kind="{kind}"}}[15m]) > 0'
    return Alert(name, expression, "0s", severity, summary, meaning, action)


RECORDINGS = (
    Recording(
        "run:lepton_goodput:ratio30m",
        'sum by (run) (clamp_min(delta(lepton_goodput_seconds{bucket="compute"}[30m]), 0))'
        " / (sum by (run) (clamp_min(delta(lepton_goodput_seconds[30m]), 0)) > 0)",
        "share of the worker-seconds of the last half hour that was compute",
    ),
    Recording(
        "run_phase:lepton_training_phase_seconds:share5m",
        "sum by (run, phase) (rate(lepton_training_phase_seconds_total[5m]))"
        " / on (run) group_left () (sum by (run) (rate(lepton_training_phase_seconds_total[5m])) > 0)",
        "share of the ranks' time by what they were doing",
    ),
    Recording(
        "run:lepton_training_steps:rate5m", "rate(lepton_training_steps_total[5m])", "optimizer steps per second"
    ),
    Recording(
        "endpoint:lepton_serving_requests:rate5m",
        "sum by (endpoint, model, version) (rate(lepton_serving_requests_total[5m]))",
        "requests per second",
    ),
    Recording(
        "endpoint:lepton_serving_errors:ratio5m",
        'sum by (endpoint, model, version) (rate(lepton_serving_requests_total{code=~"5.."}[5m]))'
        " / (sum by (endpoint, model, version) (rate(lepton_serving_requests_total[5m])) > 0)",
        "share of the requests that were answered with a server error",
    ),
    Recording(
        "endpoint:lepton_serving_request_seconds:p99_5m",
        "histogram_quantile(0.99, sum by (endpoint, model, version, le) "
        "(rate(lepton_serving_request_seconds_bucket[5m])))",
        "time within which 99 of 100 requests were answered",
    ),
)

TRAINING = (
    _incident(
        "LeptonTrainingHang", "hang", "warning",
        "Run {{ $labels.run }}: a rank hung and was replaced.",
        "The watchdog saw no progress for ten times the usual step (ten seconds at least). It named the rank that did "
        "not arrive, kept the stacks of all ranks, and had that rank replaced; the run goes on.",
        "`lepton-ray runs show RUN` has the incident with the rank, its node and the stacks. Once is bad luck. The "
        "same "
        "node again is a node to take out of the pool; the same line of the stacks again is a bug in the training code "
        "or a storage call without a deadline.",
    ),
    _incident(
        "LeptonTrainingStraggler", "straggler", "warning",
        "Run {{ $labels.run }}: one rank is slower than the others in its own compute.",
        "A rank has been slower in its own work, waiting left out, for twenty steps in a row; the others wait for it "
        "in "
        "each collective, so the run goes at its pace.",
        "The incident names the rank and its node and by how much it is slower. Look for another job on that node, a "
        "CPU quota, a GPU that throttles; move the pod.",
    ),
    _incident(
        "LeptonTrainingDivergence", "divergence", "critical",
        "Run {{ $labels.run }}: the ranks' weights differ.",
        "The digests of the weights differ between ranks, which DDP rules out: a bit flipped, or a rank computes "
        "wrongly. The run has gone back to the newest checkpoint that all ranks agreed on.",
        "The incident names the rank. Take its node out and test its memory (ECC counters, `dmesg`), then its GPU.",
    ),
    _incident(
        "LeptonTrainingOutOfMemory", "out_of_memory", "warning",
        "Run {{ $labels.run }}: a rank ran out of memory.",
        "The kernel, Ray or the allocator ended a rank for its memory. It is tried once more; a second time ends the "
        "run.",
        "Lower `training.global_batch` or give the pods more memory. With `training.optimizer.accumulate` the global "
        "batch stays the same with smaller pieces.",
    ),
    _incident(
        "LeptonTrainingStorageAway", "storage", "critical",
        "Run {{ $labels.run }}: storage is away; it waits.",
        "Checkpoints or the run's record could not be written. The run goes on from memory as long as it can, and "
        "waits "
        "for an hour at most where it needs storage.",
        "Look at the store named in LEPTON_STORE: credentials, quota, endpoint. Nothing needs to be restarted.",
    ),
    Alert(
        "LeptonTrainingStalled",
        f"(changes(lepton_training_step[15m]) == 0 and lepton_training_step offset 15m >= 0) and {RUNNING}",
        "0s", "critical",
        "Run {{ $labels.run }} has done no step for 15 minutes.",
        "The run counts as running, and its step has not changed. It may wait for room on the cluster, load data, or "
        "be "
        "in a step that takes so long.",
        "`lepton-ray runs show RUN`, then the pods: are there as many as the run asks for? A pod that is Pending names "
        "what it waits for in its events.",
    ),
    Alert(
        "LeptonTrainingRestartLoop",
        f"delta(lepton_run_failures[1h]) >= 3 and {RUNNING}", "0s", "critical",
        "Run {{ $labels.run }} failed three times or more within an hour.",
        "Its worker group was lost again and again. What it has done is safe; what it costs is in the goodput bucket "
        "`restarting`.",
        "The incidents of `lepton-ray runs show RUN` say why each time. Preemptions do not count here.",
    ),
    Alert(
        "LeptonTrainingLossNotFinite",
        "increase(lepton_training_nonfinite_steps_total[5m]) > 0", "0s", "warning",
        "Run {{ $labels.run }}: loss or gradients were not finite; the steps were skipped.",
        "All ranks skip such a step together; after three in a row the run goes back to its last good checkpoint and "
        "leaves those batches out.",
        "A lower learning rate, a longer warm-up, clipping (`training.optimizer.clip_norm`), or bf16 in the place of "
        "fp16. Look at the rows of the steps that were skipped.",
    ),
    Alert(
        "LeptonCheckpointTooOld",
        "(time() - lepton_checkpoint_last_commit_timestamp_seconds"
        f" > clamp_min(3 * lepton_checkpoint_interval_seconds, 600)) and {RUNNING}",
        "2m", "critical",
        "Run {{ $labels.run }}: the newest checkpoint is {{ $value | humanizeDuration }} old.",
        "Three times the interval between two checkpoints has passed, and ten minutes at least. Losing all nodes now "
        "would cost everything since.",
        "Storage that is slow or away, or a run that hangs: look at the other alerts. `lepton_checkpoint_seconds` "
        "shows "
        "how long commits take.",
    ),
    Alert(
        "LeptonGoodputLow",
        f"run:lepton_goodput:ratio30m < 0.5 and {RUNNING}", "15m", "warning",
        "Run {{ $labels.run }}: {{ $value | humanizePercentage }} of its worker-seconds are compute.",
        "Over the last half hour less than half of the workers' time moved the model forward.",
        "`lepton-ray runs show RUN` has the buckets: `data_wait` wants faster feeding, `restarting` and `replayed` a "
        "look at the failures, `checkpoint` a longer interval, `starting` a warm image.",
    ),
    Alert(
        "LeptonDataStarved",
        f'run_phase:lepton_training_phase_seconds:share5m{{phase="data_wait"}} > 0.2 and {RUNNING}', "10m", "warning",
        "Run {{ $labels.run }}: ranks wait for data {{ $value | humanizePercentage }} of their time.",
        "The model is faster than its rows come.",
        "Give the pods more CPUs, make augmentation cheaper, or decode once into the table.",
    ),
    Alert(
        "LeptonRunSilent",
        f"time() - lepton_run_updated_timestamp_seconds > 300 and {RUNNING}", "0s", "critical",
        "Run {{ $labels.run }} has given no sign of life for {{ $value | humanizeDuration }}.",
        "Its driver, the Ray head or the whole cluster is gone, or storage is.",
        "With `lepton-ray orchestrate` it goes on by itself. Otherwise submit it again under the same name: it "
        "resumes.",
    ),
    Alert(
        "LeptonRunFailed",
        'lepton_run_state{state="failed"} == 1 and on (run) (time() - lepton_run_updated_timestamp_seconds < 3600)',
        "0s", "warning",
        "Run {{ $labels.run }} has failed.",
        "It ended for good within the last hour, and nothing tries it again.",
        "`lepton-ray runs show RUN` says why in one line. Its checkpoints are there: submitted again under the same "
        "name it goes on.",
    ),
)  # fmt: skip

SERVING = (
    Alert(
        "LeptonServingErrors",
        "endpoint:lepton_serving_errors:ratio5m > 0.01 and endpoint:lepton_serving_requests:rate5m > 0.1",
        "2m", "critical",
        "Endpoint {{ $labels.endpoint }}, version {{ $labels.version }}: {{ $value | humanizePercentage }} of the "
        "requests fail.",
        "More than one request in a hundred was answered with 5xx for two minutes. What clients get wrong (4xx) does "
        "not "
        "count.",
        "The replicas' logs name each error with its request id. If a version is new: "
        "`lepton-ray serve deploy NAME --model MODEL:N` with the one before.",
    ),
    Alert(
        "LeptonServingOverloaded",
        "sum by (endpoint, model, version) (rate(lepton_serving_queue_seconds_sum[5m]))"
        " / (sum by (endpoint, model, version) (rate(lepton_serving_queue_seconds_count[5m])) > 0) > 0.5",
        "2m", "warning",
        "Endpoint {{ $labels.endpoint }}: a row waits {{ $value | humanizeDuration }} for its batch.",
        "Its replicas are full, and there are as many as are allowed, or new ones do not come. Soon requests are "
        "turned "
        "away with 503.",
        "Raise `serving.max_replicas`, or give the cluster room: a replica that waits is in `lepton-ray serve status`.",
    ),
    Alert(
        "LeptonServingSlow",
        "endpoint:lepton_serving_request_seconds:p99_5m > 1 and endpoint:lepton_serving_requests:rate5m > 0.1",
        "5m", "warning",
        "Endpoint {{ $labels.endpoint }}: one request in a hundred takes over {{ $value | humanizeDuration }}.",
        "The 99th percentile of the time in the replica is above a second for five minutes.",
        "`lepton_serving_queue_seconds` against `lepton_serving_model_seconds` says whether requests wait or the model "
        "is slow: more replicas for the one, a compressed version for the other.",
    ),
)  # fmt: skip

MONITORING = (
    Alert(
        "LeptonExporterDown", "absent(lepton_exporter_build_info)", "5m", "warning",
        "No exporter is being scraped.",
        "Nothing is known of any run or endpoint. Runs and endpoints themselves do not need it.",
        "Is the pod there, does the ServiceMonitor select it, is the token right (401), does the network policy let "
        "Prometheus in?",
    ),
    Alert(
        "LeptonExporterStale",
        "time() - lepton_exporter_refreshed_timestamp_seconds > 120", "1m", "warning",
        "The exporter has not read the store for {{ $value | humanizeDuration }}; figures are old.",
        "It serves the last known values while the store is away.",
        "Its log names what it cannot read: credentials, endpoint, a quota of requests.",
    ),
    Alert(
        "LeptonExporterSkipsSources", "increase(lepton_exporter_errors_total[15m]) > 0", "15m", "info",
        "The exporter leaves sources out: {{ $labels.cause }}.",
        "A record or a snapshot is damaged, or there are more series than are allowed.",
        "Its log names them.",
    ),
    Alert(
        "LeptonRecorderDropsFigures", "increase(lepton_recorder_errors_total[15m]) > 0", "15m", "info",
        "Ranks or replicas drop figures: {{ $labels.cause }}.",
        "What they measured could not be written, e.g. since storage was away. Training and serving go on; counters "
        "catch up, as each snapshot holds the whole count.",
        "Look at the storage alerts first.",
    ),
)  # fmt: skip

GROUPS: dict[str, tuple[Alert, ...]] = {"training": TRAINING, "serving": SERVING, "monitoring": MONITORING}
ALERTS: dict[str, Alert] = {alert.name: alert for alerts in GROUPS.values() for alert in alerts}


def metrics_in(expression: str) -> set[str]:
    """The metrics of the catalogue that an expression reads. ValueError for one that is in no catalogue."""
    recorded = {name for rule in RECORDINGS for name in SERIES.findall(rule.name)}
    found = set()
    for name in SERIES.findall(expression):
        base = next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end) and name not in METRICS), name)
        if base in METRICS:
            found.add(base)
        elif name not in recorded:
            raise ValueError(f"{name}: no metric of the catalogue")
    return found


def rules() -> dict[str, Any]:
    """The rules as a Prometheus rule file has them."""
    groups: list[dict[str, Any]] = [
        {
            "name": "lepton-recordings",
            "rules": [{"record": rule.name, "expr": rule.expression} for rule in RECORDINGS],
        }
    ]
    for group, alerts in GROUPS.items():
        groups.append({"name": f"lepton-{group}", "rules": [_rule(alert) for alert in alerts]})
    return {"groups": groups}


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expression,
        "for": alert.hold,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.meaning,
            "runbook": f"docs/alerts.md#{alert.name.lower()}",
        },
    }


def rules_yaml() -> str:
    """`helm/lepton-ray/files/rules.yaml`."""
    head = "# Generated by `python -m lepton_ray.monitoring.alerts rules`; a test holds it equal.\n"
    return head + yaml.safe_dump(rules(), sort_keys=False, width=1000, allow_unicode=True)


def _section(group: str, alerts: Iterable[Alert]) -> Iterable[str]:
    yield f"## {group.capitalize()}\n"
    for alert in alerts:
        yield f"### {alert.name}\n"
        yield f"{alert.severity}, {'at once' if alert.hold == '0s' else f'after {alert.hold}'}.\n"
        yield f"{alert.meaning}\n"
        yield f"**What to do.** {alert.action}\n"
        yield f"```promql\n{alert.expression}\n```\n"


def page() -> str:
    """`docs/alerts.md`."""
    lines = [
        "# Alerts",
        "",
        "Generated by `python -m lepton_ray.monitoring.alerts page > docs/alerts.md`; a test holds it equal.",
        "The chart installs them as a `PrometheusRule` with `metrics.rules.enabled: true`; without the Prometheus",
        "operator, give `helm/lepton-ray/files/rules.yaml` to Prometheus as a rule file.",
        "Severities: `critical`, somebody should look now; `warning`, today; `info`, nothing is lost yet.",
        "",
    ]
    for group, alerts in GROUPS.items():
        lines += _section(group, alerts)
    lines += ["## Recorded figures\n", "| name | what it is |", "|---|---|"]
    lines += [f"| `{rule.name}` | {rule.help} |" for rule in RECORDINGS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    wanted = {"rules": rules_yaml, "page": page}
    if len(sys.argv) != 2 or sys.argv[1] not in wanted:
        sys.stderr.write("usage: python -m lepton_ray.monitoring.alerts rules|page\n")
        sys.exit(2)
    sys.stdout.write(wanted[sys.argv[1]]())
