"""Leaks: rows that are not learnt from and have a counterpart that is, planted and counted."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from lepton_ray.cli.main import cli
from lepton_ray.data.leaks import find_leaks
from lepton_ray.data.split import Split
from lepton_ray.data.tables import ingest
from lepton_ray.errors import UsageError
from lepton_ray.settings import CleaningSettings
from lepton_ray.storage import Store

WORDS = [f"{start}{end}" for start in ("ba", "co", "du", "fe", "gi") for end in ("lor", "min", "rat", "sen", "tup")]


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 30)) for _ in range(count)]


def test_planted_leaks_are_found_and_nothing_else() -> None:
    made = texts(400)
    split = Split(np.arange(300), np.arange(300, 380), np.arange(380, 400))
    for held, learnt in ((300, 7), (381, 8)):  # word for word
        made[held] = made[learnt]
    for held, learnt in ((310, 20), (311, 21), (390, 22)):  # one word of thirty is another
        made[held] = made[learnt].replace(made[learnt].split()[4], "quux", 1)
    made[40] = made[41]  # both are learnt from: no leak
    made[350] = made[351]  # neither is
    keys = [f"k{number}" for number in range(400)]
    keys[399] = "k5"
    rows = pa.table({"key": keys, "text": made, "split": ["train"] * 300 + ["test"] * 100})
    found = find_leaks(rows, split, ignore=("split",), near_column="text")
    assert (found.same_key, found.same_content, found.near) == (1, 2, 5)
    assert found.examples["same_key"] == [("k5", "k5")]
    assert found.examples["same_content"] == [("k300", "k7"), ("k381", "k8")]
    assert found.examples["near"] == [("k300", "k7"), ("k310", "k20"), ("k311", "k21"), ("k381", "k8"), ("k390", "k22")]
    assert found.found
    with_split = find_leaks(rows, split)
    assert with_split.same_content == 0, "the column that tells the sides apart differs in each pair"
    assert with_split.near is None


def test_clean_sides_share_nothing() -> None:
    rows = pa.table({"key": [f"k{n}" for n in range(50)], "text": texts(50)})
    found = find_leaks(rows, Split(np.arange(40), np.arange(40, 50)), near_column="text")
    assert not found.found
    assert found.examples == {}


def test_missing_texts_are_near_nothing_and_other_columns_are_refused() -> None:
    rows = pa.table({"text": [None, "a text of some length", None, "a text of some length"], "n": [1, 2, 3, 4]})
    split = Split(np.array([0, 1]), np.array([2, 3]))
    assert find_leaks(rows, split, near_column="text").near == 1
    with pytest.raises(UsageError, match="no column 'txt'"):
        find_leaks(rows, split, near_column="txt")
    with pytest.raises(UsageError, match="column 'n' holds int64; expected text"):
        find_leaks(rows, split, near_column="n")


def test_the_command_tells_sides_and_leaks(file_store: Store) -> None:
    made = texts(60)
    made[50:] = made[:10]
    rows = pa.table({
        "key": [f"k{n:02d}" for n in range(60)], "text": made, "label": [n % 2 for n in range(60)], "day": range(60),
    })  # fmt: skip
    ingest(file_store, "reviews", rows, cleaning=CleaningSettings(drop_duplicates=False))
    arguments = ["data", "split", "reviews", "--by", "time", "--column", "day", "--held-out", "0.2", "--test", "0.1",
                 "--near", "text", "--store", file_store.uri]  # fmt: skip
    run = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
    assert run.exception is None, run.exception
    told = json.loads(run.stdout)
    assert {name: side["rows"] for name, side in told["sides"].items()} == {"train": 42, "held_out": 12, "test": 6}
    assert told["sides"]["train"]["labels"] == {"0": 21, "1": 21}
    assert told["leaks"]["same_key"] == 0
    assert told["leaks"]["near"] == 10
    words = CliRunner().invoke(cli, arguments, standalone_mode=False).stdout
    assert "10 rows that are not learnt from have nearly the same text as one that is" in words
    assert "k50 and k00" in words


def test_a_wrong_split_is_told(file_store: Store) -> None:
    ingest(file_store, "few", pa.table({"key": ["a", "b"], "label": [0, 1]}))
    run = CliRunner().invoke(cli, ["data", "split", "few", "--held-out", "1.5", "--store", file_store.uri])
    assert run.exit_code == 2 or isinstance(run.exception, UsageError)
    assert "held_out" in f"{run.output}{run.exception}"
