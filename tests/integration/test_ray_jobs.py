"""`ray job submit` against a cluster that `ray start --head` made, with token authentication on."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from seaweed import SeaweedS3

from lepton_ray.registry import Registry
from lepton_ray.serving.ports import free_port
from lepton_ray.storage import Store
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.record import RunRecord

pytestmark = [pytest.mark.ray, pytest.mark.s3]
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A running head node."""

    dashboard: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(s3: SeaweedS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head --block` with a token of its own, in a process group that is ended afterwards."""
    folder = tmp_path_factory.mktemp("h")  # short: Ray keeps Unix sockets under it
    token = folder / "token"
    token.touch(mode=0o400)
    token.chmod(0o600)
    token.write_text(secrets.token_hex(32))
    port, client_port, agent_port = (free_port("127.0.0.1") for _ in range(3))
    environment = {
        **os.environ, **s3.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    # as in an activated environment: `python` of the job's entry point is the one that Ray runs in
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    dashboard = f"http://127.0.0.1:{port}"
    command = [
        RAY, "start", "--head", "--block", "--port=0", "--node-ip-address=127.0.0.1", f"--dashboard-port={port}",
        f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}", "--num-cpus=2",
        "--object-store-memory=150000000", f"--temp-dir={folder}", "--disable-usage-stats",
    ]  # fmt: skip
    log = (folder / "head.log").open("wb")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        headers = {"Authorization": f"Bearer {token.read_text()}"}
        transport = httpx.HTTPTransport(retries=0)
        with httpx.Client(transport=transport, headers=headers, timeout=5) as client:
            for _ in range(240):
                assert process.poll() is None, (folder / "head.log").read_text()
                try:
                    if client.get(f"{dashboard}/api/jobs/").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.5)
            else:
                raise AssertionError((folder / "head.log").read_text())
        yield Head(dashboard, environment)
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        _, left = psutil.wait_procs(started, timeout=15)
        for child in left:
            child.kill()
        log.close()


def ray_job(head: Head, *words: str, limit_s: float = 240) -> str:
    """`ray job ...`; what it prints."""
    command = [RAY, "job", words[0], "--address", head.dashboard, *words[1:]]
    done = subprocess.run(
        command, env=head.environment, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def submit(head: Head, store: Store, *overrides: str, options: tuple[str, ...] = ()) -> str:
    """Submit the shipped job with the shipped config."""
    environment = json.dumps({"env_vars": {"LEPTON_STORE": store.uri}})
    job = ["python", "jobs/train.py", "--json", "jobs/configs/digits.yaml", *overrides]
    return ray_job(head, "submit", "--working-dir", ".", "--runtime-env-json", environment, *options, "--", *job)


def orchestrate_once(head: Head, store: Store) -> list[dict[str, Any]]:
    """What an orchestrator does about the runs of a store, in one look."""
    command = [
        sys.executable, "-m", "lepton_ray.cli", "orchestrate", "--once", "--json", "--every", "0.5",
        "--store", store.uri, "--address", head.dashboard, "--working-dir", str(ROOT),
    ]  # fmt: skip
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    events: list[dict[str, Any]] = json.loads(done.stdout)["events"]
    return events


def result_in(output: str) -> dict[str, Any]:
    """The JSON document that a job printed at its end."""
    assert "succeeded" in output
    found: dict[str, Any] = json.JSONDecoder().raw_decode(output[output.index('{\n  "run"') :])[0]
    return found


@pytest.mark.timeout(600)
def test_a_submitted_job_trains_on_s3(head: Head, s3_store: Store) -> None:
    """The shipped command on the shipped config, two epochs: table, run, version and alias lie in the bucket."""
    found = result_in(submit(head, s3_store, "training.epochs=2", "task.options.width=4"))
    assert found["resumed"] is False
    assert found["samples_exact"] is True
    assert found["step"] == 125
    record = RunRecord.open(s3_store, "digits").fields
    assert (record["state"], record["model_version"]) == ("finished", "digits:1")
    assert Registry(s3_store).aliases("digits") == {"champion": 1}


@pytest.mark.timeout(600)
def test_a_job_that_was_stopped_resumes_when_submitted_again(head: Head, file_store: Store) -> None:
    """`ray job stop` in the middle of training; the same run name continues from its newest checkpoint."""
    small = ["run=stopped", "training.epochs=40", "task.options.width=4", "training.checkpoint.every_steps=20"]
    submit(head, file_store, *small, options=("--submission-id", "first", "--no-wait"))
    checkpoints = CheckpointStore(file_store, "stopped", 1)
    deadline = time.monotonic() + 120
    while (found := checkpoints.newest()) is None or found.step < 100:
        assert time.monotonic() < deadline, ray_job(head, "logs", "first")[-3000:]
        time.sleep(0.2)
    ray_job(head, "stop", "first")
    stopped_at = checkpoints.newest()
    assert stopped_at is not None
    assert RunRecord.open(file_store, "stopped").fields["state"] != "finished"
    assert [event["event"] for event in orchestrate_once(head, file_store)] == ["left"]

    again = result_in(submit(head, file_store, *small))
    assert (again["resumed"], again["attempt"], again["step"]) == (True, 2, 2500)
    assert again["samples_exact"] is True
    entry = json.loads(file_store.get("runs/stopped/ledger/g2-rank0.json"))
    assert entry["first_step"] > stopped_at.step


@pytest.mark.timeout(600)
def test_a_job_whose_driver_was_killed_is_submitted_again(head: Head, file_store: Store) -> None:
    """SIGKILL of the driver: the next look of an orchestrator makes the job `lost-2`, which ends what was begun."""
    small = ["run=lost", "training.epochs=20", "task.options.width=4", "training.checkpoint.every_steps=20"]
    submit(head, file_store, *small, options=("--submission-id", "lost-1", "--no-wait"))
    checkpoints = CheckpointStore(file_store, "lost", 1)
    deadline = time.monotonic() + 120
    while (found := checkpoints.newest()) is None or found.step < 100:
        assert time.monotonic() < deadline, ray_job(head, "logs", "lost-1")[-3000:]
        time.sleep(0.2)
    driver = RunRecord.open(file_store, "lost").fields["attempts"][0]
    assert driver["job"] == "lost-1"
    psutil.Process(int(driver["driver"].rpartition(":")[2])).kill()

    resumed = [event for event in orchestrate_once(head, file_store) if event["event"] == "resumed"]
    assert [(event["run"], event["attempt"], event["name"]) for event in resumed] == [("lost", 2, "lost-2")]
    output = ray_job(head, "logs", "lost-2", "--follow")
    record = RunRecord.open(file_store, "lost").fields
    assert record["state"] == "finished", output[-3000:]
    assert ([each["job"] for each in record["attempts"]], record["step"]) == (["lost-1", "lost-2"], 1250)
    assert record["samples_exact"] is True
    assert orchestrate_once(head, file_store) == []


def test_without_the_token_nothing_runs(head: Head) -> None:
    """The dashboard refuses a job of somebody who has no token, and one with a wrong token."""
    body = {"entrypoint": "id"}
    assert httpx.post(f"{head.dashboard}/api/jobs/", json=body, timeout=30).status_code == 401
    wrong = {"Authorization": f"Bearer {secrets.token_hex(32)}"}
    assert httpx.post(f"{head.dashboard}/api/jobs/", json=body, headers=wrong, timeout=30).status_code == 403
