"""Tables that are changed by several at once, by processes that are killed, and under the runs that refer to them."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from killed_changes import Workshop
from safetensors.numpy import save

from lepton_ray.data import edits, parts, tables
from lepton_ray.data.edits import delete, update
from lepton_ray.data.merging import merge
from lepton_ray.data.retention import references, vacuum
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.data.upkeep import compact, restore
from lepton_ray.errors import ConflictError, IntegrityError, LeptonError, UsageError
from lepton_ray.registry import Registry
from lepton_ray.storage import Store, open_store
from lepton_ray.training.record import RunRecord


def rows(start: int, count: int = 10) -> pa.Table:
    numbers = range(start, start + count)
    return pa.table({"key": [f"k{n}" for n in numbers], "x": pa.array(numbers, pa.int64()), "y": [0] * count})


def files(store: Store, name: str = "t") -> set[str]:
    return {entry.key for entry in store.list(f"datasets/{name}") if "_delta_log" not in entry.key}


def values(store: Store, ref: str = "t") -> list[int]:
    return open_table(store, ref).read(["x"])["x"].to_pylist()


def test_every_verb(store):
    """One after the other: each makes a version, and each version is there afterwards."""
    ingest(store, "t", rows(0))
    ingest(store, "t", rows(10), mode="append")
    assert update(store, "t", {"y": "x * 2"}, where="x >= 15").updated == 5
    assert delete(store, "t", where="y = 0 AND x > 3").deleted == 11
    assert merge(store, "t", rows(3, 4)).inserted == 3
    assert compact(store, "t").files_added == 1
    assert restore(store, "t@1").rows_after == 20
    ingest(store, "t", rows(50, 1), mode="overwrite")
    history = open_table(store, "t").history()
    assert [entry["mode"] for entry in history[::-1]] == [
        "create", "append", "update", "delete", "merge", "compact", "restore", "overwrite",
    ]  # fmt: skip
    assert [entry["detail"] for entry in history[4:6]] == ["where y = 0 AND x > 3", "y = x * 2 where x >= 15"]
    assert [open_table(store, f"t@{version}").num_rows for version in range(8)] == [10, 20, 20, 9, 12, 12, 20, 1]
    assert len({open_table(store, f"t@{version}").fingerprint() for version in range(8)}) == 7  # 6 is 1 again
    assert vacuum(store, "t", keep_days=0).lost == list(range(7))
    assert values(store) == [50]


def together(monkeypatch: pytest.MonkeyPatch, *acts: Callable[[], Any]) -> list[Any]:
    """Do all at once: nobody commits before all have prepared their first try. Errors are among the outcomes."""
    ready = threading.Barrier(len(acts), timeout=60)
    begun = threading.local()
    commit = edits.commit

    def commit_together(*args, **options):
        if not hasattr(begun, "once"):
            begun.once = ready.wait()
        return commit(*args, **options)

    def outcome(act: Callable[[], Any]) -> Any:
        try:
            return act()
        except LeptonError as error:
            return error

    with monkeypatch.context() as patch, ThreadPoolExecutor(len(acts)) as pool:
        for room in (edits, tables):
            patch.setattr(room, "commit", commit_together)
        return list(pool.map(outcome, acts))


def test_changes_that_race_are_all_done(store, monkeypatch):
    """Each is one version, made of what was there by then: no change is lost, none done twice."""
    ingest(store, "t", rows(0))
    ingest(store, "t", rows(10), mode="append")
    uri = store.uri
    done = together(
        monkeypatch,
        lambda: update(open_store(uri), "t", {"x": "x + 100"}, where="true"),
        lambda: update(open_store(uri), "t", {"y": "y + 1"}, where="true"),
        lambda: delete(open_store(uri), "t", where="key = 'k3'"),
        lambda: ingest(open_store(uri), "t", rows(1000, 3), mode="append"),
    )
    assert sorted(change.version for change in done) == [2, 3, 4, 5]
    read = open_table(store, "t").read().sort_by("key").to_pylist()
    assert len(read) == 22
    by_key = {row["key"]: row for row in read}
    assert "k3" not in by_key
    old = [by_key[f"k{n}"] for n in range(20) if n != 3]
    assert {(row["x"] - int(row["key"][1:]), row["y"]) for row in old} == {(100, 1)}
    named = {f"datasets/t/{part.name}" for version in range(6) for part in open_table(store, "t", version).log.parts}
    assert files(store) == named  # what was written for a try that lost is removed


@pytest.mark.parametrize("decided", ["overwrite", "restore"])
def test_decisions_about_a_version_are_not_carried_over(store, monkeypatch, decided):
    """Who overwrites or restores has seen a version; where it is no more the newest, one line says so."""
    ingest(store, "t", rows(0))
    ingest(store, "t", rows(10), mode="append")
    acts: dict[str, Callable[[], Any]] = {
        "overwrite": lambda: ingest(open_store(store.uri), "t", rows(99, 1), mode="overwrite"),
        "restore": lambda: restore(open_store(store.uri), "t@0"),
    }
    ours, theirs = together(
        monkeypatch, acts[decided], lambda: update(open_store(store.uri), "t", {"y": "7"}, where="true")
    )
    assert not isinstance(theirs, LeptonError)  # it was done anew where it lost
    if isinstance(ours, LeptonError):
        assert isinstance(ours, ConflictError)
        assert "somebody else wrote version 2 first" in str(ours)
        assert open_table(store, "t").num_rows == 20
    else:
        assert (ours.version, theirs.version) == (2, 3)
        assert open_table(store, "t").num_rows == (1 if decided == "overwrite" else 10)
    assert set(open_table(store, "t").read(["y"])["y"].to_pylist()) == {7}


def publish(store: Store, run: str, version: int) -> None:
    """A run on a version of the table, and what it leaves: its record and a model version with its lineage."""
    RunRecord.open(store, run).update(table="t", table_version=version, state="finished")
    lineage = {"run": run, "table": "t", "table_version": version}
    Registry(store).publish(
        run, weights=save({"w": np.zeros(1, np.float32)}), card={"task": {}, "lineage": lineage}, transforms={}
    )


def test_versions_that_runs_and_models_name_outlive_a_vacuum(store):
    """Although they are old: what was trained on them can be trained on them again, bit for bit."""
    ingest(store, "t", rows(0))
    for number in range(1, 6):
        update(store, "t", {"x": f"x + {number}"}, where="true")
    publish(store, "first", 1)
    RunRecord.open(store, "second").update(table="t", table_version=3)
    RunRecord.open(store, "other").update(table="u", table_version=2)
    RunRecord.open(store, "tables-of-its-own").update(table=None)
    store.put("models/m/evaluations/1/e.json", b'{"table": "t@4", "metrics": {}}')
    prints = {version: open_table(store, "t", version).fingerprint() for version in range(6)}
    named = {1: ["run first", "model first:1"], 3: ["run second"], 4: ["evaluation of m:1"]}
    assert references(store, "t") == named
    listed = store.list("")
    told = vacuum(store, "t", keep_days=0, dry_run=True)
    assert store.list("") == listed
    done = vacuum(store, "t", keep_days=0)
    assert (told.files_removed, told.bytes_removed, told.lost) == (done.files_removed, done.bytes_removed, done.lost)
    assert (done.files_removed, done.lost, sorted(done.protected), done.version) == (2, [0, 2], [1, 3, 4], 5)
    for version in (1, 3, 4, 5):
        assert open_table(store, "t", version).fingerprint() == prints[version]
    assert [entry["readable"] for entry in open_table(store, "t").history()] == [True, True, True, False, True, False]
    with pytest.raises(IntegrityError, match="is gone, by a vacuum or by accident"):
        open_table(store, "t@2").read()
    assert vacuum(store, "t", keep_days=0).files_removed == 0


def test_retention_counts_from_when_a_version_was_followed(file_store):
    """A week unless said otherwise; files that no version names yet are left to whoever writes them."""
    ingest(file_store, "t", rows(0))
    update(file_store, "t", {"x": "x + 1"}, where="true")
    file_store.put("datasets/t/part-of-an-ingest-under-way.parquet", b"x")
    assert vacuum(file_store, "t").files_removed == 0
    assert vacuum(file_store, "t", keep_days=0).files_removed == 1
    assert file_store.exists("datasets/t/part-of-an-ingest-under-way.parquet")
    path = file_store.delta_uri("datasets/t/part-of-an-ingest-under-way.parquet")
    os.utime(path, (time.time() - 25 * 3600,) * 2)
    assert vacuum(file_store, "t", keep_days=0).files_removed == 1
    for days in (-1.0, 1e9, float("nan")):
        with pytest.raises(UsageError, match="keep days"):
            vacuum(file_store, "t", keep_days=days)


def test_damaged_record_stops_a_vacuum(file_store):
    """What it named is not known, and a removed file does not come back."""
    ingest(file_store, "t", rows(0))
    update(file_store, "t", {"x": "x + 1"}, where="true")
    file_store.put("runs/r/record.json", b"{torn")
    listed = file_store.list("")
    with pytest.raises(IntegrityError, match=r"runs/r/record.json: not JSON"):
        vacuum(file_store, "t", keep_days=0)
    assert file_store.list("") == listed


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    """The process that is killed."""
    with Workshop() as made:
        yield made


def fill(store: Store) -> tuple[list[int], str]:
    """A table of 30 rows in three files at version 4, of which a run refers to 1: its values, and the print of 1."""
    for start in (0, 10, 20):
        ingest(store, "t", rows(start), mode="append" if start else "create")
    for _ in range(2):
        update(store, "t", {"x": "x + 1"}, where="true")
    RunRecord.open(store, "r").update(table="t", table_version=1)
    return values(store), open_table(store, "t@1").fingerprint()


def check(store: Store, verb: str, old: list[int], printed: str, killed: dict[str, Any], *, whole: bool) -> bool:
    """Whether the newest version is the new one, having seen that it is the old or the new one, and whole."""
    newest = open_table(store, "t")
    new = {"ingest": [*old, *range(360, 400)], "update": [x + 1000 for x in old], "vacuum": old}[verb]
    made = newest.version == 5
    assert newest.version in (4, 5), killed
    assert newest.read(["x"])["x"].to_pylist() == (new if made else old)
    assert newest.query("SELECT count(*) AS n FROM t")["n"].to_pylist() == [len(new if made else old)]
    assert open_table(store, "t@1").fingerprint() == printed
    if not whole:
        assert not made
    return made


def points(verb: str, writes: int, seed: int, count: int) -> list[tuple[int, bool]]:
    """Where to kill: the last write (the version's, of ingest and update) on both sides, the rest drawn."""
    every = [(number, after) for number in range(writes) for after in (False, True)]
    last = [] if verb == "vacuum" else every[-2:]
    return [*last, *random.Random(seed).sample(every[: len(every) - len(last)], count - len(last))]  # noqa: S311


@pytest.mark.parametrize("verb", ["ingest", "update", "vacuum"])
@pytest.mark.parametrize(("kind", "count"), [("file", 8), pytest.param("s3", 3, marks=pytest.mark.s3)])
def test_killed_change_leaves_the_old_version_or_the_new_one(request, file_store, workshop, verb, kind, count):
    """SIGKILL at the writes to the store: the table can be read, and the same command then goes through."""
    store: Store = request.getfixturevalue(f"{kind}_store")
    environment = request.getfixturevalue("s3_environment").environment if kind == "s3" else {}

    def fresh(number: int) -> tuple[Store, list[int], str]:
        made = open_store(f"{store.uri}/{verb}{number}")
        return made, *(copied(model, made) if kind == "file" else fill(made))

    model = open_store(f"{file_store.uri}-model")
    filled = fill(model) if kind == "file" else None

    def copied(of: Store, to: Store) -> tuple[list[int], str]:
        shutil.copytree(of.uri.removeprefix("file://"), to.uri.removeprefix("file://"))
        assert filled is not None
        return filled

    made, old, printed = fresh(0)
    whole = workshop.do(verb, made.uri, environment)
    assert whole["said"].isdecimal(), whole
    assert check(made, verb, old, printed, whole, whole=True) == (verb != "vacuum")
    writes = int(whole["said"])
    for number, (kill_at, after) in enumerate(points(verb, writes, seed=len(verb), count=count), start=1):
        made, old, printed = fresh(number)
        killed = workshop.do(verb, made.uri, environment, kill_at=kill_at, after=after)
        assert killed["killed"], killed
        committed = verb != "vacuum" and (kill_at, after) == (writes - 1, True)
        assert check(made, verb, old, printed, killed, whole=committed) == committed
        if not committed:
            again = workshop.do(verb, made.uri, environment)
            assert again["said"].isdecimal(), again
            check(made, verb, old, printed, again, whole=True)


@pytest.mark.parametrize("verb", ["ingest", "update", "vacuum"])
def test_killed_anywhere(file_store, workshop, verb):
    """SIGKILL after a time that is drawn, in the middle of whatever is done then."""
    draw, kills = random.Random(7), 0  # noqa: S311
    for number in range(12):
        made = open_store(f"{file_store.uri}/{number}")
        old, printed = fill(made)
        killed = workshop.do(verb, made.uri, {}, after_s=draw.uniform(0.0, 0.15))
        kills += killed["killed"]
        check(made, verb, old, printed, killed, whole=True)
        if kills == 4:
            break
    assert kills


def test_rows_in_many_files_are_joined_on_both_kinds_of_store(store, monkeypatch):
    """A table that grew by small appends reads from one file afterwards, in the same order."""
    monkeypatch.setattr(parts, "ROW_GROUP_ROWS", 7)
    for start in range(0, 40, 10):
        ingest(store, "t", rows(start), mode="append" if start else "create")
    assert compact(store, "t").files_removed == 4
    assert values(store) == list(range(40))
    assert vacuum(store, "t", keep_days=0).files_removed == 4
    assert values(store) == list(range(40))
