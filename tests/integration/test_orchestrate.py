"""Runs that lost their driver go on by themselves, and those that were ended do not; with real processes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from digits_slice import fill, small_settings

from lepton_ray.registry import Registry
from lepton_ray.settings import Settings
from lepton_ray.storage import Store, open_store
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.record import RunRecord
from lepton_ray.training.trainer import Trainer, final_checkpoint

pytestmark = pytest.mark.ray
LIMIT_S = 150.0


def command(*words: str, store: Store) -> list[str]:
    return [sys.executable, "-m", "lepton_ray.cli", *words, "--store", store.uri]


@contextlib.contextmanager
def training(store: Store, settings: Settings, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`lepton-ray train` in a process of its own, with a local Ray of its own, past its 80th step."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    words = command("train", str(config), store=store)
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)
    try:
        checkpoints = CheckpointStore(store, settings.run, 1)
        deadline = time.monotonic() + LIMIT_S
        while max(checkpoints.steps(), default=0) < 80:
            assert driver.poll() is None, driver.stderr.read().decode() if driver.stderr else ""
            assert time.monotonic() < deadline, "no checkpoint of step 80"
            time.sleep(0.05)
        yield driver
    finally:
        kill_all(driver)


def kill_all(driver: subprocess.Popen[bytes]) -> None:
    """SIGKILL of a process and all that descend from it, as when the machine is gone."""
    if driver.poll() is None:
        family = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)
    driver.communicate(timeout=30)


@contextlib.contextmanager
def orchestrator(store: Store) -> Iterator[subprocess.Popen[str]]:
    """`lepton-ray orchestrate`, ended by SIGTERM; what it started is killed if it is still there."""
    words = command("orchestrate", "--every", "0.5", store=store)
    # what it starts writes to its stderr; nobody reads that here
    service = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield service
    finally:
        started = psutil.Process(service.pid).children(recursive=True) if service.poll() is None else []
        service.terminate()
        try:
            service.wait(30)
        finally:
            service.kill()
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(started, timeout=30)


def events(service: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Each line that a service wrote, after its end."""
    assert service.stdout is not None
    return [json.loads(line) for line in service.stdout.read().splitlines()]


def wait_for_children(*services: subprocess.Popen[str]) -> None:
    """The drivers that services started have ended, as they do once their run has."""
    deadline = time.monotonic() + 60
    for service in services:
        while [each for each in psutil.Process(service.pid).children() if each.status() != psutil.STATUS_ZOMBIE]:
            assert time.monotonic() < deadline, "a driver goes on after its run has finished"
            time.sleep(0.1)


@pytest.mark.timeout(600)
def test_a_run_whose_machine_was_lost_goes_on_once(
    file_store: Store, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SIGKILL of driver, Ray and ranks; of two orchestrators one starts a driver, and the result is as undisturbed."""
    calm = open_store(tmp_path_factory.mktemp("calm").as_uri())
    fill(calm)
    undisturbed = Trainer(None, small_settings("calm"), store=calm).fit()

    fill(file_store)
    with training(file_store, small_settings("calm"), tmp_path) as driver:
        kill_all(driver)
    record = RunRecord.open(file_store, "calm").fields
    assert (record["state"], record["wanted"]) == ("running", True)

    with orchestrator(file_store) as one, orchestrator(file_store) as other:
        deadline = time.monotonic() + LIMIT_S
        while not (record := RunRecord.open(file_store, "calm").fields).get("model_version"):
            assert (one.poll(), other.poll()) == (None, None)
            assert time.monotonic() < deadline, record
            time.sleep(0.1)
        wait_for_children(one, other)
    assert (one.returncode, other.returncode) == (0, 0)
    said = [*events(one), *events(other)]
    resumed = [(event["run"], event["attempt"], event["name"]) for event in said if event["event"] == "resumed"]
    assert resumed == [("calm", 2, "calm-2")]
    assert [event["event"] for event in said].count("ended") == 2

    assert [each["outcome"] for each in record["attempts"]] == ["lost", "finished"]
    assert record["samples_exact"] is True
    result = Trainer(None, small_settings("calm"), store=file_store).fit()  # has finished: this only reads it
    assert result.metrics == undisturbed.metrics
    weights = [
        final_checkpoint(store, each).files["model.safetensors"]
        for store, each in ((file_store, result), (calm, undisturbed))
    ]
    assert weights[0] == weights[1]
    assert Registry(file_store).aliases("digits") == {"champion": 1}


@pytest.mark.timeout(600)
def test_a_run_that_was_interrupted_waits_for_its_user(file_store: Store, tmp_path: Path) -> None:
    """Ctrl-C means it: orchestrators leave the run, and `lepton-ray train --run` goes on with it."""
    fill(file_store)
    with training(file_store, small_settings("calm"), tmp_path) as driver:
        driver.send_signal(signal.SIGINT)
        driver.communicate(timeout=60)
        assert driver.returncode == 130
    record = RunRecord.open(file_store, "calm").fields
    assert (record["state"], record["wanted"]) == ("interrupted", False)

    words = command("orchestrate", "--once", "--json", "--every", "0.5", store=file_store)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    looked = json.loads(done.stdout)
    assert [(event["event"], event["run"]) for event in looked["events"]] == [("left", "calm")]
    assert len(RunRecord.open(file_store, "calm").fields["attempts"]) == 1
    assert file_store.list("runs/calm/resumptions") == []

    words = command("train", "--run", "calm", "--json", store=file_store)
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert (result["run"], result["attempt"], result["resumed"]) == ("calm", 2, True)
    assert result["samples_exact"] is True


def test_a_lost_controller_is_no_failure_of_the_run(file_store: Store, tmp_path: Path) -> None:
    """Ray Train's controller is killed: the driver ends with exit code 6, and the run is one that may be resumed."""
    fill(file_store)
    with training(file_store, small_settings("calm"), tmp_path) as driver:
        family = psutil.Process(driver.pid).children(recursive=True)
        (controller,) = [each for each in family if "RunController" in " ".join(each.cmdline())]
        controller.kill()
        _, words = driver.communicate(timeout=90)
        assert driver.returncode == 6, words.decode()
    assert b"run calm: Ray Train's controller failed: " in words
    record = RunRecord.open(file_store, "calm").fields
    assert (record["state"], record["wanted"]) == ("interrupted", True)
    assert "controller failed" in record["error"]
