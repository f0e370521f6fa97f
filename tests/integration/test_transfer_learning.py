"""Transfer learning on a real local Ray, two ranks, real text: a pretrained encoder beats the same one from scratch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from text_data import samples

from lepton_ray.cluster import connect
from lepton_ray.errors import UsageError
from lepton_ray.registry import Registry
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.storage import Store
from lepton_ray.tasks import Predictor
from lepton_ray.training.publication import publish
from lepton_ray.training.trainer import Trainer, TrainingResult

pytestmark = pytest.mark.ray

TRAIN, HELD_OUT = 256, 320
BY_CHANCE = 0.08
"""Three standard deviations of the accuracy over the held-out rows where it is 0.5 to 0.8."""


def rows() -> pa.Table:
    """Movie review snippets, drawn with a fixed seed: few to train on, more to measure with."""
    whole = samples().snippets()
    chosen = np.random.default_rng(0).permutation(whole.num_rows)[: TRAIN + HELD_OUT]
    split = ["train"] * TRAIN + ["test"] * HELD_OUT
    return whole.take(chosen).append_column("split", pa.array(split))


def settings(run: str, folder: str, **training: Any) -> Settings:
    return parse_settings(
        {
            "run": run,
            "task": {
                "name": "text_classification",
                "options": {"network": "huggingface", "folder": folder, "max_length": 32},
            },
            "data": {"table": "snippets", "split": {"by": "column"}},
            "training": {
                "epochs": 3, "global_batch": 32, "workers": 2, "optimizer": {"learning_rate": 3e-4},
                "checkpoint": {"every_steps": 1000, "hot": False}, **training,
            },
            "publish": {"model": run},
        }
    )  # fmt: skip


def test_a_pretrained_encoder_beats_the_same_one_from_scratch(file_store: Store) -> None:
    """Equal rows, steps, seed and network; adapters in the upper two layers against random weights.

    The published model is the plain encoder with the adapters merged, and answers as the run was evaluated.
    """
    folder = str(samples().encoder())
    upper = [f"encoder.layer.{layer}.attention.self.{part}" for layer in (4, 5) for part in ("query", "value")]
    learnt = {
        "initial": {"weights": folder},
        "transfer": {"lora": {"targets": upper, "train": ["head.*"]}},
        "optimizer": {"learning_rate": 5e-3},
    }
    runs: dict[str, TrainingResult] = {}
    with connect():
        for name, training in (("pretrained", learnt), ("scratch", {})):
            made = settings(name, folder, **training)
            runs[name] = Trainer(None, made, store=file_store).fit(rows())
        version = publish(runs["pretrained"], settings("pretrained", folder, **learnt), file_store)
    found = runs["pretrained"].record["initial"]
    assert found["share"] > 0.99
    assert found["missing"] == ["head.weight", "head.bias"]
    accuracy = {name: result.metrics["accuracy"] for name, result in runs.items()}
    assert accuracy["pretrained"] > accuracy["scratch"] + BY_CHANCE, accuracy
    assert accuracy["pretrained"] > 0.5 + 2 * BY_CHANCE, accuracy
    assert version is not None
    loaded = Registry(file_store).load(version)
    predictor = Predictor.load(loaded.card, loaded.transforms, loaded.weights)
    served = predictor.evaluate(rows().slice(TRAIN))
    assert served["accuracy"] == pytest.approx(accuracy["pretrained"], abs=1.5 / HELD_OUT)
    with pytest.raises(UsageError, match="of the model's values, expected 50% or more"):
        Trainer(
            None, settings("other", folder, initial={"weights": "model:pretrained", "ignore": ["encoder.*"]}),
            store=file_store,
        ).fit()  # fmt: skip
