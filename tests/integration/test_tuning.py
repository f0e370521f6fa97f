"""A search on a real local Ray with trials of two ranks: the better setting wins, also after the driver was killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from digits_slice import fill, small_settings

from lepton_ray.cluster import connect
from lepton_ray.registry import Registry
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.storage import Store
from lepton_ray.tuning import Evaluation, Outcome, Trial, Tuning
from lepton_ray.tuning.trials import FINISHED, STOPPED

pytestmark = pytest.mark.ray

LR = "training.optimizer.learning_rate"


def search_settings(run: str, tuning: dict[str, Any], **training: Any) -> Settings:
    """A search over short trainings on the slice of the digits."""
    tree = small_settings(run, **training).model_dump(mode="json")
    return parse_settings({**tree, "tuning": {"search": "grid", "concurrent": 1, **tuning}})


def start(store: Store, settings: Settings, folder: Path) -> subprocess.Popen[bytes]:
    """`lepton-ray tune --json` in a process of its own, with a local Ray of its own."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "lepton_ray.cli", "tune", str(config), "--store", store.uri, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[bytes], what: str, limit_s: float = 200) -> None:
    """Look until it is so; the driver must live that long."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert driver.poll() is None, driver.stderr.read().decode() if driver.stderr else ""
        assert time.monotonic() < deadline, f"{what}: not within {limit_s} s"
        time.sleep(0.1)


def trial_file(store: Store, run: str, number: int) -> dict[str, Any]:
    """The journal's file of a trial; empty where there is none yet."""
    key = f"tunings/{run}/trials/t{number:03d}.json"
    return dict(json.loads(store.get(key))) if store.exists(key) else {}


@pytest.mark.timeout(600)
def test_the_better_setting_wins_though_the_driver_was_killed(file_store: Store, tmp_path: Path) -> None:
    """SIGKILL while the second of two trials trains: the first is kept, the second resumes, the best is published.

    The first trial learns nothing (a learning rate of 1e-7), so that the order cannot decide.
    """
    fill(file_store)
    space = {"space": {LR: {"grid": [1e-7, 5e-3]}}}
    settings = search_settings("killed", space, epochs=12, checkpoint={"every_steps": 10})

    driver = start(file_store, settings, tmp_path)
    try:
        wait_for(lambda: bool(file_store.list_names("runs/killed-t001/checkpoints")), driver, "second trial")
    finally:
        children = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGKILL)
        driver.communicate(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=90)
    assert not alive, "the local Ray of a killed driver must go with it"
    kept = trial_file(file_store, "killed", 0)
    assert kept["state"] == FINISHED
    assert trial_file(file_store, "killed", 1)["state"] != FINISHED

    again = start(file_store, settings, tmp_path)
    try:
        document, errors = again.communicate(timeout=250)
    finally:
        again.kill()
    assert again.returncode == 0, errors.decode()
    found = json.loads(document)
    assert found["resumed"] is True
    assert [each["state"] for each in found["trials"]] == [FINISHED, FINISHED]
    assert trial_file(file_store, "killed", 0) == kept, "a finished trial is not begun again"
    records = [json.loads(file_store.get(f"runs/killed-t{n:03d}/record.json")) for n in range(2)]
    assert [len(record["attempts"]) for record in records] == [1, 2]
    assert all(record["samples_exact"] for record in records)
    names = file_store.list_names("runs/killed-t001/ledger")
    entries = [json.loads(file_store.get(f"runs/killed-t001/ledger/{name}")) for name in names]
    assert max(entry["first_step"] for entry in entries) > 1, "resumed from its own checkpoint, not begun anew"

    assert found["best"]["trial"] == "t001"
    assert found["best"]["params"] == {LR: 5e-3}
    assert found["best"]["value"] > 0.5 > found["trials"][0]["value"]
    version = Registry(file_store).resolve("digits@champion")
    assert version.ref == found["model_version"]
    assert version.card["lineage"]["run"] == "killed-t001"
    assert version.card["metrics"]["accuracy"] == pytest.approx(found["best"]["value"])


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the tests below."""
    with connect():
        yield


@pytest.mark.usefixtures("ray_cluster")
def test_asha_stops_a_bad_trial_early(file_store: Store) -> None:
    """The second of two real trials, which learns nothing, ends after few of its epochs; its run says so."""
    from lepton_ray.cli.tune import run_trial

    fill(file_store)
    tuning = {"scheduler": "asha", "asha": {"reduction": 2}, "space": {LR: {"grid": [5e-3, 1e-7]}}}
    settings = search_settings("early", tuning, epochs=60)
    settings = settings.model_copy(
        update={"training": settings.training.model_copy(update={"evaluate_every_epochs": 2})}
    )
    found = Tuning(settings, file_store, run_trial, decides=("accuracy", "max")).run()
    assert [trial.state for trial in found.trials] == [FINISHED, STOPPED]
    assert found.trials[1].epoch < 60
    assert found.best.number == 0
    record = json.loads(file_store.get("runs/early-t001/record.json"))
    assert record["state"] == "interrupted"


@pytest.mark.usefixtures("ray_cluster")
def test_population_based_training_goes_on_from_its_best(file_store: Store) -> None:
    """Three trials, two at a time: the worst takes over the best one's run and ends better than it began.

    What a trial trains is made up here (its value grows by its rate in each epoch), what moves trials is real.
    """
    tuning = {
        "scheduler": "pbt", "pbt": {"interval_epochs": 2, "quantile": 0.34, "resample": 0.0}, "concurrent": 2,
        "space": {LR: {"grid": [0.1, 1.0, 10.0]}},
    }  # fmt: skip
    optimizer = {"schedule": {"name": "constant"}}
    settings = search_settings("pbt", tuning, epochs=4, workers=1, optimizer=optimizer)
    changes: list[Trial] = []

    def train(trial: Settings, store_uri: str, tell: Callable[[Evaluation], None]) -> Outcome:
        import time

        from lepton_ray.storage import open_store
        from lepton_ray.tuning import Evaluation, Outcome

        store, value = open_store(store_uri), 0.0
        if trial.training.initial.weights:
            value = float(store.get(f"runs/{trial.training.initial.weights.removeprefix('run:')}/value"))
        elif store.exists(f"runs/{trial.run}/value"):
            value = float(store.get(f"runs/{trial.run}/value"))
        for epoch in range(1, trial.training.epochs + 1):
            value += trial.training.optimizer.learning_rate
            store.put(f"runs/{trial.run}/value", str(value).encode())
            tell(Evaluation(epoch, {"accuracy": value}))
            time.sleep(0.2)  # an epoch of training
        return Outcome(trial.training.epochs, {"accuracy": value})

    found = Tuning(settings, file_store, train, decides=("accuracy", "max"), on_change=changes.append).run()
    assert [trial.state for trial in found.trials] == [FINISHED] * 3
    moved = [trial for trial in found.trials if len(trial.segments) > 1]
    assert moved, "nobody took over from a better one"
    for trial in moved:
        first, last = trial.segments[0], trial.segments[-1]
        assert last.donor is not None
        assert last.run.startswith(f"{trial.segments[0].run}-p")
        assert last.done_epochs >= 2
        assert last.params != first.params
        assert 0.1 <= last.params[LR] <= 10.0
