"""What rank 0 notes of a run reaches the store beside training, and never holds training up."""

from __future__ import annotations

import io
import json
import math
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lepton_ray.errors import UnavailableError, UsageError
from lepton_ray.monitoring.history import read_evaluations, read_history
from lepton_ray.settings.training import LoggingSettings
from lepton_ray.storage import Store, open_store
from lepton_ray.training.history import PARTS, History
from lepton_ray.training.tensorboard import check_tensorboard

FIGURES = {"loss": 0.5, "learning_rate": 1e-3, "gradient_norm": 2.0, "samples_per_second": 800.0}
SECONDS = {name: (number + 1) / 1000 for number, name in enumerate(PARTS)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path.as_uri())


def test_every_figure_of_an_interval_is_read_back_for_the_report(store: Store) -> None:
    """All parts of the step included; a figure that an interval lacks is absent, not zero."""
    history = History(store, "digits", 1)
    history.note(10, 0, {**SECONDS, "samples_per_second": 1.0})
    history.note(20, 1, {**FIGURES, **SECONDS})
    assert history.close()
    found = read_history(store, "digits")
    assert found["step"] == [10, 20]
    assert math.isnan(found["loss"][0])
    for name, value in {**FIGURES, **SECONDS}.items():
        assert found[name][1] == value, name


def test_what_was_written_stays_when_more_comes(store: Store) -> None:
    """The file holds the whole generation each time, and each interval once."""
    history = History(store, "digits", 2)
    for step in range(1, 6):
        history.note(step, 0, {"loss": 1 / step})
        history.write()
    assert history.close()
    rows = pq.read_table(io.BytesIO(store.get("runs/digits/metrics/history-g2.parquet")))
    assert rows["step"].to_pylist() == [1, 2, 3, 4, 5]


def test_evaluations_are_plain_json_and_keep_the_newest_table(store: Store) -> None:
    """A loss that is not a number is null there: other readers of JSON have no NaN."""
    history = History(store, "digits", 1)
    history.evaluated(10, 1, {"accuracy": 0.5, "loss": math.nan}, {"confusion_matrix": [[1, 2], [3, 4]]})
    history.evaluated(20, 2, {"accuracy": 0.75, "loss": 0.2}, {"confusion_matrix": [[5, 0], [0, 5]]})
    assert history.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    entries = json.loads(store.get("runs/digits/metrics/evaluations-g1.json"), parse_constant=refuse)
    assert entries[0]["metrics"] == {"accuracy": 0.5, "loss": None}
    assert "tables" not in entries[0]
    assert entries[1]["tables"] == {"confusion_matrix": [[5, 0], [0, 5]]}
    assert [each["metrics"] for each in read_evaluations(store, "digits")] == [
        {"accuracy": 0.5},
        {"accuracy": 0.75, "loss": 0.2},
    ]


class HangingStore:
    """A store whose writes wait until they are let go, and fail."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()

    def put(self, key: str, data: bytes) -> None:
        self.entered.set()
        self.let_go.wait(60)
        raise UnavailableError("storage is away; try again later")


def test_a_store_that_hangs_does_not_hold_training_up(caplog: pytest.LogCaptureFixture) -> None:
    """Noting and writing go on while the first write hangs; the end waits as long as it says; one line is logged."""
    store: Any = HangingStore()
    history = History(store, "digits", 1)
    history.note(1, 0, FIGURES)
    history.write()
    assert store.entered.wait(30)
    for step in range(2, 50):
        history.note(step, 0, FIGURES)
        history.write()
    assert not history.close(timeout_s=0.05)
    store.let_go.set()
    assert history._thread is not None
    history._thread.join(30)
    assert not history._thread.is_alive()
    assert [record.getMessage() for record in caplog.records] == [
        "history: storage is away; try again later; tried again with the next write, not told again"
    ]


def test_a_run_that_notes_nothing_writes_nothing(store: Store) -> None:
    """Only rank 0 notes; the others' histories leave no file and no thread."""
    assert History(store, "digits", 1).close()
    assert store.list_names("runs") == []


def test_tensorboard_shows_what_the_history_has(store: Store, tmp_path: Path) -> None:
    """Read back by TensorBoard's own reader, which sees later writes of the same file too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = History(store, "digits", 3, tensorboard=True)
    history.note(10, 0, {**FIGURES, **SECONDS})
    history.evaluated(10, 0, {"accuracy": 0.5, "loss": math.nan})
    history._write()
    reader = EventAccumulator(str(tmp_path / "runs/digits/tensorboard/g3"))
    reader.Reload()
    assert set(reader.Tags()["scalars"]) == {
        *(f"train/{name}" for name in FIGURES),
        *(f"seconds_per_step/{name}" for name in PARTS),
        "evaluation/accuracy",
    }
    history.note(20, 1, {"loss": 0.25})
    history.evaluated(20, 1, {"accuracy": 0.75})
    assert history.close()
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("train/loss")] == [(10, 0.5), (20, 0.25)]
    assert [(event.step, event.value) for event in reader.Scalars("evaluation/accuracy")] == [(10, 0.5), (20, 0.75)]
    assert history._tensorboard is not None
    assert not Path(str(history._tensorboard._folder)).exists(), "the temporary folder is gone"


def test_tensorboard_that_fails_leaves_the_history_whole(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    history = History(store, "digits", 4, tensorboard=True)
    history.note(10, 0, {"loss": 1.0})
    assert history._tensorboard is not None
    history._tensorboard._writer = object()
    history.write()
    history.evaluated(10, 0, {"accuracy": 0.5})
    assert history.close()
    assert read_history(store, "digits")["step"] == [10]
    assert len([record for record in caplog.records if "no more is written" in record.getMessage()]) == 1


def test_event_files_without_tensorboard_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_tensorboard(LoggingSettings(tensorboard=False))
    with pytest.raises(UsageError, match=r"pip install 'lepton-ray\[tensorboard\]'"):
        check_tensorboard(LoggingSettings(tensorboard=True))
