"""`lepton-ray demo` as a user runs it: the figures it gives, and what it leaves behind when it is cut short."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus import Prometheus

from lepton_ray.monitoring.http_server import ExporterServer
from lepton_ray.monitoring.panels import DASHBOARDS
from lepton_ray.registry import Registry
from lepton_ray.storage import Store, open_store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
COMMAND = [sys.executable, "-m", "lepton_ray.cli", "demo"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a temporary folder of the test's own, so that what is left in them can be seen."""
    made = tmp_path / "home"
    made.mkdir()
    monkeypatch.setenv("LEPTON_CACHE", os.environ.get("LEPTON_CACHE") or str(Path.home() / ".cache" / "lepton-ray"))
    monkeypatch.setenv("HOME", str(made))
    for name in ("RAY_ADDRESS", "LEPTON_STORE"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary folder: Ray's sockets lie under it."""
    with tempfile.TemporaryDirectory(prefix="ld", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def assert_nothing_is_left(home: Path, temporary: Path, started: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    assert list(temporary.iterdir()) == []
    assert [path.name for path in home.iterdir() if path.name not in (".cache", ".config")] == []


def assert_panels_had_data(prometheus: Prometheus) -> None:
    """Every expression of every dashboard gave something at some time of the run that was scraped."""
    empty = [
        f"{dashboard.title}, {panel.title}: {figure.expression}"
        for dashboard in DASHBOARDS for row in dashboard.rows for panel in row.panels for figure in panel.figures
        if not prometheus.query(f"count_over_time(({re.sub('[$](run|endpoint)', '.*', figure.expression)})[10m:1s])")
    ]  # fmt: skip
    assert empty == []


def test_the_main_job_serves_what_it_trained(home: Path, temporary: Path, tmp_path: Path) -> None:
    """One JSON document on stdout with every figure; every served answer equal to offline; nothing left running."""
    store = tmp_path / "store"
    store.mkdir()
    exporter = ExporterServer(open_store(store.as_uri()), every_s=0.5).start()
    try:
        with Prometheus(tmp_path, {"exporter": exporter.url.removeprefix("http://")}) as prometheus:
            done = subprocess.run(
                [*COMMAND, "--json", "--epochs", "4", "--store", str(store)],
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
            assert_panels_had_data(prometheus)
    finally:
        exporter.close()
    figures = json.loads(done.stdout)
    assert figures["data"]["rows_written"] == 5000
    assert figures["training"]["rows"] == {"train": 4000, "held_out": 1000}
    assert figures["training"]["samples_exact"] is True
    requests = figures["requests"]
    assert (requests["requests"], requests["equal_to_offline"]) == (1000, 1000)
    assert requests["accuracy"] == pytest.approx(figures["training"]["metrics"]["accuracy"])
    assert requests["accuracy"] > 0.93  # after 4 epochs; the 12 of the demo itself are measured in the README
    assert requests["latency_p50_ms"] <= requests["latency_p99_ms"]
    metrics = figures["metrics"]
    assert metrics["steps_total"] == figures["training"]["steps"] == 250
    assert metrics["samples_total"] == 16000
    assert metrics["requests_total"] == 1000
    assert 0 < metrics["goodput_ratio"] < 1
    assert Registry(open_store(str(store))).resolve("digits@champion").ref == figures["model"]["version"]
    assert Path(figures["report"].removeprefix("file://")).stat().st_size > 10_000
    assert_nothing_is_left(home, temporary, [])


@pytest.mark.s3
def test_the_main_job_runs_on_s3(home: Path, temporary: Path, s3_store: Store) -> None:
    """The whole chain with the store in a bucket: table, checkpoints, version, endpoint, metrics and report."""
    done = subprocess.run(
        [*COMMAND, "--json", "--epochs", "1", "--store", s3_store.uri],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout)
    assert figures["requests"]["equal_to_offline"] == 1000
    assert figures["metrics"]["requests_total"] == 1000
    run = figures["training"]["run"]
    assert s3_store.exists(f"runs/{run}/report.html")
    assert s3_store.exists("models/digits/versions/1/manifest.json")
    assert_nothing_is_left(home, temporary, [])


@pytest.mark.parametrize("at", ["ray", "training", "deploy", "requests"])
def test_ctrl_c_ends_everything_at_any_point(at: str, home: Path, temporary: Path, tmp_path: Path) -> None:
    """Ctrl-C in each of the long steps: exit code 130, one line, no process, no folder."""
    process = subprocess.Popen(
        [*COMMAND, "--epochs", "2", "--store", str(tmp_path / "store")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip() == at:
                break
        time.sleep(1.5)  # into the step; there is no event for its middle
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1:] == ["interrupted"]
    assert "Traceback" not in errors
    assert_nothing_is_left(home, temporary, started)


def test_wrong_input_is_one_line_and_exit_code_two(home: Path, temporary: Path, tmp_path: Path) -> None:
    """A port in use, too few CPUs, a store that cannot be written: told at once, nothing written."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        (tmp_path / "file").write_text("not a folder")
        cases = {
            ("--port", port): f"port {port} of 127.0.0.1 is in use",
            ("--exporter-port", port): f"port {port} of 127.0.0.1 is in use",
            ("--workers", str((os.cpu_count() or 1) + 1)): "training.workers is",
            ("--workers", "0"): "--workers",
            ("--store", str(tmp_path / "file" / "store")): "store",
            ("--stor", "x"): "No such option",
        }
        for options, words in cases.items():
            store = tmp_path / "store"
            where = () if "--store" in options else ("--store", str(store))
            done = subprocess.run(
                [*COMMAND, *options, *where], capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 2, (options, done.stderr)
            assert words in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
            assert not store.exists() or not list(store.rglob("[!.]*.json"))
    assert_nothing_is_left(home, temporary, [])
