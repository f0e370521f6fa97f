"""Every metric of the product, declared once: name, kind, unit, help, labels and their bounds.

The recorder refuses what is not here, the exporter serves nothing else, `docs/metrics.md` is generated from it
(`python -m lepton_ray.monitoring.catalogue > docs/metrics.md`). Base units; counters end in `_total`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lepton_ray.monitoring.goodput import BUCKETS
from lepton_ray.monitoring.incidents import INCIDENT_KINDS
from lepton_ray.monitoring.ledger import PHASES

Kind = Literal["counter", "gauge", "histogram"]
Merge = Literal["newest", "live"]

MAX_LABEL_LENGTH = 128
"""Characters of a label value; longer ones are cut."""
OTHER = "other"
"""Stands in for label values beyond a label's bound."""


@dataclass(frozen=True)
class Label:
    """A label and how many values it may take: the listed ones, or `bound` distinct ones; the rest become `other`."""

    name: str
    help: str
    bound: int
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One metric family.

    `merge` says how gauges of equal labels from several processes become one sample: `newest` takes the newest
    snapshot's and keeps it while the run is shown; `live` adds up those of processes that still report, since such a
    value dies with its process. Counters and histograms are always added up.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Merge = "newest"


RUN_STATES = ("running", "finished", "failed", "interrupted")
RESTART_CAUSES = ("worker_lost", "worker_error", "preempted", "hung", "driver_lost")
ERROR_CAUSES = ("storage", "unknown_metric", "labels", "value", "damaged", "limit", "internal")

LABELS = {
    label.name: label
    for label in (
        Label("run", "name of the training run", 50),
        Label("rank", "rank within the worker group", 256),
        Label("phase", "what the rank was doing", len(PHASES), PHASES),
        Label("cause", "why", 12, RESTART_CAUSES + ERROR_CAUSES),
        Label("metric", "name of the task's evaluation metric", 16),
        Label("state", "state of the run", len(RUN_STATES), RUN_STATES),
        Label("bucket", "where the worker-seconds went", len(BUCKETS), tuple(BUCKETS)),
        Label("task", "name of the task", 50),
        Label("table", "table and version the run trains on", 50),
        Label("published", "model version the run published, empty before", 50),
        Label("endpoint", "name of the endpoint", 16),
        Label("model", "name of the served model", 16),
        Label("version", "number of the served model version, or of the package", 32),
        Label("digest", "first 12 characters of the model version's digest", 64),
        Label("replica", "a serving replica", 64),
        Label("code", "HTTP status of the answer", 24),
        Label("kind", "what went wrong", len(INCIDENT_KINDS), INCIDENT_KINDS),
        Label("source", "kind of folder read: run or endpoint", 2, ("run", "endpoint")),
    )
}

_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_CHECKPOINT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_REQUEST_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PART_BUCKETS = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROW_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_MODEL = ("endpoint", "model", "version")

TRAINING = (
    Metric("lepton_training_steps_total", "counter", "steps", "Optimizer steps done, counted by rank 0.", ("run",)),
    Metric("lepton_training_samples_total", "counter", "samples", "Rows trained on, over all ranks.", ("run",)),
    Metric(
        "lepton_training_step_seconds",
        "histogram",
        "seconds",
        "Time from one optimizer step to the next.",
        ("run", "rank"),
        _STEP_BUCKETS,
    ),
    Metric(
        "lepton_training_phase_seconds_total",
        "counter",
        "seconds",
        "Time of each rank by what it was doing; the phases add up to its time in the loop.",
        ("run", "rank", "phase"),
    ),
    Metric("lepton_training_loss", "gauge", "", "Training loss of the newest reported step.", ("run",)),
    Metric("lepton_training_learning_rate", "gauge", "", "Learning rate of the newest step.", ("run",)),
    Metric("lepton_training_gradient_norm", "gauge", "", "L2 norm of the gradients before clipping.", ("run",)),
    Metric("lepton_training_samples_per_second", "gauge", "samples/s", "Throughput over all ranks.", ("run",)),
    Metric("lepton_training_epoch", "gauge", "epochs", "Epoch the run is in, from 0.", ("run",)),
    Metric("lepton_training_step", "gauge", "steps", "Steps of the run that are done.", ("run",)),
    Metric("lepton_training_total_steps", "gauge", "steps", "Steps the run will have at its end.", ("run",)),
    Metric("lepton_training_eta_seconds", "gauge", "seconds", "Expected time to the last step.", ("run",)),
    Metric("lepton_training_world_size", "gauge", "ranks", "Ranks in the worker group.", ("run",)),
    Metric("lepton_training_restarts_total", "counter", "restarts", "Worker-group restarts.", ("run", "cause")),
    Metric("lepton_training_replayed_steps_total", "counter", "steps", "Steps done again after a restart.", ("run",)),
    Metric(
        "lepton_training_nonfinite_steps_total",
        "counter",
        "steps",
        "Steps whose loss or gradient was not finite.",
        ("run",),
    ),
    Metric(
        "lepton_training_evaluation",
        "gauge",
        "",
        "Newest evaluation on the held-out rows, by metric.",
        ("run", "metric"),
    ),
    Metric(
        "lepton_checkpoint_seconds",
        "histogram",
        "seconds",
        "Time from the start of a checkpoint to its commit.",
        ("run",),
        _CHECKPOINT_BUCKETS,
    ),
    Metric(
        "lepton_hot_copy_interval_steps",
        "gauge",
        "steps",
        "Steps between two copies of the state in shared memory.",
        ("run",),
    ),
    Metric(
        "lepton_checkpoint_interval_seconds",
        "gauge",
        "seconds",
        "Time between two checkpoints, as the settings have it or as it pays best.",
        ("run",),
    ),
    Metric("lepton_checkpoint_interval_steps", "gauge", "steps", "The same in steps.", ("run",)),
    Metric(
        "lepton_preemption_grace_needed_seconds",
        "gauge",
        "seconds",
        "Time from the notice of a preemption to a committed checkpoint, predicted from the newest steps and saves.",
        ("run",),
    ),
    Metric("lepton_checkpoint_bytes", "gauge", "bytes", "Size of the newest committed checkpoint.", ("run",)),
    Metric("lepton_checkpoint_committed_total", "counter", "checkpoints", "Checkpoints committed.", ("run",)),
    Metric(
        "lepton_checkpoint_last_commit_timestamp_seconds",
        "gauge",
        "unix seconds",
        "When the newest checkpoint was committed.",
        ("run",),
    ),
    Metric("lepton_process_cpu_seconds_total", "counter", "seconds", "CPU time of the rank.", ("run", "rank")),
    Metric(
        "lepton_process_resident_memory_bytes",
        "gauge",
        "bytes",
        "Resident memory of the rank.",
        ("run", "rank"),
        merge="live",
    ),
)

RUNS = (
    Metric("lepton_run_info", "gauge", "", "1 for each run shown.", ("run", "task", "table", "published")),
    Metric("lepton_run_state", "gauge", "", "1 for the state the run is in, 0 for the others.", ("run", "state")),
    Metric("lepton_run_updated_timestamp_seconds", "gauge", "unix seconds", "Newest sign of life.", ("run",)),
    Metric("lepton_run_attempts", "gauge", "attempts", "Drivers that have held the run.", ("run",)),
    Metric("lepton_run_failures", "gauge", "failures", "Worker-group failures of the run.", ("run",)),
    Metric("lepton_incidents_total", "counter", "incidents", "What went wrong in the run, by kind.", ("run", "kind")),
    Metric(
        "lepton_goodput_seconds",
        "gauge",
        "worker-seconds",
        "Where the worker-seconds of the run went; the buckets add up to wall time x workers.",
        ("run", "bucket"),
    ),
    Metric("lepton_goodput_ratio", "gauge", "ratio", "Share of the worker-seconds that was compute.", ("run",)),
)

SERVING = (
    Metric("lepton_serving_requests_total", "counter", "requests", "Requests answered.", (*_MODEL, "code")),
    Metric(
        "lepton_serving_request_seconds",
        "histogram",
        "seconds",
        "Time from the arrival of a request in the replica to its answer.",
        _MODEL,
        _REQUEST_BUCKETS,
    ),
    Metric(
        "lepton_serving_queue_seconds",
        "histogram",
        "seconds",
        "Time a row waited in the replica for its batch.",
        _MODEL,
        _PART_BUCKETS,
    ),
    Metric(
        "lepton_serving_model_seconds", "histogram", "seconds", "Time of one call of the model.", _MODEL, _PART_BUCKETS
    ),
    Metric("lepton_serving_batch_rows", "histogram", "rows", "Rows joined to one call.", _MODEL, _ROW_BUCKETS),
    Metric("lepton_serving_inflight", "gauge", "requests", "Requests in work, all replicas.", _MODEL, merge="live"),
    Metric(
        "lepton_serving_replica_info",
        "gauge",
        "",
        "1 for each live replica, with the model version it serves.",
        (*_MODEL, "digest", "replica"),
        merge="live",
    ),
)

MONITORING = (
    Metric(
        "lepton_recorder_errors_total",
        "counter",
        "errors",
        "Recordings that were dropped and snapshots that could not be written, by all ranks and replicas.",
        ("cause",),
    ),
    Metric("lepton_exporter_build_info", "gauge", "", "1, with the version of the package.", ("version",)),
    Metric("lepton_exporter_errors_total", "counter", "errors", "Sources that were skipped.", ("cause",)),
    Metric(
        "lepton_exporter_scrape_seconds",
        "histogram",
        "seconds",
        "Time to answer a scrape.",
        (),
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    ),
    Metric("lepton_exporter_refresh_seconds", "gauge", "seconds", "Time the last reading of the store took."),
    Metric(
        "lepton_exporter_refreshed_timestamp_seconds", "gauge", "unix seconds", "When the store was last read whole."
    ),
    Metric("lepton_exporter_sources", "gauge", "sources", "Runs and endpoints that are shown.", ("source",)),
    Metric(
        "lepton_exporter_source_age_seconds",
        "gauge",
        "seconds",
        "Age of the newest snapshot of any running run, and of any endpoint.",
        ("source",),
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in (*TRAINING, *RUNS, *SERVING, *MONITORING)}


def _bounds(metric: Metric) -> str:
    bounds = []
    for name in metric.labels:
        label = LABELS[name]
        bounds.append(f"`{name}` ({len(label.values)} fixed)" if label.values else f"`{name}` (<= {label.bound})")
    return ", ".join(bounds) or "-"


def _section(title: str, metrics: Iterable[Metric]) -> Iterable[str]:
    yield f"## {title}\n"
    yield "| metric | kind | unit | labels (values at most) | meaning |"
    yield "|---|---|---|---|---|"
    for metric in metrics:
        yield f"| `{metric.name}` | {metric.kind} | {metric.unit or '-'} | {_bounds(metric)} | {metric.help} |"
    yield ""


def markdown() -> str:
    """The page `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m lepton_ray.monitoring.catalogue > docs/metrics.md`; a test holds it equal to the",
        "catalogue. All of them are served by `lepton-ray exporter` on `/metrics`. Label values beyond a bound are",
        f"joined under `{OTHER}`. Counters and histograms of a run go on over restarts of its workers.",
        "",
        *_section("Training", TRAINING),
        *_section("Runs and goodput", RUNS),
        *_section("Serving", SERVING),
        *_section("The monitoring itself", MONITORING),
        "## Phases of a rank\n",
        "One at a time, so they add up to the rank's time in the loop: " + ", ".join(f"`{p}`" for p in PHASES) + ".",
        "",
        "## Goodput buckets\n",
        "| bucket | worker-seconds spent |",
        "|---|---|",
        *(f"| `{bucket}` | {meaning} |" for bucket, meaning in BUCKETS.items()),
        "",
        "Each worker-second is in exactly one bucket, and the buckets add up to wall time x workers. Wall time runs",
        "from the creation of the run to its end; time in which no driver held the run (between a killed or",
        "interrupted attempt and the next one) is left out. A driver that gives no sign of life for two minutes",
        "counts as gone since its last sign.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
