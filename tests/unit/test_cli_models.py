"""The `lepton-ray models` commands, run as a user runs them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save

from lepton_ray.cli.models import models
from lepton_ray.errors import IntegrityError, LeptonError, NotFoundError, RefusedError, UsageError
from lepton_ray.registry import Registry
from lepton_ray.storage import Store

LINEAGE = {"run": "digits", "attempt": 1, "step": 120, "table": "digits", "table_version": 3} | {
    "table_fingerprint": "ab" * 32,
    "code_version": "0.1.0",
    "settings_sha256": "cd" * 32,
}


@pytest.fixture
def published(file_store: Store) -> Store:
    """A store with two versions of `digits`, the first being champion."""
    registry = Registry(file_store)
    for accuracy in (0.971, 0.982):
        card = {"task": {"name": "image_classification"}, "metrics": {"accuracy": accuracy}, "lineage": LINEAGE}
        registry.publish("digits", weights=save({"w": np.ones(3, np.float32)}), card=card, transforms={"mean": 0.1})
    registry.set_alias("digits", "champion", 1)
    return file_store


def run(store: Store, *arguments: str) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(models, [*arguments, "--store", store.uri], standalone_mode=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(store: Store, *arguments: str) -> Any:
    """The one document that the command prints with `--json`."""
    return json.loads(run(store, *arguments, "--json"))


def test_list_shows_versions_and_aliases(published: Store):
    """Newest first, each with its aliases, metrics and task."""
    rows = run_json(published, "list")["models"]["digits"]
    assert [(row["version"], row["aliases"]) for row in rows] == [(2, []), (1, ["champion"])]
    assert [row["metrics"] for row in rows] == [{"accuracy": 0.982}, {"accuracy": 0.971}]
    words = run(published, "list")
    assert "digits:2" in words
    assert "champion" in words
    assert "accuracy 0.982" in words


def test_list_of_an_empty_store_says_what_to_do(file_store: Store):
    assert run_json(file_store, "list") == {"models": {}}
    assert "lepton-ray train" in run(file_store, "list")


def test_list_shows_a_damaged_version_as_such(published: Store):
    """It does not hide the others."""
    published.put("models/digits/versions/2/model.json", b"{}")
    rows = run_json(published, "list")["models"]["digits"]
    assert "model.json" in rows[0]["damaged"]
    assert rows[1]["metrics"] == {"accuracy": 0.971}
    assert "DAMAGED" in run(published, "list")


def test_show_gives_card_and_manifest(published: Store):
    shown = run_json(published, "show", "digits")
    assert (shown["ref"], shown["aliases"]) == ("digits:1", ["champion"])
    assert shown["card"]["lineage"] == LINEAGE
    assert sorted(shown["manifest"]["files"]) == ["model.json", "model.safetensors", "transforms.json"]
    words = run(published, "show", "digits:1")
    assert shown["digest"] in words
    assert shown["manifest"]["files"]["model.safetensors"]["sha256"] in words


def test_lineage_goes_from_table_to_version(published: Store):
    told = run_json(published, "lineage", "digits:2")
    chain = [(link["link"], link["name"]) for link in told["chain"]]
    assert chain == [
        ("table", "digits@3"),
        ("run", "digits"),
        ("checkpoint", "step 120"),
        ("model version", "digits:2"),
    ]
    assert told["chain"][0]["sha256"] == "ab" * 32
    words = run(published, "lineage", "digits:2")
    assert "digits@3" in words
    assert "ab" * 32 in words
    assert "code_version 0.1.0" in words


def test_lineage_of_a_bare_card_says_so(file_store: Store):
    Registry(file_store).publish("bare", weights=save({"w": np.ones(1)}), card={}, transforms={})
    assert "not recorded" in run(file_store, "lineage", "bare")
    assert run_json(file_store, "lineage", "bare")["chain"][0]["name"] is None


def test_promote_tells_what_was_before(published: Store):
    told = run_json(published, "promote", "digits:2", "champion", "--reason", "better")
    assert (told["version"], told["before"]) == (2, 1)
    assert Registry(published).resolve("digits").number == 2
    assert "it was version 2" in run(published, "promote", "digits:1", "champion")
    assert "it was not set" in run(published, "promote", "digits:1", "canary")


def test_verify_reads_every_file(published: Store):
    assert run_json(published, "verify", "digits")["verified"] is True
    assert "3 files" in run(published, "verify", "digits:2")
    published.put("models/digits/versions/2/model.safetensors", save({"w": np.zeros(3, np.float32)}))
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        run(published, "verify", "digits:2")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["show", "letters"], NotFoundError),
        (["show", "digits:9"], NotFoundError),
        (["show", "digits:latest"], UsageError),
        (["verify", "digits@../x"], UsageError),
        (["promote", "digits:1", "Champion"], UsageError),
        (["promote", "digits:9", "champion"], NotFoundError),
        (["promote", "digits:1", "champion", "--reason", "x" * 1001], UsageError),
    ],
)
def test_wrong_refs_raise_and_change_nothing(published: Store, arguments: list[str], kind: type[LeptonError]):
    before = published.get("models/digits/aliases/champion.json")
    with pytest.raises(kind):
        run(published, *arguments)
    assert published.get("models/digits/aliases/champion.json") == before
    assert published.list_names("models/digits/aliases") == ["champion.json"]


def test_promotion_of_a_damaged_version_is_refused(published: Store):
    """Exit code 4, and the champion stays."""
    published.put("models/digits/versions/2/transforms.json", b"{}")
    with pytest.raises(RefusedError, match=r"transforms\.json") as caught:
        run(published, "promote", "digits:2", "champion")
    assert caught.value.exit_code == 4
    assert Registry(published).resolve("digits").number == 1
