"""`lepton-ray tune` at its edges: wrong use in one line, the epoch of an evaluation, what is shown and written down."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from digits_slice import fill
from rich.console import Console

from lepton_ray.cli.tune import EvaluationWatch, TuningShow, with_checkpoints
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.storage import Store
from lepton_ray.training.progress import Progress
from lepton_ray.tuning import Evaluation, Trial
from lepton_ray.tuning.journal import Journal
from lepton_ray.tuning.journalist import Halt, Journalist, error_line
from lepton_ray.tuning.trials import FAILED, FINISHED, RUNNING, STOPPED, Segment

LR = "training.optimizer.learning_rate"


def settings(tuning: dict[str, Any] | None = None, **training: Any) -> Settings:
    section = {"trials": 2, "space": {LR: {"choice": [0.1, 0.2]}}, **(tuning or {})}
    return parse_settings({"run": "search", "training": training, "tuning": section})


def run(*words: str, folder: Path, config: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "lepton_ray.cli", "tune", str(path), *words, "--store", str(folder / "store")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("section", "words", "code", "message"),
    [
        (None, [], 2, "tuning: missing"),
        ({}, ["tuning.search=greed"], 2, "tuning.search is 'greed'"),
        ({}, ["tuning.metric=beauty"], 2, "metric 'beauty': task image_classification has"),
        ({"space": {LR: {"choice": [0.1, -2]}}}, [], 2, f"tuning.space.{LR}: {LR} is -2"),
        ({"space": {"task.options.depth": {"choice": [3]}}}, [], 2, "tuning.space.task.options.depth"),
        ({}, ["training.global_batch=1"], 2, "training.global_batch is 1"),
        ({}, ["data.table=absent"], 5, "lepton-ray data ingest SOURCE absent"),
    ],
)
def test_wrong_use_is_one_line_and_starts_nothing(
    section: dict[str, Any] | None, words: list[str], code: int, message: str, tmp_path: Path
) -> None:
    """Nothing is written but what was there: the table."""
    from lepton_ray.storage import open_store

    store = open_store(str(tmp_path / "store"))
    fill(store)
    whole = {"trials": 2, "space": {LR: {"choice": [0.1, 0.2]}}} | (section or {})
    config = {"run": "search"} | ({"tuning": whole} if section is not None else {})
    done = run(*words, folder=tmp_path, config=config)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert store.list_names("") == ["datasets"]


def progress(step: int, accuracy: float | None) -> Progress:
    evaluation = {} if accuracy is None else {"accuracy": accuracy}
    figures = {"loss": 0.5, "samples_per_second": 1.0, "evaluation": evaluation}
    return Progress(generation=1, step=step, total_steps=100, epoch=0, **figures)  # type: ignore[arg-type]


def test_an_evaluation_gets_the_epoch_that_was_complete() -> None:
    """10 epochs of 10 steps: what comes at step 34 is of epoch 3; the same again is the same; the end is epoch 10."""
    told: list[Evaluation] = []
    watch = EvaluationWatch(settings(epochs=10), told.append)
    for step, accuracy in [(5, None), (12, 0.1), (18, 0.1), (34, 0.3), (100, 0.9)]:
        watch(progress(step, accuracy))
    assert [each.epoch for each in told] == [1, 1, 3, 10]
    assert [each.metrics["accuracy"] for each in told] == [0.1, 0.1, 0.3, 0.9]


def test_an_evaluation_every_few_epochs_is_of_such_an_epoch() -> None:
    told: list[Evaluation] = []
    watch = EvaluationWatch(settings(epochs=10, evaluate_every_epochs=3), told.append)
    for step, accuracy in [(35, 0.1), (79, 0.2), (100, 0.3)]:
        watch(progress(step, accuracy))
    assert [each.epoch for each in told] == [3, 6, 10]


def test_population_based_training_has_checkpoints_between_its_looks() -> None:
    """240 of 300 rows are trained on: 15 steps of 16 in an epoch, so that 7 is twice per interval; else unchanged."""
    pbt = settings({"scheduler": "pbt"}, global_batch=16)
    assert with_checkpoints(pbt, 300).training.checkpoint.every_steps == 7
    assert with_checkpoints(pbt, 1_000_000).training.checkpoint.every_steps == 100
    assert with_checkpoints(settings(global_batch=16), 300) == settings(global_batch=16)


def trial(state: str = RUNNING) -> Trial:
    evaluations = (Evaluation(2, {"accuracy": 0.75}),)
    return Trial(3, (Segment("search-t003", {LR: 0.123456}),), state, evaluations, 0.75)


def test_trials_are_json_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with TuningShow(settings(), quiet_stdout=False) as show:
        show.update(trial())
    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["tuning"], line["trial"], line["run"]) == ("trial", "search", "t003", "search-t003")
    assert (line["state"], line["epoch"], line["value"], line["params"]) == ("running", 2, 0.75, {LR: 0.123456})


def test_trials_are_bars_on_a_terminal() -> None:
    screen = io.StringIO()
    show = TuningShow(settings(), quiet_stdout=False)
    show._console = Console(file=screen, force_terminal=True, width=100)
    with show:
        show.update(trial())
        show.update(trial(FINISHED))
    assert "t003" in screen.getvalue()
    assert "finished  0.75  learning_rate=0.1235" in screen.getvalue()


class FakeTrial:
    """What Ray Tune hands to its callbacks, as far as it is looked at."""

    def __init__(self, number: int, error: str = "") -> None:
        self.config = {"trial": 99, LR: 0.1}
        self._name, self._error = f"t{number:03d}", error

    def __str__(self) -> str:
        return self._name

    def get_error(self) -> str:
        return self._error


def test_the_journal_says_how_each_trial_ended(file_store: Store) -> None:
    """Finished by itself, stopped by its scheduler, failed; what is told again is not written again."""
    journal, changes = Journal(file_store, "search"), []
    journal.begin(settings(), metric="accuracy", direction="max", table_version=0)
    writer = Journalist(journal, "search", changes.append, halt := Halt())
    segment = json.dumps({"run": "search-t000", "params": {LR: 0.1}, "done_epochs": 0, "donor": None})
    report = {"epoch": 1, "objective": 0.5, "metrics": {"accuracy": 0.5}, "segment": segment, "again": False}
    for number in range(4):
        writer.on_trial_start(0, [], FakeTrial(number))
    writer.on_trial_result(0, [], FakeTrial(0), {**report, "finished": True})
    writer.on_trial_complete(0, [], FakeTrial(0))
    writer.on_trial_result(0, [], FakeTrial(1), {**report, "finished": False})
    writer.on_trial_result(0, [], FakeTrial(1), {**report, "again": True, "finished": False})
    writer.on_trial_complete(0, [], FakeTrial(1))
    writer.on_trial_error(0, [], FakeTrial(2, "ray::x\nlepton_ray.errors.LeptonError: run x: rank 1 failed"))
    halt.now.set()
    writer.on_trial_complete(0, [], FakeTrial(3))

    again = Journal(file_store, "search")
    again.open(settings())
    assert [each.state for each in again.in_order()] == [FINISHED, STOPPED, FAILED, RUNNING]
    assert [len(each.evaluations) for each in again.in_order()] == [1, 1, 0, 0]
    assert again.trials[2].error == "run x: rank 1 failed"
    assert again.trials[3].params == {LR: 0.1}
    assert len(changes) == 4 + 1 + 2 + 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nlepton_ray.errors.UsageError: run s: key\n", "run s: key"),
        ("ray.exceptions.ActorDiedError: The actor died", "The actor died"),
        ("KeyError: 'x'", "KeyError: 'x'"),
        ("", "no reason told"),
    ],
)
def test_a_failure_is_told_by_its_last_line(text: str, line: str) -> None:
    assert error_line(text) == line


def test_a_trial_ends_with_its_outcome_and_all_end_with_the_search() -> None:
    halt = Halt()
    assert (halt("id", {"finished": False}), halt("id", {"finished": True}), halt.stop_all()) == (False, True, False)
    halt.now.set()
    assert halt.stop_all()
