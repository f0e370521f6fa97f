"""`lepton-ray evaluate`: the right rows, the figures of training, stored once beside the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from digits_slice import digits_slice
from safetensors.torch import save

from lepton_ray.cli.evaluate import evaluate
from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.errors import LeptonError, NotFoundError, UsageError
from lepton_ray.registry import Registry
from lepton_ray.registry.evaluations import evaluations_of
from lepton_ray.settings.tree import SplitSettings
from lepton_ray.storage import Store
from lepton_ray.tasks import Predictor, find_task

OPTIONS = {"width": 4}


def publish(store: Store, **split: Any) -> Predictor:
    """`digits:1` in the store, as its run of `digits@0` would have published it, split as told."""
    ingest(store, "digits", digits_slice(200))
    table = open_table(store, "digits")
    rows = table.read()
    train = rows.take(split_rows(rows, SplitSettings(**split)).train)
    task = find_task("image_classification", OPTIONS)
    transforms = task.fit(train)
    torch.manual_seed(0)
    predictor = Predictor(task, transforms, task.build(transforms))
    lineage = {"run": "first", "table": "digits", "table_version": table.version}
    store.put("runs/first/spec.yaml", yaml.safe_dump({"run": "first", "data": {"split": split}}).encode())
    Registry(store).publish(
        "digits",
        weights=save(predictor.model.state_dict()),
        card={"task": {"name": task.name, "options": OPTIONS}, "lineage": lineage},
        transforms=transforms,
    )
    return predictor


def run(store: Store, *arguments: str) -> str:
    result = CliRunner().invoke(evaluate, [*arguments, "--store", store.uri], standalone_mode=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(store: Store, *arguments: str) -> Any:
    return json.loads(run(store, *arguments, "--json"), parse_constant=pytest.fail)


def test_a_model_is_measured_on_the_rows_that_its_run_held_out(file_store: Store) -> None:
    """Figures are those of the predictor, table included; none of the rows was learnt from."""
    predictor = publish(file_store, by="stratified", held_out=0.3)
    rows = open_table(file_store, "digits").read()
    held_out = rows.take(split_rows(rows, SplitSettings(by="stratified", held_out=0.3)).held_out)
    expected = predictor.measure(held_out)
    found = run_json(file_store, "digits", "digits")
    assert (found["model"], found["table"], found["split"]) == ("digits:1", "digits@0", "held_out")
    assert (found["rows"], found["rows_trained_on"]) == (held_out.num_rows, 0)
    assert found["metrics"] == expected.metrics
    assert found["tables"] == expected.tables
    assert sum(map(sum, found["tables"]["confusion_matrix"])) == held_out.num_rows


def test_an_evaluation_is_stored_once_and_never_overwritten(file_store: Store) -> None:
    publish(file_store)
    first, again = run_json(file_store, "digits:1", "digits"), run_json(file_store, "digits", "digits@0")
    assert (first["new"], again["new"]) == (True, False)
    assert first["stored"] == again["stored"]
    assert first["stored"].startswith(f"{file_store.uri}/models/digits/evaluations/1/digits-v0-held_out-")
    stored = evaluations_of(file_store, Registry(file_store).resolve("digits"))
    assert [each["metrics"] for each in stored] == [first["metrics"]]
    assert stored[0]["digest"] == first["digest"]
    run_json(file_store, "digits", "digits", "--split", "all")
    assert len(evaluations_of(file_store, Registry(file_store).resolve("digits"))) == 2


@pytest.mark.parametrize(("by", "moves"), [("hash", False), ("stratified", True)])
def test_rows_that_the_model_knows_are_counted_when_the_table_grew(file_store: Store, by: str, moves: bool) -> None:
    """By hash no row changes sides; a stratified split moves some, and that is told."""
    publish(file_store, by=by)
    ingest(file_store, "digits", digits_slice(400), mode="append")
    found = run_json(file_store, "digits", "digits@1")
    assert found["split"] == "held_out"
    assert (found["rows_trained_on"] > 0) is moves
    words = run(file_store, "digits", "digits@1")
    assert ("the model was trained on" in words) is moves


def test_each_side_can_be_asked_for(file_store: Store) -> None:
    publish(file_store)
    sides = {side: run_json(file_store, "digits", "digits", "--split", side) for side in ("train", "held_out", "all")}
    assert sides["all"]["rows"] == sides["train"]["rows"] + sides["held_out"]["rows"] == 200
    assert sides["all"]["rows_trained_on"] == sides["train"]["rows_trained_on"] == sides["train"]["rows"]
    words = run(file_store, "digits", "digits", "--split", "all")
    assert f"the model was trained on {sides['train']['rows']} of these rows" in words


def test_another_table_is_taken_as_a_whole(file_store: Store) -> None:
    publish(file_store)
    ingest(file_store, "others", digits_slice(150))
    found = run_json(file_store, "digits", "others")
    assert (found["split"], found["rows"], found["rows_trained_on"]) == ("all", 150, None)
    assert "is not known" in run(file_store, "digits", "others")


def test_without_the_run_a_side_is_refused_and_the_whole_is_not(file_store: Store) -> None:
    publish(file_store)
    file_store.delete("runs/first/spec.yaml")
    assert run_json(file_store, "digits", "digits")["split"] == "all"
    with pytest.raises(UsageError, match="the settings of its run first are gone; use --split all"):
        run(file_store, "digits", "digits", "--split", "held_out")


def test_words_show_metrics_and_confusion(file_store: Store) -> None:
    publish(file_store)
    words = run(file_store, "digits", "digits")
    assert "digits:1 on digits@0, held-out rows: " in words
    assert "roc_auc" in words
    assert "rows by true class (down) and predicted class" in words
    assert "stored" in words


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nothing", "digits"], NotFoundError, "nothing"),
        (["digits:7", "digits"], NotFoundError, "no version 7"),
        (["digits", "nothing"], NotFoundError, "nothing"),
        (["digits", "digits@9"], NotFoundError, "9"),
        (["digits", "words"], UsageError, "lacks column image"),
        (["digits", "more"], UsageError, "the model knows 0 to 9"),
    ],
)
def test_what_cannot_be_evaluated_is_told_and_nothing_is_stored(
    file_store: Store, arguments: list[str], error: type[LeptonError], message: str
) -> None:
    import pyarrow as pa

    publish(file_store)
    ingest(file_store, "words", pa.table({"text": ["good", "bad"], "label": [1, 0]}))
    more = digits_slice(20)
    position = more.column_names.index("label")
    ingest(file_store, "more", more.set_column(position, "label", pa.array([11] * 20, more["label"].type)))
    with pytest.raises(error, match=message):
        run(file_store, *arguments)
    assert file_store.list_names("models/digits/evaluations") == []
