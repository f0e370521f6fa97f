"""Compression of a digits model that really learnt: smaller, as good, served alike, or refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compressible_digits import OPTIONS, publish_digits
from served_model import served

from lepton_ray import compression
from lepton_ray.cli.compress import compress as command
from lepton_ray.data.tables import open_table
from lepton_ray.errors import IntegrityError, RefusedError, UsageError
from lepton_ray.registry import Registry
from lepton_ray.settings.compression import load_compression
from lepton_ray.storage import Store, open_store
from lepton_ray.tasks import Predictor
from lepton_ray.tasks.int8_linear import Int8Linear

QUICK = 0.3
"""Seconds of timing where a test does not look at it."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with the table, the run's split and version 1 of `digits`."""
    store = open_store((tmp_path_factory.mktemp("compression") / "store").as_uri())
    version = publish_digits(store)
    assert version.card["metrics"]["accuracy"] > 0.85
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield store
    torch.set_num_threads(threads)


def compressed(store: Store, *steps: str, **settings: Any) -> compression.Compressed:
    """Version 1 after these steps, not published."""
    return compression.compress(store, "digits:1", load_compression(None, list(steps), seconds=QUICK, **settings))


def test_int8_and_bf16_keep_the_accuracy_and_shrink_the_file(digits: Store) -> None:
    """Published with its parent, its steps, figures of both and where the data came from; no alias moves."""
    registry = Registry(digits)
    made = compressed(digits, "quantise:int8-weight", "cast:bf16", name="digits-small")
    version = made.publish(digits)
    assert version.ref == "digits-small:1"
    assert registry.aliases("digits-small") == {}
    parent = registry.version("digits", 1)
    lineage = version.card["lineage"]
    assert (lineage["parent"], lineage["parent_digest"]) == ("digits:1", parent.digest)
    assert lineage["steps"] == ["quantise int8-weight", "cast bf16"]
    assert (lineage["run"], lineage["table"]) == ("digits-run", "digits")
    figures = version.card["compression"]["comparison"]
    assert figures["original"]["metric"] == parent.card["metrics"]["accuracy"]
    assert figures["compressed"]["metric"] == version.card["metrics"]["accuracy"]
    assert figures["drop"] <= 1.0
    assert figures["original"]["size"] == registry.manifest(parent).files["model.safetensors"].size
    assert figures["compressed"]["size"] == registry.manifest(version).files["model.safetensors"].size
    assert figures["compressed"]["size"] < 0.5 * figures["original"]["size"]
    assert all(figures[side][name] > 0 for side in ("original", "compressed") for name in ("p50_ms", "rows_per_s"))
    assert made.rows.split == "run digits-run"
    assert figures["rows"] == made.rows.held_out.num_rows


def test_published_versions_answer_as_they_did_when_measured(digits: Store) -> None:
    """Loaded from the store, int8 layers in place, bit for bit; the same steps give the same bytes."""
    steps = ("prune:magnitude:0.5", "quantise:int8-dynamic", "cast:fp16")
    made = compressed(digits, *steps)
    version = made.publish(digits)
    loaded = Registry(digits).load(version)
    offline = Predictor.load(made.card, made.transforms, made.weights)
    again = Predictor.load(loaded.card, loaded.transforms, loaded.weights)
    assert isinstance(again.model.get_submodule("classifier.1"), Int8Linear)
    rows = made.rows.held_out
    assert torch.equal(again.outputs(rows), offline.outputs(rows))
    assert compressed(digits, *steps).weights == loaded.weights
    kept = sum(int(torch.count_nonzero(value)) for value in again.model.state_dict().values() if value.dim() >= 2)
    total = sum(value.numel() for value in again.model.state_dict().values() if value.dim() >= 2)
    assert kept <= total / 2 + 1


def test_the_endpoint_answers_as_offline(digits: Store) -> None:
    """A replica's application on the published int8 version, one at a time and in a batch."""
    version = compressed(digits, "quantise:int8-dynamic", name="digits-served").publish(digits)
    loaded = Registry(digits).load(version)
    predictor = Predictor.load(loaded.card, loaded.transforms, loaded.weights)
    rows = open_table(digits, "digits").read().slice(0, 6)
    requests = [predictor.task.Request(image=list(image.as_py())) for image in rows["image"]]
    offline = [answer.model_dump() for answer in predictor.predict(requests)]
    with served(Predictor.load(loaded.card, loaded.transforms, loaded.weights), max_batch=8) as endpoint:
        items = [request.model_dump() for request in requests]
        answers = endpoint.post("/predict/batch", json={"items": items}).json()["answers"]
        alone = [endpoint.post(json=item).json() for item in items]
    for found, expected in zip([*answers, *alone], [*offline, *offline], strict=True):
        assert found["label"] == expected["label"]
        assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


def test_channels_go_and_distillation_brings_the_accuracy_back(digits: Store) -> None:
    """A third of the channels less is refused by itself, and good enough after the original taught what is left."""
    bare = compressed(digits, "prune:structured:0.5")
    assert bare.refused
    made = compressed(digits, "prune:structured:0.34", "distil:epochs=4", max_drop=2.0)
    assert made.refused is None
    version = made.publish(digits)
    assert version.card["task"]["options"] == {**OPTIONS, "width": 8}
    assert "weights" not in version.card["compression"]  # plain tensors of a narrower model
    assert made.comparison.compressed.size < 0.6 * made.comparison.original.size
    assert made.comparison.compressed.metric > bare.comparison.compressed.metric


def run(store: Store, *arguments: str) -> Any:
    """What the command gives."""
    return CliRunner().invoke(command, [*arguments, "--store", store.uri])


def test_a_large_drop_is_refused_and_nothing_is_published(digits: Store) -> None:
    """Exit code 4, the figures on stderr, the version numbers as before."""
    before = Registry(digits).numbers("digits")
    result = run(digits, "digits:1", "--step", "prune:magnitude:0.97", "--json")
    assert isinstance(result.exception, RefusedError)
    assert "points worse, 1 allowed; nothing is published" in str(result.exception)
    assert "prune magnitude 0.97" in str(result.exception)
    assert result.stdout == ""
    assert "size on disk" in result.stderr
    assert Registry(digits).numbers("digits") == before


def test_the_command_prints_the_table_or_one_document(digits: Store, tmp_path: Path) -> None:
    """Steps from the command line or from a file."""
    config = tmp_path / "compress.yaml"
    config.write_text(f"steps: ['cast:bf16']\nname: digits-half\nseconds: {QUICK}\n")
    result = run(digits, "digits@champion", "--config", str(config))
    assert "no alias 'champion'" in str(result.exception)
    result = run(digits, "digits:1", "--config", str(config))
    assert result.exit_code == 0, result.output
    assert "size on disk" in result.stdout
    assert "model version digits-half:1" in result.stdout
    document = json.loads(run(digits, "digits:1", "--config", str(config), "--json").stdout)
    assert document["model_version"] == "digits-half:2"
    assert document["comparison"]["metric"] == "accuracy"
    assert document["comparison"]["compressed"]["size"] < document["comparison"]["original"]["size"] * 0.6


def test_what_cannot_be_compressed_is_told(digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is int8 already, a model without a table, a table that is not its, and torchao missing."""
    quantised = compressed(digits, "quantise:int8-weight", name="digits-int8").publish(digits)
    settings = load_compression(None, ["cast:bf16"], seconds=QUICK)
    with pytest.raises(UsageError, match="digits-int8:1 is quantised already: compress its parent digits:1"):
        compression.compress(digits, quantised.ref, settings)
    registry = Registry(digits)
    loaded = registry.load(registry.version("digits", 1))
    orphan = registry.publish(
        "orphan", weights=loaded.weights, card={"task": loaded.card["task"]}, transforms=loaded.transforms
    )
    with pytest.raises(UsageError, match="lineage names none; give --table"):
        compression.compress(digits, orphan.ref, settings)
    found = compression.compress(
        digits, orphan.ref, load_compression(None, ["cast:bf16"], table="digits", seconds=QUICK)
    )
    assert found.rows.split == "the defaults (the model's lineage names no run)"
    digits.put("runs/digits-bad/spec.yaml", b"data: [1]")
    card = {"task": loaded.card["task"], "lineage": {**loaded.card["lineage"], "run": "digits-bad"}}
    bad = registry.publish("bad", weights=loaded.weights, card=card, transforms=loaded.transforms)
    with pytest.raises(IntegrityError, match=r"runs/digits-bad/spec\.yaml: damaged"):
        compression.compress(digits, bad.ref, settings)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UsageError, match=r"needs torchao; pip install 'lepton-ray\[compress\]'"):
        compressed(digits, "quantise:int8-weight")
