"""`lepton-ray data update|delete|merge|restore|compact|vacuum` say what they did, in words and as JSON."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from click.testing import CliRunner

from lepton_ray.cli.main import cli
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.errors import NotFoundError, UsageError


@pytest.fixture
def run(file_store, monkeypatch):
    """Runs `lepton-ray data ...` on a store with a table of six rows; returns what it printed, or raises."""
    monkeypatch.setenv("LEPTON_STORE", file_store.uri)
    monkeypatch.setenv("COLUMNS", "200")
    ingest(file_store, "t", pa.table({"key": list("abcdef"), "n": range(6), "word": ["x", "y"] * 3}))

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["data", *arguments], catch_exceptions=False, standalone_mode=False)
        if result.exception:
            raise result.exception
        return result.stdout

    return call


@pytest.fixture
def source(tmp_path):
    """One row that is there, one that is new."""
    path = tmp_path / "new.csv"
    path.write_text("key,n,word\na,70,x\nz,71,y\n")
    return str(path)


def test_each_verb_tells_what_it_did(run, source):
    """Version, rows, files, fingerprint."""
    said = run("update", "t", "--set", "n=n + 1", "--set", "word='a=b'", "--where", "n < 2")
    assert "t@1: 2 updated; 6 rows before, 6 after" in said
    assert "matched 2" in said
    assert "fingerprint" in said
    assert "t@2: 1 deleted; 6 rows before, 5 after" in run("delete", "t", "--where", "key = 'f'")
    assert "t@3: 1 updated, 1 inserted; 5 rows before, 6 after" in run("merge", source, "t")
    assert "t@3: no row changed; 6 rows before, 6 after; no new version" in run("merge", source, "t")
    assert "t@4: no row changed" in run("compact", "t")
    assert "t@5: 6 inserted, 6 deleted" in run("restore", "t@0")
    assert "removed 0 data files" in run("vacuum", "t")
    said = run("vacuum", "t", "--keep-days", "0")
    assert "removed 5 data files" in said
    assert "versions that cannot be read any more: 1, 2, 3, 4" in said
    said = run("history", "t")
    assert "word = 'a=b' where n < 2" in said
    assert "restore" in said


def test_json_is_one_document_with_the_same_figures(run, source, file_store):
    """For scripts."""
    change = json.loads(run("update", "t", "--set", "n=9", "--where", "word = 'x'", "--json"))
    assert change["fingerprint"] == open_table(file_store, "t").fingerprint()
    assert {name: change[name] for name in ("table", "verb", "base", "version", "updated", "dry_run")} == {
        "table": "t", "verb": "update", "base": 0, "version": 1, "updated": 3, "dry_run": False,
    }  # fmt: skip
    file_store.put("runs/r/record.json", b'{"table": "t", "table_version": 0}')
    report = json.loads(run("vacuum", "t", "--keep-days", "0", "--json"))
    assert (report["files_removed"], report["protected"], report["lost"]) == (0, {"0": ["run r"]}, [])
    history = json.loads(run("history", "t", "--json"))["versions"]
    assert (history[0]["detail"], history[0]["readable"]) == ("n = 9 where word = 'x'", True)


def test_dry_runs_do_nothing(run, source, file_store):
    """Each verb that destroys has one."""
    listed = file_store.list("")
    for arguments in (
        ("update", "t", "--set", "n=9", "--where", "true"),
        ("delete", "t", "--where", "true"),
        ("merge", source, "t"),
        ("restore", "t@0"),
        ("compact", "t"),
        ("vacuum", "t", "--keep-days", "0"),
        ("ingest", source, "t", "--overwrite"),
    ):
        said = run(*arguments, "--dry-run")
        assert "dry run" in said or "would remove" in said
    assert file_store.list("") == listed


def test_ingest_evolves_and_partitions(run, tmp_path, file_store):
    """On request, from the command line."""
    path = tmp_path / "wide.csv"
    path.write_text("key,n,more\ng,7,1.5\nh,8,2.5\n")
    with pytest.raises(UsageError, match="--evolve"):
        run("ingest", str(path), "t", "--append")
    assert "t@1: 2 of 2 rows written" in run("ingest", str(path), "t", "--append", "--evolve")
    run("ingest", str(path), "p", "--partition-by", "n")
    assert open_table(file_store, "p").log.partition_by == ("n",)
    assert len(open_table(file_store, "p").log.parts) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("update", "t", "--set", "n", "--where", "true"), UsageError, "expected COLUMN=EXPR"),
        (("update", "t", "--set", "n=1", "--set", "n=2", "--where", "true"), UsageError, "set twice"),
        (("update", "u", "--set", "n=1", "--where", "true"), NotFoundError, "table 'u'"),
        (("delete", "t", "--where", "nope"), UsageError, "No field named nope"),
        (("delete", "T", "--where", "true"), UsageError, "table 'T'"),
        (("merge", "/no/such.csv", "t"), UsageError, "No such file"),
        (("restore", "t"), UsageError, "name what is wanted back, e.g. t@3"),
        (("restore", "t@7"), NotFoundError, "no version 7"),
        (("compact", "u"), NotFoundError, "table 'u'"),
        (("vacuum", "t", "--keep-days", "-1"), UsageError, "keep days"),
    ],
)
def test_wrong_use_is_told_in_one_line(run, file_store, arguments, error, message):
    """And does nothing."""
    listed = file_store.list("")
    with pytest.raises(error, match=message) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    assert file_store.list("") == listed
