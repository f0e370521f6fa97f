"""Training on a real local Ray: the chain to a model version, and resume after real faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from digits_slice import fill, small_settings
from seaweed import SeaweedS3

from lepton_ray.cluster import connect
from lepton_ray.data.tables import open_table
from lepton_ray.errors import RefusedError, UsageError
from lepton_ray.monitoring.runs import run_goodput
from lepton_ray.registry import Registry
from lepton_ray.settings import Settings
from lepton_ray.storage import Store, open_store
from lepton_ray.tasks import Predictor
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.publication import publish
from lepton_ray.training.trainer import Trainer, TrainingResult, final_checkpoint

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray_cluster(s3: SeaweedS3) -> Iterator[None]:
    """One local Ray for the tests of this file; its workers inherit the way to the S3 server, as pods would."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        with connect():
            yield


@dataclass(frozen=True)
class Calm:
    """A run that nothing happened to."""

    store: Store
    result: TrainingResult
    weights: bytes


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """What every disturbed run must equal."""
    store = open_store(tmp_path_factory.mktemp("undisturbed").as_uri())
    fill(store)
    result = Trainer(None, small_settings("calm"), store=store).fit()
    return Calm(store, result, final_checkpoint(store, result).files["model.safetensors"])


def workers_of_this_machine() -> list[psutil.Process]:
    """Ray Train's worker processes that descend from this one (or from a driver that it started)."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_ends_as_a_model_version_that_predicts_as_evaluated(store: Store) -> None:
    """Table, DDP on two ranks, verified checkpoint, version with lineage, alias: on files and on S3."""
    fill(store)
    settings = small_settings("chain", epochs=10)
    steps: list[int] = []
    result = Trainer(None, settings, store=store, on_progress=lambda p: steps.append(p.step)).fit()
    assert result.step == -(-result.record["rows"]["train"] * 10 // 16)
    assert result.samples_exact
    assert steps == sorted(steps)
    assert steps[-1] == result.step

    version = publish(result, settings, store)
    assert version is not None
    registry = Registry(store)
    assert registry.aliases("digits") == {"champion": 1}
    lineage = version.card["lineage"]
    table = open_table(store, "digits")
    assert (lineage["run"], lineage["table"], lineage["table_version"]) == ("chain", "digits", 0)
    assert lineage["table_fingerprint"] == table.fingerprint()
    loaded = registry.load(registry.resolve("digits@champion"))
    predictor = Predictor.load(loaded.card, loaded.transforms, loaded.weights)
    from lepton_ray.data.split import split_rows

    rows = table.read()
    held_out = rows.take(split_rows(rows, settings.data.split).held_out)
    assert predictor.evaluate(held_out)["accuracy"] == pytest.approx(result.metrics["accuracy"])
    assert result.metrics["accuracy"] > 0.5

    again = Trainer(None, settings, store=store).fit()  # the same name again: done already
    assert (again.resumed, again.step, again.attempt) == (True, result.step, 1)
    republished = publish(again, settings, store)
    assert republished is not None
    assert republished.ref == version.ref


def test_every_worker_second_is_in_one_bucket(undisturbed: Calm) -> None:
    """The ledger of a real run adds up to wall time x workers, and compute is part of it."""
    record = undisturbed.result.record
    goodput = run_goodput(undisturbed.store, "calm", record)
    wall = record["finished_at"] - record["created_at"]
    assert sum(goodput.buckets.values()) == pytest.approx(2 * wall, rel=0.01)
    assert 0 < goodput.buckets["compute"] < 2 * wall
    assert goodput.ratio == pytest.approx(goodput.buckets["compute"] / (2 * wall), rel=0.01)


def test_a_killed_worker_costs_nothing_in_the_result(undisturbed: Calm, file_store: Store) -> None:
    """SIGKILL of one of two ranks: a new group resumes and the final weights are equal bit for bit."""
    fill(file_store)
    killed: list[int] = []

    def kill_once(progress: object) -> None:
        if not killed and progress.step > 60:  # type: ignore[attr-defined]
            victim = workers_of_this_machine()[-1]
            victim.send_signal(signal.SIGKILL)
            killed.append(victim.pid)

    settings = small_settings("calm", seed=0)
    result = Trainer(None, settings, store=file_store, on_progress=kill_once).fit()
    assert killed
    assert result.generations == 2
    assert result.record["failures"] == 1
    assert result.samples_exact
    assert result.metrics == undisturbed.result.metrics
    assert final_checkpoint(file_store, result).files["model.safetensors"] == undisturbed.weights


def start_driver(store: Store, settings: Settings, folder: Path) -> subprocess.Popen[bytes]:
    """`lepton-ray train` in a process of its own, with a local Ray of its own."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "lepton_ray.cli", "train", str(config), "--store", store.uri]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)


def wait_for_checkpoint(store: Store, run: str, driver: subprocess.Popen[bytes], at_least: int) -> int:
    """The newest committed step once it is `at_least`, within two minutes."""
    checkpoints = CheckpointStore(store, run, 1)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.stderr.read().decode() if driver.stderr else ""
        found = checkpoints.newest()
        if found is not None and found.step >= at_least:
            return found.step
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {at_least} within 120 s")


def test_a_killed_driver_and_a_flipped_bit_cost_nothing_in_the_result(
    undisturbed: Calm, file_store: Store, tmp_path: Path
) -> None:
    """SIGKILL of the driver, one bit of the newest checkpoint flipped: the next driver falls back and ends equal."""
    fill(file_store)
    # without hot copies, which outlive a driver too: it is the checkpoint that is damaged
    settings = small_settings("calm", checkpoint={"every_steps": 40, "hot": False})
    driver = start_driver(file_store, settings, tmp_path)
    try:
        step = wait_for_checkpoint(file_store, "calm", driver, at_least=80)
    finally:
        children = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.communicate(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=150)  # Ray's agents look for their raylet every few seconds
    assert not alive, "the local Ray of a killed driver must go with it"

    newest = CheckpointStore(file_store, "calm", 1).newest()
    assert newest is not None
    before = max(step for step in CheckpointStore(file_store, "calm", 1).steps() if step < newest.step)
    key = f"runs/calm/checkpoints/step-{newest.step:012d}/{newest.manifest['files']['model.safetensors']['path']}"
    damaged = bytearray(file_store.get(key))
    damaged[len(damaged) // 2] ^= 4
    file_store.put(key, bytes(damaged))

    result = Trainer(None, settings, store=file_store).fit()
    assert newest.step >= step
    assert result.resumed
    assert result.attempt == 2
    first_step = json.loads(file_store.get("runs/calm/ledger/g2-rank0.json"))["first_step"]
    assert first_step == before + 1, "resumed from the checkpoint before the damaged one"
    assert result.samples_exact
    assert result.metrics == undisturbed.result.metrics
    assert final_checkpoint(file_store, result).files["model.safetensors"] == undisturbed.weights


@pytest.mark.usefixtures("ray_cluster")
def test_wrong_input_is_told_before_a_worker_starts(file_store: Store) -> None:
    """Too few CPUs, a run that was started otherwise, a run that another driver holds: nothing is half done."""
    fill(file_store)
    cpus = os.cpu_count() or 1
    with pytest.raises(
        UsageError, match=rf"training.workers is {cpus + 1}: needs .* set training.workers to \d+ or less"
    ):
        Trainer(None, small_settings("greedy", workers=cpus + 1), store=file_store).fit()
    assert not file_store.exists("runs/greedy/record.json")

    settings = small_settings("short", epochs=1)
    Trainer(None, settings, store=file_store).fit()
    with pytest.raises(UsageError, match=r"training.epochs was 1, is 2"):
        Trainer(None, small_settings("short", epochs=2), store=file_store).fit()

    from lepton_ray.training.lease import RunLease

    lease = RunLease.acquire(file_store, "held", ttl_s=1.5)
    with pytest.raises(RefusedError, match="is alive"):
        Trainer(None, small_settings("held"), store=file_store).fit()
    lease.release()
