"""Evaluation: every row counts once, and the figures are the same bits however many ranks share the rows."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from digits_slice import digits_slice
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from lepton_ray.errors import UsageError
from lepton_ray.tasks import Predictor, find_task
from lepton_ray.tasks.measuring import Evaluation, Measures, TensorRows, exact_parts, joined
from lepton_ray.training.evaluation import evaluate

CPU = torch.device("cpu")


class Meeting(torch.nn.Module):
    """A model that, as a sharded one, needs all ranks in each call: a call that others do not make hangs."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(torch.zeros(1))
        return self.inner(inputs)


def digits_model(rows: int = 300) -> tuple[Any, dict[str, Any], torch.nn.Module, pa.Table]:
    """An untrained model of the digits: right now and then, so that every figure is between its bounds."""
    table = digits_slice(rows)
    task = find_task("image_classification", {"width": 4, "top_k": 3})
    transforms = task.fit(table)
    torch.manual_seed(3)
    return task, transforms, task.build(transforms), table


def evaluated_by_ranks(batches: list[int]) -> list[tuple[dict[str, float], dict[str, Any], int, bool]]:
    task, transforms, model, table = digits_model()
    rows = TensorRows(task.inputs(table, transforms), task.targets(table, transforms))
    meeting = Meeting(model).train()
    found = [evaluate(task, meeting, rows, transforms, CPU, batch=batch) for batch in batches]
    return [(each.metrics, each.tables, each.rows, model.training) for each in found]


def test_ranks_find_the_figures_of_one_process_to_the_bit() -> None:
    """Also where the last batch is short, and where one of three ranks has none; training goes on afterwards."""
    batches = [64, 256]
    task, transforms, model, table = digits_model()
    alone = [Predictor(task, transforms, model).measure(table, batch) for batch in batches]
    for found in run_ranks(evaluated_by_ranks, 3, batches):
        assert found == [(each.metrics, each.tables, 300, True) for each in alone]


def test_figures_are_what_their_definitions_say() -> None:
    """Computed anew from the outputs, with nothing but counting."""
    task, transforms, model, table = digits_model()
    predictor = Predictor(task, transforms, model)
    found = predictor.measure(table, 64)
    outputs, labels = predictor.outputs(table, 64), table["label"].to_numpy()
    guesses = outputs.argmax(1).numpy()
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (labels, guesses), 1)
    right = np.diag(matrix)
    told, true = matrix.sum(0), matrix.sum(1)
    precisions = right / np.maximum(told, 1)
    recalls = right / np.maximum(true, 1)
    harmonic = 2 * right / np.maximum(told + true, 1)
    best = outputs.topk(3).indices.numpy()
    loss = torch.nn.functional.cross_entropy(outputs.double(), torch.from_numpy(labels.astype(np.int64)))
    assert json.dumps(found.tables) == json.dumps({"confusion_matrix": matrix.tolist()}), "whole numbers, too"
    assert found.metrics == {
        "accuracy": (guesses == labels).mean(),
        "loss": pytest.approx(float(loss), rel=1e-6),
        "precision": pytest.approx(precisions.mean(), rel=1e-6),
        "recall": pytest.approx(recalls.mean(), rel=1e-6),
        "f1": pytest.approx(harmonic.mean(), rel=1e-6),
        "top_k": pytest.approx((best == labels[:, None]).any(1).mean()),
        "roc_auc": pytest.approx(np.mean([area(outputs.softmax(1)[:, i].numpy(), labels == i) for i in range(10)])),
    }
    assert 0.05 < found.metrics["accuracy"] < 0.9, "a model that is always wrong or right would prove little"


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve as the chance that a positive is above a negative (ties: half)."""
    above = scores[positive][:, None] - scores[~positive][None, :]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def test_a_class_without_rows_does_not_pull_the_area_down() -> None:
    """ROC-AUC of a class that no row has is not defined: it is left out, and not counted as 0."""
    task, transforms, model, table = digits_model()
    some = table.filter(pa.compute.less(table["label"], 4))
    predictor = Predictor(task, transforms, model)
    probabilities, labels = predictor.outputs(some).softmax(1).numpy(), some["label"].to_numpy()
    areas = [area(probabilities[:, i], labels == i) for i in range(4)]
    assert predictor.evaluate(some)["roc_auc"] == pytest.approx(np.mean(areas))
    assert "roc_auc" not in predictor.evaluate(table.filter(pa.compute.equal(table["label"], 4)))


class Sentences:
    """As much of a task as evaluation asks for: outputs and targets are row numbers of two lists of sentences."""

    name = "sentences"
    decides = ("word_error_rate", "min")

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def metrics(self, transforms: Any) -> dict[str, Any]:
        from lepton_ray.tasks.metrics import character_error_rate, word_error_rate

        return {"word_error_rate": word_error_rate(), "character_error_rate": character_error_rate()}

    def compared(self, outputs: torch.Tensor, targets: torch.Tensor, transforms: Any) -> tuple[list[str], list[str]]:
        return [transforms["heard"][i] for i in outputs], [transforms["said"][i] for i in targets]


SENTENCES = {
    "said": ["the cat sat", "on the mat", "a", "never"],
    "heard": ["the cat sat down", "in a mat", "a", "ever"],
}


@pytest.mark.parametrize("cuts", [[0, 4], [0, 1, 2, 3, 4], [0, 3, 4]])
def test_error_rates_of_text_count_over_all_rows(cuts: list[int]) -> None:
    """4 of 8 words are wrong; batches of any size, of two processes, give the rate over all and no mean of rates."""
    task, processes = Sentences(), [Measures(Sentences(), SENTENCES, CPU) for _ in range(2)]
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        rows = torch.arange(first, last)
        processes[number % 2].update(number, rows, rows)
    found = joined(task, SENTENCES, [each.state() for each in processes])
    assert found.metrics["word_error_rate"] == 0.5
    assert found.metrics["character_error_rate"] == pytest.approx(10 / 27)
    assert (found.rows, found.tables) == (4, {})
    assert next(iter(found.metrics)) == "word_error_rate", "the one that decides comes first"


class Boxes:
    """Two images with a box each: found exactly, and found beside the truth."""

    name = "boxes"
    decides = ("mean_average_precision", "max")

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def metrics(self, transforms: Any) -> dict[str, Any]:
        from lepton_ray.tasks.metrics import mean_average_precision

        return {"boxes": mean_average_precision()}

    def compared(self, outputs: torch.Tensor, targets: torch.Tensor, transforms: Any) -> tuple[list[Any], list[Any]]:
        label = torch.zeros(1, dtype=torch.int64)
        found = [{"boxes": box[None], "scores": torch.tensor([0.9]), "labels": label} for box in outputs]
        return found, [{"boxes": box[None], "labels": label} for box in targets]


def test_mean_average_precision_joins_the_images_of_all_processes() -> None:
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0], [5.0, 5.0, 9.0, 9.0]])
    guessed = torch.tensor([[0.0, 0.0, 10.0, 10.0], [60.0, 60.0, 80.0, 80.0], [5.0, 5.0, 9.0, 8.0]])
    together, shared = Measures(Boxes(), {}, CPU), [Measures(Boxes(), {}, CPU) for _ in range(3)]
    for number, rows in enumerate(([0], [1], [2])):
        shared[number].update(number, guessed[rows], truth[rows])
        together.update(number, guessed[rows], truth[rows])
    alone = joined(Boxes(), {}, [together.state()])
    assert joined(Boxes(), {}, [each.state() for each in reversed(shared)]) == alone
    assert set(alone.metrics) == {"mean_average_precision", "average_precision_50", "average_precision_75"}
    assert 0.3 < alone.metrics["average_precision_50"] < 0.7


def test_an_evaluation_of_no_rows_is_refused() -> None:
    task, transforms, model, table = digits_model(20)
    none = TensorRows(task.inputs(table, transforms)[:0], torch.empty(0, dtype=torch.int64))
    with pytest.raises(UsageError, match="there are no rows"):
        evaluate(task, model, none, transforms, CPU, distributed=False)
    with pytest.raises(UsageError, match="there are no rows"):
        Predictor(task, transforms, model).evaluate(table.slice(0, 0))


numbers = st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(values=numbers, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_a_sum_does_not_depend_on_how_it_is_cut(values: list[float], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(values)]
    parts = [part for a, b in itertools.pairwise(edges) for part in exact_parts(values[a:b])]
    assert math.fsum(parts) == math.fsum(values)


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf, 1.0], [math.inf, -math.inf], [1e308, 1e308]])
def test_a_sum_that_is_not_finite_is_told_as_such(values: list[float]) -> None:
    parts = exact_parts(values)
    assert len(parts) == 1
    assert not math.isfinite(parts[0])


def test_an_evaluation_travels_between_ranks_as_it_is() -> None:
    found = Evaluation({"accuracy": 0.1 + 0.2, "loss": math.nan}, {"confusion_matrix": [[1, 0], [2, 3]]}, 6)
    again = Evaluation.loads(found.dumps())
    assert again.metrics["accuracy"] == found.metrics["accuracy"]
    assert math.isnan(again.metrics["loss"])
    assert (again.tables, again.rows) == (found.tables, 6)
