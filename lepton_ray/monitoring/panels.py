"""What the Grafana dashboards show, as values: each panel with its figures, unit and what it is for.

`dashboards` turns them into Grafana's JSON. `$run` and `$endpoint` are the dashboard's variables: regular expressions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["lines", "stacked", "bars", "number", "heat"]


@dataclass(frozen=True)
class Figure:
    """One expression of a panel."""

    expression: str
    legend: str = ""
    """Labels as `{{rank}}`."""


@dataclass(frozen=True)
class Panel:
    """One panel."""

    title: str
    help: str
    figures: tuple[Figure, ...]
    kind: Kind = "lines"
    unit: str = "short"
    """Grafana's name of the unit."""
    width: int = 12
    """Of 24."""
    top: float | None = None
    """Largest value of the axis."""


@dataclass(frozen=True)
class Row:
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """What the reader chooses."""

    name: str
    query: str
    """Grafana's `label_values(...)`."""


@dataclass(frozen=True)
class Dashboard:
    """One dashboard."""

    uid: str
    title: str
    help: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = ()
    restarts: bool = False
    """Mark the restarts of the chosen runs."""
    tags: tuple[str, ...] = field(default=("lepton-ray",))


_RUN = '{run=~"$run"}'
_ENDPOINT = '{endpoint=~"$endpoint"}'
_RUNS = Variable("run", "label_values(lepton_run_info, run)")
_ENDPOINTS = Variable("endpoint", "label_values(lepton_serving_requests_total, endpoint)")


def _under_way(metric: str) -> str:
    """A figure added up over the runs that are under way."""
    return f'sum({metric} and on (run) (lepton_run_state{{state="running"}} == 1)) or vector(0)'


def _quantile(share: float, histogram: str, selector: str = "", by: str = "", window: str = "5m") -> str:
    return f"histogram_quantile({share}, sum by ({by}le) (rate({histogram}_bucket{selector}[{window}])))"


def _mean(histogram: str) -> str:
    """By model version, of the chosen endpoints."""
    parts = (f"sum by (version) (rate({histogram}_{part}{_ENDPOINT}[5m]))" for part in ("sum", "count"))
    return " / ".join(parts)


def _one(expression: str, legend: str = "") -> tuple[Figure, ...]:
    return (Figure(expression, legend),)


OVERVIEW = Dashboard(
    "lepton-overview", "lepton-ray / Overview", "All runs and endpoints at a glance.",
    (
        Row("Now", (
            Panel("Runs under way", "Runs whose state is running.",
                  _one('count(lepton_run_state{state="running"} == 1) or vector(0)'),
                  "number", width=4),
            Panel("Ranks", "Ranks of the runs under way.",
                  _one(_under_way("lepton_training_world_size")),
                  "number", width=4),
            Panel("Samples per second", "Over all runs under way.",
                  _one(_under_way("lepton_training_samples_per_second")),
                  "number", width=4),
            Panel("Requests per second", "Over all endpoints.",
                  _one("sum(rate(lepton_serving_requests_total[5m])) or vector(0)"), "number", "reqps", 4),
            Panel("Alerts", "Alerts of this product that fire.",
                  _one('count(ALERTS{alertname=~"Lepton.*",alertstate="firing"}) or vector(0)'), "number", width=4),
            Panel("Age of the figures", "Since the exporter has read the store.",
                  _one("time() - max(lepton_exporter_refreshed_timestamp_seconds)"), "number", "s", 4),
        )),
        Row("Runs", (
            Panel("Progress", "Share of its steps that each run has done.",
                  _one("lepton_training_step / (lepton_training_total_steps > 0)", "{{run}}"), "bars",
                       "percentunit", top=1.0),
            Panel("Goodput", "Share of each run's worker-seconds that was compute.",
                  _one("lepton_goodput_ratio", "{{run}}"), "bars", "percentunit", top=1.0),
            Panel("Steps per second", "", _one("rate(lepton_training_steps_total[5m])", "{{run}}"), unit="ops"),
            Panel("Incidents", "What went wrong within the last hour, by kind.",
                  _one("sum by (run, kind) (increase(lepton_incidents_total[1h]))", "{{run}} {{kind}}"), "bars"),
        )),
        Row("Endpoints", (
            Panel("Requests", "By endpoint and model version.",
                  _one("sum by (endpoint, version) (rate(lepton_serving_requests_total[5m]))",
                       "{{endpoint}} version {{version}}"),
                  unit="reqps"),
            Panel("Time to answer", "99 of 100 requests.",
                  _one(_quantile(0.99, "lepton_serving_request_seconds", by="endpoint, "),
                       "{{endpoint}}"), unit="s"),
        )),
    ),
)  # fmt: skip

TRAINING = Dashboard(
    "lepton-training", "lepton-ray / Training run",
    "One run: what it learns, how fast, and where every worker-second went.",
    (
        Row("Where it is", (
            Panel("Step", "Steps that are done.", _one(f"lepton_training_step{_RUN}", "{{run}}"), "number", width=4),
            Panel("Of", "Steps the run will have at its end.", _one(f"lepton_training_total_steps{_RUN}", "{{run}}"),
                  "number", width=4),
            Panel("Time left", "At its present speed.", _one(f"lepton_training_eta_seconds{_RUN}", "{{run}}"),
                  "number", "s", 4),
            Panel("Ranks", "In its worker group.", _one(f"lepton_training_world_size{_RUN}", "{{run}}"), "number",
                  width=4),
            Panel("Goodput", "Share of the worker-seconds that was compute.", _one(f"lepton_goodput_ratio{_RUN}",
                  "{{run}}"),
                  "number", "percentunit", 4),
            Panel("Steps done again", "After restarts.",
                  _one(f"sum by (run) (lepton_training_replayed_steps_total{_RUN})"
                       f" or on (run) 0 * lepton_training_step{_RUN}",
                       "{{run}}"), "number", width=4),
        )),
        Row("Learning", (
            Panel("Loss", "Of the newest reported step.", _one(f"lepton_training_loss{_RUN}", "{{run}}")),
            Panel("Evaluation", "On the held-out rows.", _one(f"lepton_training_evaluation{_RUN}",
                  "{{run}} {{metric}}")),
            Panel("Learning rate", "", _one(f"lepton_training_learning_rate{_RUN}", "{{run}}")),
            Panel("Gradient norm", "L2, before clipping.", _one(f"lepton_training_gradient_norm{_RUN}", "{{run}}")),
        )),
        Row("Where the time goes", (
            Panel("Worker-seconds", "Every one is in exactly one bucket; they add up to wall time x workers.",
                  _one(f"lepton_goodput_seconds{_RUN}", "{{bucket}}"), "stacked", "s", 24),
            Panel("Parts of the ranks' time", "What they were doing in the last five minutes.",
                  _one(f"sum by (phase) (rate(lepton_training_phase_seconds_total{_RUN}[5m]))"
                       f" / on () group_left () sum(rate(lepton_training_phase_seconds_total{_RUN}[5m]))", "{{phase}}"),
                  "stacked", "percentunit", top=1.0),
            Panel("Samples per second", "Over all ranks.", _one(f"lepton_training_samples_per_second{_RUN}",
                  "{{run}}")),
            Panel("Time of a step", "How many steps took how long.",
                  _one(f"sum by (le) (rate(lepton_training_step_seconds_bucket{_RUN}[5m]))", "{{le}}"), "heat", "s"),
            Panel("Time of a step by rank", "The median; a rank that is slower stands out.",
                  _one(_quantile(0.5, "lepton_training_step_seconds", _RUN, "rank, "),
                       "rank {{rank}}"), unit="s"),
        )),
        Row("What may be lost", (
            Panel("Age of the newest checkpoint", "What losing all nodes now would cost.",
                  _one(f"time() - lepton_checkpoint_last_commit_timestamp_seconds{_RUN}", "{{run}}"), unit="s"),
            Panel("Time to commit a checkpoint", "Half of them, and 99 of 100.",
                  (Figure(_quantile(0.5, "lepton_checkpoint_seconds", _RUN, window="15m"), "half"),
                   Figure(_quantile(0.99, "lepton_checkpoint_seconds", _RUN, window="15m"), "99 of 100")),
                  unit="s"),
            Panel("Size of a checkpoint", "", _one(f"lepton_checkpoint_bytes{_RUN}", "{{run}}"), unit="bytes"),
            Panel("Restarts and incidents", "Of the run so far.",
                  (Figure(f"sum by (kind) (lepton_incidents_total{_RUN})", "{{kind}}"),
                   Figure(f"sum(lepton_run_failures{_RUN})", "failures of the worker group")), "bars"),
        )),
    ),
    (_RUNS,), restarts=True,
)  # fmt: skip

SERVING = Dashboard(
    "lepton-serving", "lepton-ray / Serving", "Endpoints by model version: requests, errors, durations.",
    (
        Row("Requests, errors, durations", (
            Panel("Requests", "",
                  _one(f"sum by (endpoint, version) (rate(lepton_serving_requests_total{_ENDPOINT}[5m]))",
                                       "{{endpoint}} version {{version}}"), unit="reqps", width=8),
            Panel("Answers by code", "Shares; what clients get wrong is 4xx, what we do 5xx.",
                  _one(f"sum by (code) (rate(lepton_serving_requests_total{_ENDPOINT}[5m]))"
                       f" / on () group_left () sum(rate(lepton_serving_requests_total{_ENDPOINT}[5m]))", "{{code}}"),
                  "stacked", "percentunit", 8, 1.0),
            Panel("Time to answer", "Half, 95 and 99 of 100 requests.",
                  tuple(Figure(_quantile(share, "lepton_serving_request_seconds", _ENDPOINT),
                               name) for share, name in ((0.5, "half"), (0.95, "95 of 100"), (0.99, "99 of 100"))),
                  unit="s", width=8),
        )),
        Row("Inside a replica", (
            Panel("Waiting for a batch", "The mean.",
                  _one(_mean("lepton_serving_queue_seconds"), "version {{version}}"),
                  unit="s", width=8),
            Panel("A call of the model", "The mean.",
                  _one(_mean("lepton_serving_model_seconds"), "version {{version}}"),
                  unit="s", width=8),
            Panel("Rows in a call", "The mean.",
                  _one(_mean("lepton_serving_batch_rows"), "version {{version}}"),
                  width=8),
            Panel("Replicas", "That live, by version.",
                  _one(f"count by (endpoint, version) (lepton_serving_replica_info{_ENDPOINT})",
                       "{{endpoint}} version {{version}}")),
            Panel("In work", "Requests that are being answered.",
                  _one(f"sum by (endpoint) (lepton_serving_inflight{_ENDPOINT})", "{{endpoint}}")),
        )),
    ),
    (_ENDPOINTS,),
)  # fmt: skip

RANKS = Dashboard(
    "lepton-ranks", "lepton-ray / Ranks", "What each rank takes of its machine, and the monitoring itself.",
    (
        Row("Ranks", (
            Panel("CPU", "Cores in use by each rank.",
                  _one(f"rate(lepton_process_cpu_seconds_total{_RUN}[5m])", "{{run}} rank {{rank}}")),
            Panel("Memory", "Resident memory of each rank.",
                  _one(f"lepton_process_resident_memory_bytes{_RUN}", "{{run}} rank {{rank}}"), unit="bytes"),
            Panel("Waiting for data", "Share of each rank's time.",
                  _one('rate(lepton_training_phase_seconds_total{run=~"$run",phase="data_wait"}[5m])',
                       "{{run}} rank {{rank}}"),
                  unit="percentunit"),
            Panel("Backward", "Share of each rank's time, exchange of gradients included: who waits has more.",
                  _one('rate(lepton_training_phase_seconds_total{run=~"$run",phase="backward"}[5m])',
                       "{{run}} rank {{rank}}"),
                  unit="percentunit"),
        )),
        Row("The monitoring itself", (
            Panel("Time to answer a scrape", "99 of 100.",
                  _one(_quantile(0.99, "lepton_exporter_scrape_seconds"), "exporter"), unit="s"),
            Panel("Reading the store", "How long the last reading took.",
                  _one("lepton_exporter_refresh_seconds", "exporter"), unit="s"),
            Panel("Sources", "Runs and endpoints that are shown.", _one("lepton_exporter_sources", "{{source}}")),
            Panel("Figures and sources left out", "By cause.",
                  tuple(Figure(f"sum by (cause) (increase(lepton_{who}_errors_total[1h])) or vector(0)",
                               f"{who} {{{{cause}}}}")
                        for who in ("recorder", "exporter"))),
        )),
    ),
    (_RUNS,),
)  # fmt: skip

DASHBOARDS = (OVERVIEW, TRAINING, SERVING, RANKS)
