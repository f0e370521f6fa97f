"""A model is made again from the version of the table that it was made from, whatever became of the table since."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch
from cars import cars

from lepton_ray.cluster import connect
from lepton_ray.data.cleaning.passes import Here, OnRay
from lepton_ray.data.edits import delete, update
from lepton_ray.data.merging import merge
from lepton_ray.data.retention import vacuum
from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.data.transforms import Pipeline, training_pieces
from lepton_ray.data.upkeep import compact
from lepton_ray.errors import LeptonError
from lepton_ray.registry import Registry
from lepton_ray.settings import CleaningSettings, Settings, parse_settings
from lepton_ray.settings.transforms import parse_transforms
from lepton_ray.storage import Store
from lepton_ray.tasks import Predictor
from lepton_ray.tasks.tabular import TabularRequest
from lepton_ray.training.publication import publish
from lepton_ray.training.trainer import Trainer, final_checkpoint

pytestmark = pytest.mark.ray


def settings(run: str, **data: Any) -> Settings:
    return parse_settings({
        "run": run, "task": {"name": "tabular_regression", "options": {"hidden": [64, 32]}},
        "data": {"table": "cars", **data},
        "training": {"workers": 2, "epochs": 40, "global_batch": 32, "optimizer": {"learning_rate": 1e-2}},
        "publish": {"model": "mileage"},
    })  # fmt: skip


def test_a_model_is_made_again_from_its_version_after_later_changes_and_a_vacuum(file_store: Store) -> None:
    ingest(file_store, "cars", cars(), cleaning=CleaningSettings(drop_missing=False))
    update(file_store, "cars", {"weight": "weight + 1"}, where="origin = 'Japan'")
    delete(file_store, "cars", where="year = 1970 AND cylinders = 8")
    newer = cars().slice(0, 1).set_column(0, "key", pa.array(["one more car"]))
    merge(file_store, "cars", newer, on="key")
    with connect():
        first = Trainer(None, settings("first"), store=file_store).fit()
        version = publish(first, settings("first"), file_store)
        assert version is not None
        assert version.card["lineage"]["table_version"] == 3
        before = open_table(file_store, "cars", 3).fingerprint()

        update(file_store, "cars", {"label": "label * 2"}, where="true")
        delete(file_store, "cars", where="origin = 'Europe'")
        compact(file_store, "cars")
        vacuum(file_store, "cars", keep_days=0)
        with pytest.raises(LeptonError):
            open_table(file_store, "cars@1").read()
        assert open_table(file_store, "cars", 3).fingerprint() == before

        again = Trainer(None, settings("again", version=3), store=file_store).fit()
        table = open_table(file_store, "cars", 3)
        steps = parse_transforms([
            {"impute": {"columns": ["horsepower"]}}, {"robust": {"columns": ["horsepower", "weight"]}},
            {"ordinal": {"columns": ["origin"]}}, {"tokenise": {"column": "key", "vocabulary": 200}},
        ])  # fmt: skip
        here, there = (Pipeline.fit(steps, training_pieces(file_store, table), passes=p) for p in (Here(), OnRay()))
        assert here.to_json() == there.to_json(), "learnt on Ray Data as in this process"
    one, other = (final_checkpoint(file_store, each).files["model.safetensors"] for each in (first, again))
    assert one == other, "the same weights, bit for bit"
    assert first.metrics == again.metrics
    assert first.metrics["rmse"] < 4.5, "always saying the mean is off by about 7.8"

    loaded = Registry(file_store).load(Registry(file_store).resolve("mileage"))
    predictor = Predictor.load(loaded.card, loaded.transforms, loaded.weights)
    rows = open_table(file_store, "cars", 3).read()
    held_out = rows.take(split_rows(rows, settings("first").data.split).held_out)
    requests = [
        TabularRequest(row={name: row[name] for name in loaded.transforms["columns"]}) for row in held_out.to_pylist()
    ]
    asked = predictor.task.inputs(predictor.task.rows_of(requests, loaded.transforms), loaded.transforms)
    assert torch.equal(asked, predictor.task.inputs(held_out, loaded.transforms)), "served as trained, bit for bit"
    assert predictor.evaluate(held_out)["rmse"] == pytest.approx(first.metrics["rmse"], abs=1e-9)
