"""The steps of the main job, joined: data, training, registry, serving, monitoring. Each says what it saw."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from lepton_ray.cli.output import console
from lepton_ray.cli.train import ProgressShow
from lepton_ray.errors import LeptonError, NotFoundError
from lepton_ray.settings import Settings, parse_settings

if TYPE_CHECKING:
    import pyarrow as pa

    from lepton_ray.data.tables import Table
    from lepton_ray.registry import ModelVersion
    from lepton_ray.serving import Endpoint
    from lepton_ray.training.trainer import TrainingResult

CONNECTIONS = 16
"""Requests under way at once when the held-out images are sent."""
TOLERANCE = 1e-5
"""Largest difference of a probability, served against offline: batches of another size round otherwise."""


def demo_settings(*, full: bool, workers: int, epochs: int | None, run: str) -> Settings:
    """The settings of the main job; those of `jobs/configs/digits.yaml` and `digits-full.yaml`."""
    name = "digits-full" if full else "digits"
    split: dict[str, Any] = {"by": "column", "column": "split"} if full else {"by": "stratified", "held_out": 0.2}
    training: dict[str, Any] = {"workers": workers, "epochs": epochs or (5 if full else 12)}
    if full:
        training.update(global_batch=128, checkpoint={"every_steps": 500})
    return parse_settings(
        {
            "run": run,
            "data": {"table": name, "source": name, "split": split},
            "training": training,
            "publish": {"model": name, "alias": "champion"},
            # a demo should show scaling within its own few seconds
            "serving": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4.0, "cpus_per_replica": 1.0},
        }
    )


class MainJob:
    """One run of the main job; what it started is ended when its `with` block is left, however it is left."""

    def __init__(
        self, *, full: bool, workers: int, epochs: int | None, host: str, port: int, exporter_port: int,
        store_uri: str | None, as_json: bool,
    ) -> None:  # fmt: skip
        from lepton_ray.storage import open_store

        run = time.strftime("demo-%Y%m%d-%H%M%S")
        self.settings = demo_settings(full=full, workers=workers, epochs=epochs, run=run)
        self.store = open_store(store_uri)
        self._host, self._port, self._exporter_port = host, port, exporter_port
        self._as_json = as_json
        self._console: Console = console(as_json)
        self._stack = contextlib.ExitStack()
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}
        self.result: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # a second Ctrl-C must not cut the cleaning up short: something would be left running
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._stack.close()
        finally:
            signal.signal(signal.SIGINT, previous)

    def run(self) -> dict[str, Any]:
        """All steps; returns every figure."""
        from lepton_ray.cluster import Cluster, available_cpus, connect
        from lepton_ray.serving.ports import check_port
        from lepton_ray.training.launch import check_resources

        if not os.environ.get("RAY_ADDRESS"):
            check_resources(self.settings.training, Cluster(local=True), {"CPU": available_cpus()})
        self.store.check_writable()
        for port in (self._port, self._exporter_port):
            check_port(self._host, port)
        with self._step("data"):
            data = self._ingest()
        with self._step("ray"):
            self._stack.enter_context(connect())
        with self._step("training"):
            trained = self._train()
        with self._step("publish"):
            version = self._publish(trained)
        with self._step("deploy"):
            endpoint = self._deploy(version)
        with self._step("requests"):
            self._request_all(endpoint, version, data)
        with self._step("metrics"):
            self._scrape(version)
        with self._step("report"):
            self._report()
        self.result["seconds"] = {**self._seconds, "total": round(time.monotonic() - self._started, 2)}
        return self.result

    def wait(self) -> None:
        """Until Ctrl-C."""
        self._console.print("endpoint and exporter stay up; Ctrl-C ends both")
        threading.Event().wait()

    @contextlib.contextmanager
    def _step(self, name: str) -> Any:
        started = time.monotonic()
        self._console.print(f"[bold]{name}[/bold]")
        yield
        self._seconds[name] = round(time.monotonic() - started, 2)

    def _say(self, line: str) -> None:
        self._console.print(f"  {line}", markup=False)

    def _ingest(self) -> Table:
        from lepton_ray.data.tables import ingest, open_table

        data = self.settings.data
        try:
            found = open_table(self.store, data.table)
            self._say(f"table {found.ref} is there already: {found.num_rows} rows")
            self.result["data"] = {"table": found.name, "version": found.version, "rows": found.num_rows}
        except NotFoundError:
            report = ingest(self.store, data.table, str(data.source), reading=data.reading)
            found = open_table(self.store, data.table)
            self._say(
                f"{report.rows_read} rows read; duplicates {report.duplicates}, missing {report.missing}, invalid "
                f"{report.invalid}; table {found.ref} has {report.rows_written} rows"
            )
            self.result["data"] = report.to_dict()
        self.result["data"]["fingerprint"] = found.fingerprint()
        self._say(f"fingerprint {found.fingerprint()[:16]}")
        return found

    def _train(self) -> TrainingResult:
        from lepton_ray.training.trainer import Trainer

        with ProgressShow(self.settings, quiet_stdout=self._as_json) as show:
            trained = Trainer(None, self.settings, store=self.store, on_progress=show.update).fit()
        rows = trained.record["rows"]
        self._say(
            f"run {trained.run}: {trained.step} steps on {self.settings.training.most_workers} workers, "
            f"{rows['train']} rows to train, {rows['held_out']} held out"
        )
        self._say(f"held-out accuracy {trained.metrics['accuracy']:.2%}, loss {trained.metrics['loss']:.4f}")
        self._say(f"every row used exactly once per epoch: {'yes' if trained.samples_exact else 'NO'}")
        self.result["training"] = {
            "run": trained.run, "steps": trained.step, "workers": self.settings.training.most_workers, "rows": rows,
            "metrics": trained.metrics, "samples_exact": trained.samples_exact, "generations": trained.generations,
        }  # fmt: skip
        return trained

    def _publish(self, trained: TrainingResult) -> ModelVersion:
        from lepton_ray.training.publication import publish

        version = publish(trained, self.settings, self.store)
        if version is None:
            raise LeptonError("publish.model is null: the demo needs a model version to serve")
        self._say(f"{version.ref}@{self.settings.publish.alias} (sha256 {version.digest[:16]})")
        self.result["model"] = {"version": version.ref, "digest": version.digest}
        return version

    def _deploy(self, version: ModelVersion) -> Endpoint:
        from lepton_ray.serving import delete, deploy

        name = self.settings.data.table
        endpoint = deploy(name, version.ref, self.store, self.settings.serving, host=self._host, port=self._port)
        self._stack.callback(delete, name)
        self._say(f"{endpoint.url} answers; autoscaling 1 to {self.settings.serving.max_replicas} replicas")
        self.result["endpoint"] = {"name": name, "url": endpoint.url}
        return endpoint

    def _request_all(self, endpoint: Endpoint, version: ModelVersion, data: Table) -> None:
        from lepton_ray.data.split import split_rows
        from lepton_ray.registry import Registry
        from lepton_ray.tasks import Predictor

        rows = data.read()
        held_out = rows.take(split_rows(rows, self.settings.data.split).held_out)
        loaded = Registry(self.store).load(version)
        predictor = Predictor.load(loaded.card, loaded.transforms, loaded.weights)
        offline = [answer.model_dump() for answer in predictor.answer_rows(held_out)]
        answers, seconds, wall = asyncio.run(_send(endpoint.url, held_out))
        wrong = [i for i, (a, b) in enumerate(zip(answers, offline, strict=True)) if not _equal(a, b)]
        if wrong:
            raise LeptonError(
                f"{len(wrong)} of {len(offline)} served answers differ from the offline ones, first at held-out row "
                f"{wrong[0]}: {answers[wrong[0]]} against {offline[wrong[0]]}"
            )
        labels = held_out["label"].to_pylist()
        accuracy = statistics.fmean(a["label"] == label for a, label in zip(answers, labels, strict=True))
        cuts = statistics.quantiles(seconds, n=100)
        figures = {
            "requests": len(answers), "equal_to_offline": len(answers) - len(wrong), "accuracy": accuracy,
            "latency_p50_ms": round(cuts[49] * 1e3, 2), "latency_p99_ms": round(cuts[98] * 1e3, 2),
            "requests_per_second": round(len(answers) / wall, 1), "connections": CONNECTIONS,
        }  # fmt: skip
        self._say(f"{len(answers)} held-out images over HTTP, {CONNECTIONS} at a time: all answers equal to offline")
        self._say(
            f"accuracy {accuracy:.2%}; latency p50 {figures['latency_p50_ms']} ms, p99 {figures['latency_p99_ms']} ms; "
            f"{figures['requests_per_second']} requests/s"
        )
        self.result["requests"] = figures

    def _scrape(self, version: ModelVersion) -> None:
        from lepton_ray.monitoring.http_server import ExporterServer
        from lepton_ray.monitoring.scrape import scrape

        server = ExporterServer(self.store, self._host, self._exporter_port).start()
        self._stack.callback(server.close)
        wanted = self.result["requests"]["requests"]
        deadline = time.monotonic() + 20
        while True:  # replicas write their figures every few seconds
            figures = scrape(
                server.url, run=self.settings.run, endpoint=self.settings.data.table, version=version.number
            )
            if figures["requests_total"] >= wanted or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        self.result["metrics"] = {"url": server.url, **figures}
        self._say(f"{server.url}/metrics: {figures['series']} series")
        parts = "  ".join(f"{name} {value:.2f}" for name, value in figures["step_parts_ms"].items())
        rows = [
            ("samples/s, all ranks", f"{figures['samples_per_second']:,.0f}"),
            ("step, ms", f"{figures['step_seconds_mean'] * 1e3:.2f}"),
            ("parts of it, ms", parts),
            ("goodput", f"{figures['goodput_ratio']:.1%} of the worker-seconds were compute"),
            ("requests answered", f"{figures['requests_total']:.0f}"),
            ("request in the replica, ms", f"{figures['request_seconds_mean'] * 1e3:.2f} (mean)"),
        ]
        for name, value in rows:
            self._say(f"{name:<28}{value}")

    def _report(self) -> None:
        from lepton_ray.monitoring.report import write_report

        key = write_report(self.store, self.settings.run)
        self.result["report"] = f"{self.store.uri}/{key}"
        self.result["store"] = self.store.uri
        self._say(self.result["report"])

    def say_what_next(self, *, keep: bool) -> None:
        """Where everything is and what to try."""
        run, name = self.settings.run, self.settings.data.table
        seconds = self.result["seconds"]
        self._console.print(f"done in {seconds['total']:.1f} s; everything is under {self.store.uri}", markup=False)
        self._console.print("try next:", markup=False)
        lines = [
            f"lepton-ray runs show {run}",
            f'lepton-ray data query {name} "select label, count(*) as rows from t group by label order by label"',  # noqa: S608 - a command shown to a person
            f"lepton-ray serve deploy {name} --model {name}@champion",
        ]
        if keep:
            lines[2] = f"curl {self.result['endpoint']['url']}/metadata"
        for line in lines:
            self._say(line)


def _equal(served: dict[str, Any], offline: dict[str, Any]) -> bool:
    """The same label, and each probability within TOLERANCE."""
    pairs = zip(served["probabilities"], offline["probabilities"], strict=True)
    return served["label"] == offline["label"] and all(abs(a - b) <= TOLERANCE for a, b in pairs)


async def _send(url: str, rows: pa.Table) -> tuple[list[dict[str, Any]], list[float], float]:
    """Post every image to /predict, CONNECTIONS at a time: answers in order, seconds of each request, wall time."""
    import httpx

    images = [list(image) for image in rows["image"].to_pylist()]
    answers: list[dict[str, Any]] = [{}] * len(images)
    seconds = [0.0] * len(images)
    todo = iter(range(len(images)))
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=CONNECTIONS)) as client:

        async def work() -> None:
            for index in todo:
                started = time.perf_counter()
                response = await client.post("/predict", json={"image": images[index]})
                seconds[index] = time.perf_counter() - started
                if response.status_code != 200:
                    raise LeptonError(f"{url}/predict answered {response.status_code}: {response.text[:200]}")
                answers[index] = response.json()

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
        return answers, seconds, time.perf_counter() - began
