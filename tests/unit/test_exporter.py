"""The exporter: what it shows of a store, and its three paths."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from run_folder import Clock, build_run, put_json

from lepton_ray.errors import UnavailableError, UsageError
from lepton_ray.monitoring import gather
from lepton_ray.monitoring.catalogue import METRICS
from lepton_ray.monitoring.exporter import Exporter
from lepton_ray.monitoring.goodput import BUCKETS
from lepton_ray.monitoring.http_server import MAX_CONNECTIONS, ExporterServer, read_token
from lepton_ray.monitoring.recorder import Recorder
from lepton_ray.monitoring.runs import read_record, run_goodput
from lepton_ray.storage import Store
from lepton_ray.storage.local import LocalStore

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
SMALL = {"epochs": 2, "steps_per_epoch": 60, "lost_at": 70}


def shown(exporter: Exporter) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Refresh, scrape and parse: (sample name, labels) -> value."""
    exporter.refresh()
    body, _ = exporter.render()
    found = {}
    for family in parse_text(body.decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(found: dict, name: str, **labels: str) -> float | None:
    return found.get((name, tuple(sorted(labels.items()))))


def names(found: dict) -> set[str]:
    return {name for name, _ in found}


def replica(store: Store, name: str, *, endpoint: str = "digits", requests: int = 5) -> None:
    """The snapshot of a serving replica."""
    labels = {"endpoint": endpoint, "model": "digits", "version": "3"}
    recorder = Recorder(store.uri, f"endpoints/{endpoint}/metrics/{name}.json", labels)
    recorder.set("lepton_serving_replica_info", 1, digest="0123456789ab", replica=name)
    for _ in range(requests):
        recorder.count("lepton_serving_requests_total", code="200")
        recorder.observe("lepton_serving_request_seconds", 0.004)
    recorder.set("lepton_serving_inflight", 2)
    recorder.flush()


def age(store: Store, key: str, seconds: float) -> None:
    """Make a snapshot older than it is."""
    content = json.loads(store.get(key))
    put_json(store, key, {**content, "written_at": content["written_at"] - seconds})


def test_figures_equal_those_recorded(store):
    """Counters go over both worker groups, replayed steps included; goodput is the ledger's; on disk and on S3."""
    built = build_run(store, **SMALL)
    found = shown(Exporter(store))
    run = built.run
    assert value(found, "lepton_training_steps_total", run=run) == built.steps["steps"]
    assert value(found, "lepton_training_samples_total", run=run) == built.steps["rows"]
    ranks = [value(found, "lepton_training_step_seconds_count", run=run, rank=rank) for rank in ("0", "1")]
    assert ranks == [built.steps["steps"]] * 2
    assert value(found, "lepton_training_restarts_total", run=run, cause="worker_lost") == 1
    assert value(found, "lepton_run_state", run=run, state="finished") == 1
    assert value(found, "lepton_run_state", run=run, state="running") == 0
    ledger = run_goodput(store, run, read_record(store, run))
    for bucket in BUCKETS:
        assert value(found, "lepton_goodput_seconds", run=run, bucket=bucket) == pytest.approx(ledger.buckets[bucket])
    assert value(found, "lepton_goodput_ratio", run=run) == pytest.approx(ledger.ratio)


@pytest.mark.parametrize(("accept", "parse"), [("", parse_text), (OPENMETRICS, parse_openmetrics)])
def test_text_parses_in_both_formats(file_store, accept, parse):
    """Every family is one of the catalogue's, with its kind and help."""
    build_run(file_store, **SMALL)
    replica(file_store, "a")
    exporter = Exporter(file_store)
    exporter.refresh()
    body, content_type = exporter.render(accept)
    assert ("openmetrics" in content_type) == bool(accept)
    families = list(parse(body.decode()))
    assert len(families) > 30
    for family in families:
        declared = METRICS.get(family.name) or METRICS.get(f"{family.name}_total")
        assert declared is not None, family.name
        assert (family.type, family.documentation) == (declared.kind, declared.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(declared.labels)


def test_labels_cannot_break_the_text(file_store):
    """Quotes, backslashes and newlines of a metric's name come back as they were."""
    nasty = 'a"b\\c\nd{}=é'
    recorder = Recorder(file_store.uri, "runs/digits/metrics/g1-rank0.json", {"run": "digits", "rank": "0"})
    recorder.set("lepton_training_evaluation", 0.5, metric=nasty)
    build_run(file_store, "digits", **SMALL)
    recorder.flush()
    assert value(shown(Exporter(file_store)), "lepton_training_evaluation", run="digits", metric=nasty) == 0.5


def test_damaged_files_are_skipped_and_counted(file_store):
    """A broken snapshot, ledger entry or record costs itself only."""
    built = build_run(file_store, **SMALL)
    folder = f"runs/{built.run}"
    for key, data in {
        f"{folder}/metrics/g3-rank0.json": b'{"version": 1, "labels"',
        f"{folder}/metrics/g3-rank1.json": b"[" * 100_000,
        f"{folder}/metrics/driver.json": b"\xff\xfe",
        f"{folder}/ledger/g3-rank0.json": b"{}",
        "runs/broken/record.json": b"null",
        "runs/empty-record/record.json": b"{}",
        "runs/No Name/record.json": b"{}",
        "endpoints/digits/metrics/a.json": b"0",
    }.items():
        file_store.put(key, data)
    exporter = Exporter(file_store)
    found = shown(exporter)
    assert value(found, "lepton_training_steps_total", run=built.run) == built.steps["steps"]
    assert value(found, "lepton_exporter_errors_total", cause="damaged") == 7
    assert value(found, "lepton_exporter_sources", source="run") == 1
    again = shown(exporter)
    assert value(again, "lepton_training_steps_total", run=built.run) == built.steps["steps"]


def test_finished_runs_leave_after_retention(file_store):
    built = build_run(file_store, **SMALL)
    clock = Clock(built.ended_at + 100.0)
    exporter = Exporter(file_store, retain_s=3600.0, now=clock)
    assert value(shown(exporter), "lepton_run_state", run=built.run, state="finished") == 1
    clock.pass_time(4000.0)
    found = shown(exporter)
    assert not {name for name in names(found) if name.startswith(("lepton_run", "lepton_training", "lepton_goodput"))}


def test_memory_of_ended_processes_is_dropped(file_store):
    """Ranks that no longer report have no memory; what they counted stays for the retention."""
    built = build_run(file_store, **SMALL)
    clock = Clock(time.time())
    exporter = Exporter(file_store, now=clock)
    assert "lepton_process_resident_memory_bytes" in names(shown(exporter))
    clock.pass_time(gather.LIVE_S + 30.0)
    found = shown(exporter)
    assert "lepton_process_resident_memory_bytes" not in names(found)
    assert value(found, "lepton_training_steps_total", run=built.run) == built.steps["steps"]


def test_replicas_come_and_go(file_store):
    """A dead replica is no longer shown, yet the endpoint's requests do not fall."""
    labels = {"endpoint": "digits", "model": "digits", "version": "3"}
    replica(file_store, "one", requests=5)
    replica(file_store, "two", requests=7)
    exporter = Exporter(file_store)
    found = shown(exporter)
    assert value(found, "lepton_serving_requests_total", code="200", **labels) == 12
    assert value(found, "lepton_serving_inflight", **labels) == 4
    age(file_store, "endpoints/digits/metrics/one.json", 300.0)
    found = shown(Exporter(file_store))
    assert value(found, "lepton_serving_requests_total", code="200", **labels) == 12
    assert value(found, "lepton_serving_request_seconds_count", **labels) == 12
    assert value(found, "lepton_serving_inflight", **labels) == 2
    replicas = {dict(pairs)["replica"] for name, pairs in found if name == "lepton_serving_replica_info"}
    assert replicas == {"two"}


def test_series_stay_bounded(file_store, monkeypatch):
    """Runs beyond the bound are left out, the newest kept; a source that would exceed the limit is counted."""
    monkeypatch.setattr(gather, "MAX_SERIES", 400)
    for number in range(6):
        build_run(file_store, f"run-{number}", epochs=1, steps_per_epoch=20, lost_at=None)
    exporter = Exporter(file_store)
    found = shown(exporter)
    assert value(found, "lepton_exporter_errors_total", cause="limit") == 1
    runs = {dict(pairs)["run"] for name, pairs in found if name == "lepton_run_info"}
    assert 0 < len(runs) < 6


def test_at_rest_runs_are_not_read_again(file_store, monkeypatch):
    """What is over costs one look in half a minute, not one per refresh."""
    built = build_run(file_store, **SMALL)
    clock = Clock(built.ended_at + 500.0)
    exporter = Exporter(file_store, retain_s=1e6, now=clock)
    exporter.refresh()
    read: list[str] = []
    get = LocalStore.get
    monkeypatch.setattr(LocalStore, "get", lambda self, key: read.append(key) or get(self, key))
    for _ in range(10):
        clock.pass_time(2.0)
        exporter.refresh()
    assert read == []
    clock.pass_time(gather.RECHECK_S)
    exporter.refresh()
    assert f"runs/{built.run}/record.json" in read


def test_view_survives_storage_outage(file_store, monkeypatch, caplog):
    """While the store is away scrapes show the last view; the outage is counted and told once."""

    def away(*_: object) -> list[str]:
        raise UnavailableError("store: away")

    built = build_run(file_store, **SMALL)
    exporter = Exporter(file_store)
    before = shown(exporter)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "list_names", away)
        shown(exporter)
        found = shown(exporter)
    assert value(found, "lepton_exporter_errors_total", cause="storage") == 2
    assert len(caplog.records) == 1
    key = ("lepton_training_steps_total", (("run", built.run),))
    assert found[key] == before[key]


def test_deleted_run_disappears(file_store):
    built = build_run(file_store, **SMALL)
    exporter = Exporter(file_store)
    assert "lepton_run_info" in names(shown(exporter))
    file_store.delete_prefix(f"runs/{built.run}")
    assert "lepton_run_info" not in names(shown(exporter))


@contextlib.contextmanager
def serving(store: Store, **options: object) -> Iterator[ExporterServer]:
    server = ExporterServer(store, **options).start()  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


def test_server_answers_its_paths_only(file_store):
    built = build_run(file_store, **SMALL)
    with serving(file_store) as server, httpx.Client(base_url=server.url, timeout=10) as client:
        assert server.exporter.ready.wait(10)
        assert client.get("/healthz").text == "ok\n"
        assert client.get("/readyz").status_code == 200
        answer = client.get("/metrics?x=1", headers={"Accept": OPENMETRICS})
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert f'lepton_training_steps_total{{run="{built.run}"}}' in answer.text
        assert client.get("/").status_code == 404
        assert client.get("/metrics/../etc/passwd").status_code == 404
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
            refused = client.request(method, "/metrics", content=b"x" * 1000 if method != "HEAD" else None)
            assert (refused.status_code, refused.headers["allow"]) == (405, "GET")
        scrapes = client.get("/metrics").text
    assert "lepton_exporter_scrape_seconds_count" in scrapes


def test_not_ready_before_first_reading(file_store, monkeypatch):
    def away(*_: object) -> list[str]:
        raise UnavailableError("store: away")

    monkeypatch.setattr(LocalStore, "list_names", away)
    with serving(file_store) as server:
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert httpx.get(f"{server.url}/metrics").status_code == 200


def test_port_is_free_after_close(file_store):
    with serving(file_store) as server:
        port = int(server.url.rsplit(":", 1)[1])
    with serving(file_store, port=port) as again:
        assert again.url == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 70_000, "expected 0 to 65535"),
        ("no such host", 0, "unknown address"),
        ("192.0.2.1", 0, "no address of this host"),
    ],
)
def test_unusable_address_is_told(file_store, host, port, words):
    with pytest.raises(UsageError, match=words):
        ExporterServer(file_store, host, port)


def test_idle_connections_leave_room(file_store, monkeypatch):
    """More silent connections than are served at a time do not stop a scrape for good."""
    monkeypatch.setattr("lepton_ray.monitoring.http_server._Handler.timeout", 0.5)
    with serving(file_store) as server:
        host, port = server.url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(MAX_CONNECTIONS + 10)]
        deadline = time.monotonic() + 20
        answered = False
        while not answered and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                answered = httpx.get(f"{server.url}/healthz", timeout=5).status_code == 200
        for connection in silent:
            connection.close()
    assert answered


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("correct-horse-battery\n")
    path.chmod(0o400)
    return path


def test_token_is_asked_for(file_store, token_file):
    """Metrics need the token, probes do not; a changed file counts at once; an unreadable one refuses all."""
    with serving(file_store, token_file=token_file) as server:
        url = f"{server.url}/metrics"
        bearer = {"Authorization": "Bearer correct-horse-battery"}
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(url, headers=bearer).status_code == 200
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        token_file.chmod(0o600)
        token_file.write_text("another-horse-battery")
        assert httpx.get(url, headers=bearer).status_code == 401
        token_file.unlink()
        assert httpx.get(url, headers={"Authorization": "Bearer another-horse-battery"}).status_code == 401


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [("correct-horse-battery", 0o644, "chmod"), ("short", 0o400, "16 to 4096"), ("two words in a token", 0o400, "16")],
)
def test_unfit_token_file_is_refused(tmp_path, content, mode, words):
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(UsageError, match=words):
        read_token(path)
    with pytest.raises(UsageError, match="No such file"):
        read_token(tmp_path / "none")
    with pytest.raises(UsageError, match="regular"):
        read_token(tmp_path)


COMMAND = [sys.executable, "-c", "from lepton_ray.cli.main import main; main()", "exporter"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_command_serves_until_signalled(file_store, sent, code):
    """`--port 0` prints the port it took; SIGTERM ends with 0, Ctrl-C with 130."""
    command = [*COMMAND, "--store", file_store.uri, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = ""
        while not lines.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, "ended early"
            lines += line
        url = json.loads(lines)["url"]
        assert httpx.get(url, timeout=10).status_code == 200
        process.send_signal(sent)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, "Traceback" in errors) == (code, False)


def test_command_names_port_in_use(file_store):
    """One line on stderr, exit code 2, and how to choose another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [*COMMAND, "--store", file_store.uri, "--port", str(port)]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "LEPTON_DEBUG": ""}
        )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert f"{port}: in use" in ended.stderr
    assert "--port 0" in ended.stderr
