"""Tabular tasks: real rows with missing values to classes and numbers, and requests that become the same inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import torch
from cars import cars
from served_model import served

from lepton_ray.data.split import split_rows
from lepton_ray.errors import UsageError
from lepton_ray.settings import SplitSettings
from lepton_ray.tasks import AnyTask, Predictor, find_task
from lepton_ray.tasks.tabular import TabularRequest

TASKS = {"mileage": "tabular_regression", "origin": "tabular_classification"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make these tiny models slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learnt(label: str, steps: int = 300, **options: Any) -> tuple[AnyTask, dict[str, Any], pa.Table, Predictor]:
    """The task fitted to four fifths of the cars and trained on them, and the other cars."""
    rows = cars(label)
    split = split_rows(rows, SplitSettings())
    train, held_out = rows.take(pa.array(split.train)), rows.take(pa.array(split.held_out))
    task = find_task(TASKS[label], options)
    transforms = json.loads(json.dumps(task.fit(train)))  # as a model version keeps it
    torch.manual_seed(0)
    model = task.build(transforms)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, targets = task.inputs(train, transforms), task.targets(train, transforms)
    for _ in range(steps):
        optimizer.zero_grad()
        task.losses(model(inputs), targets, label_smoothing=0.0).mean().backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    return task, transforms, held_out, Predictor(task, transforms, model)


def test_mileage_is_predicted_in_miles_per_gallon() -> None:
    _, transforms, held_out, predictor = learnt("mileage")
    found = predictor.evaluate(held_out)
    assert found["rmse"] < 4.0, "always saying the mean is off by about 7.8"
    assert found["mae"] < found["rmse"]
    assert transforms["columns"]["horsepower"] == "integer"
    assert "horsepower_missing" in transforms["numbers"], "missing values are told to the model"
    assert transforms["categories"] == {"origin": 4}, "three origins, and one number for all others"


def test_origin_is_classified() -> None:
    _, transforms, held_out, predictor = learnt("origin")
    found = predictor.evaluate(held_out)
    assert found["accuracy"] > 0.75, "the most frequent origin is that of 62% of the cars"
    assert transforms["labels"] == ["Europe", "Japan", "USA"]


@pytest.mark.parametrize("label", TASKS)
def test_a_request_becomes_the_inputs_of_its_row_bit_for_bit(label: str) -> None:
    """Missing values, too: a served request runs the transforms that training ran."""
    task, transforms, held_out, _ = learnt(label, steps=1)
    requests = [TabularRequest(row={name: row[name] for name in transforms["columns"]}) for row in held_out.to_pylist()]
    offline = task.inputs(held_out, transforms)
    assert torch.equal(task.inputs(task.rows_of(requests, transforms), transforms), offline)
    for place, request in enumerate(requests[:20]):
        assert torch.equal(task.inputs(task.rows_of([request], transforms), transforms)[0], offline[place])


def test_an_endpoint_answers_rows_as_offline() -> None:
    _, transforms, held_out, predictor = learnt("origin", steps=20)
    rows = [{name: row[name] for name in transforms["columns"]} for row in held_out.slice(0, 5).to_pylist()]
    rows[0]["horsepower"] = None
    expected = predictor.predict([TabularRequest(row=row) for row in rows])
    with served(predictor) as endpoint:
        for row, answer in zip(rows, expected, strict=True):
            got = endpoint.post(json={"row": row})
            assert got.status_code == 200, got.text
            assert got.json()["label"] == answer.model_dump()["label"]
        wrong = endpoint.post(json={"row": {**rows[0], "horsepower": "fast"}})
        assert wrong.status_code in (400, 422)
        assert "'horsepower' of item 0 is 'fast': expected integer, or null" in wrong.json()["detail"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"year": 1.5}, "'year' of item 0 is 1.5: expected integer, or null"),
        ({"year": True}, "'year' of item 0 is True: expected integer"),
        ({"origin": 3}, "'origin' of item 0 is 3: expected text"),
        ({"wings": 2}, "row of item 0 has unknown 'wings'"),
        ({"year": 2**70}, "expected integer of 64 bits"),
    ],
)
def test_a_request_that_does_not_fit_is_told(change: dict[str, Any], says: str) -> None:
    task = find_task("tabular_regression")
    transforms = task.fit(cars())
    row = {**task.example(transforms).row, **change}
    with pytest.raises(UsageError) as told:
        task.rows_of([TabularRequest(row=row)], transforms)
    assert says in str(told.value)


def test_the_steps_can_be_said() -> None:
    told = [
        {"impute": {"columns": ["horsepower"], "fill": "mean"}},
        {"robust": {"columns": ["horsepower", "weight"]}},
        {"one_hot": {"columns": ["origin"]}},
    ]
    options = {"columns": ["horsepower", "weight", "origin"], "transforms": told}
    _, transforms, held_out, predictor = learnt("mileage", **options)
    assert transforms["width"] == 5
    assert transforms["categories"] == {}
    assert predictor.evaluate(held_out)["rmse"] < 5.5


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("tabular_regression", {"x": [1.0], "label": ["a"]}, "use task tabular_classification for classes"),
        ("tabular_regression", {"x": [1.0, 2.0], "label": [1.0, None]}, "label of row 1 is None"),
        ("tabular_classification", {"x": [1.0], "label": [0.5]}, "use task tabular_regression for numbers"),
        ("tabular_classification", {"x": [1.0, 2.0], "label": [1, 1]}, "label has 1 different values"),
        ("tabular_classification", {"x": [b"a", b"b"], "label": [1, 0]}, "expected numbers, text or bool"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_told(name: str, rows: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as told:
        find_task(name).fit(pa.table(rows))
    assert says in str(told.value)
