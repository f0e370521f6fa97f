"""`lepton-ray data` says what was found, in words and as JSON, and shows no cell that could command a terminal."""

from __future__ import annotations

import io
import json

import click
import pyarrow as pa
import pytest
from click.testing import CliRunner

from lepton_ray.cli.main import cli
from lepton_ray.data.encoded_images import ENCODINGS
from lepton_ray.data.sources import BUILT_IN
from lepton_ray.data.sources.shapes import FORMATS
from lepton_ray.data.tables import ingest
from lepton_ray.errors import ConflictError, NotFoundError, RefusedError, UsageError
from lepton_ray.settings import LimitSettings


@pytest.fixture
def run(file_store, monkeypatch):
    """Runs `lepton-ray data ...` on an empty store; returns what it printed, or raises what it raised."""
    monkeypatch.setenv("LEPTON_STORE", file_store.uri)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["data", *arguments], catch_exceptions=False, standalone_mode=False)
        if result.exception:
            raise result.exception
        return result.stdout

    return call


@pytest.fixture
def csv(tmp_path):
    """Five rows: a duplicate, a missing value and three good ones."""
    path = tmp_path / "a.csv"
    path.write_text("x,label\n1,cat\n1,cat\n2,dog\n3,\n4,cat\n")
    return str(path)


def test_ingest_tells_what_was_found(run, csv):
    """Rows, reasons, labels and the version, for people."""
    said = run("ingest", csv, "t")
    assert "t@0: 3 of 5 rows written" in said
    assert "missing values 1, invalid 0, duplicates 1" in said
    assert "1 x no label" in said
    assert "cat: 2, dog: 1" in said
    assert "all rows were in the table already" in run("ingest", csv, "t", "--append")
    assert "t@1: 4 of 5" in run("ingest", csv, "t", "--overwrite", "--keep-duplicates")


def test_json_is_one_document(run, csv):
    """With the same figures, for each command."""
    report = json.loads(run("ingest", csv, "t", "--json"))
    assert (report["table"], report["version"], report["rows_read"], report["rows_written"]) == ("t", 0, 5, 3)
    assert report["labels"] == {"cat": 2, "dog": 1}
    query = json.loads(run("query", "t", "select x, label from t order by x", "--json"))
    assert query == {
        "table": "t", "columns": ["x", "label"], "rows": [[1, "cat"], [2, "dog"], [4, "cat"]], "cut": False,
    }  # fmt: skip
    history = json.loads(run("history", "t", "--json"))
    assert [(entry["version"], entry["mode"], entry["rows"]) for entry in history["versions"]] == [(0, "create", 3)]
    assert history["versions"][0]["source"] == csv
    (table,) = json.loads(run("list", "--json"))["tables"]
    assert table == {"table": "t", "version": 0, "rows": 3, "columns": ["key", "x", "label"]}


def test_values_are_shown_safely(run, file_store):
    """Escape sequences, markup, bytes, long text; as JSON, bytes are base64 and what is no number is null."""
    rows = pa.table({"a": ["\x1b[31mred\n[/b]", "x" * 500], "b": [b"\0\xff", b""]})
    ingest(file_store, "t", rows)
    sql = "select a, b, cast('nan' as double) as c, null as d from t order by length(a)"
    said = run("query", "t", sql)
    assert "?[31mred?[/b]" in said
    assert "<2 bytes>" in said
    assert "\x1b" not in said
    assert "x" * 100 not in said
    assert json.loads(run("query", "t", sql, "--json"))["rows"][0] == ["\x1b[31mred\n[/b]", "AP8=", None, None]


def test_large_result_is_cut_and_says_so(run, file_store, monkeypatch):
    """A terminal is no place for a million rows."""
    monkeypatch.setattr("lepton_ray.cli.data.QUERY_ROWS", 5)
    ingest(file_store, "t", pa.table({"a": list(range(20))}))
    assert "cut after 5 rows" in run("query", "t", "select a from t")
    document = json.loads(run("query", "t", "select a from t", "--json"))
    assert document["cut"] is True
    assert len(document["rows"]) == 5
    assert json.loads(run("query", "t", "select a from t limit 5", "--json"))["cut"] is False


def test_damaged_table_does_not_hide_the_others(run, file_store, csv):
    """The list says which one cannot be read."""
    assert "no tables in" in run("list")
    for name in ("bad", "good"):
        run("ingest", csv, name)
    file_store.put("datasets/bad/_delta_log/00000000000000000000.json", b"{")
    bad, good = json.loads(run("list", "--json"))["tables"]
    assert "table 'bad'" in bad["error"]
    assert good["rows"] == 3
    assert "table 'bad'" in run("list")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["ingest", "nothing", "t"], UsageError),
        (["ingest", "/no/such.csv", "t"], UsageError),
        (["ingest", "digits", "No_Name"], UsageError),
        (["ingest", "digits", "t", "--append"], NotFoundError),
        (["query", "t", "select 1"], NotFoundError),
        (["history", "t"], NotFoundError),
    ],
)
def test_faults_have_their_exit_code_and_write_nothing(run, file_store, arguments, error):
    """Wrong use 2, not found 5; the store is not even made."""
    with pytest.raises(error):
        run(*arguments)
    assert file_store.list("") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "max_cell_bytes=0"], "limits.max_cell_bytes is 0"),
        (["--limit", "max_cell_bytes=much"], "limits.max_cell_bytes is 'much'"),
        (["--format", "xml"], "format is 'xml'"),
        (["--type", "a"], "expected NAME=VALUE"),
        (["--type", "x=number"], "types.x is 'number'"),
        (["--delimiter", ";;"], "delimiter is ';;'"),
        (["--strict"], "strict, and not all of it is good: '1 "),
    ],
)
def test_options_of_an_ingest_are_checked_before_it_begins(run, file_store, csv, options, message):
    """Each by its name, with the value."""
    with pytest.raises((UsageError, click.UsageError)) as caught:
        run("ingest", csv, "t", *options)
    assert message in str(caught.value.message if isinstance(caught.value, click.UsageError) else caught.value)
    assert file_store.list("datasets") == []


def test_options_of_an_ingest_reach_the_source(run, tmp_path):
    """Types, delimiter and limits; what was rejected and what was not read is told."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.txt").write_text("n;t\n01;x\n2;y\n3;" + "z" * 50 + "\n")
    (folder / "b.csv").write_text('n;t\n4;"long\ntext"\n5;' + "z" * 50 + "\n")
    (folder / "README").write_text("about")
    options = ["--format", "csv", "--delimiter", ";", "--type", "n=int", "--limit", "max_cell_bytes=30"]
    said = run("ingest", str(folder), "t", *options, "--limit", "max_rejected_share=0.5")
    assert "t@0: 1 of 2 rows written" in said
    assert "rejected 1" in said
    assert "b.csv row 2: cell too large, column 't' holds 50 bytes; expected at most 30" in said
    assert "files of other kinds, not read: 1 without ending, 1 .txt" in said
    rows = json.loads(run("query", "t", "select n, t from t", "--json"))["rows"]
    assert rows == [[4, "long\ntext"]]


def test_progress_is_a_bar_on_a_terminal(csv, monkeypatch):
    """It knows the share that was read; elsewhere nothing is drawn."""
    from rich.console import Console

    from lepton_ray.cli import progress

    drawn = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=drawn, force_terminal=True, width=120))
    with progress.reading("my\x1b.csv") as tell:
        tell(1_000, 0.25)
        tell(5_000, None)
        tell(7_000, 0.5)
    assert "reading my?.csv" in drawn.getvalue()
    assert "7,000 rows" in drawn.getvalue()
    with progress.data_files("updating t") as tell:
        tell(3, 4)
    assert "3/4" in drawn.getvalue()
    assert "data files" in drawn.getvalue()
    quiet = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=quiet))
    with progress.reading("a.csv") as tell:
        tell(1, 0.5)
    with progress.data_files("updating t") as tell, progress.doing("t") as say:
        tell(3, 4)
        say("judging")
    assert quiet.getvalue() == ""


def test_writing_query_is_refused(run, csv):
    """Exit code 4."""
    run("ingest", csv, "t")
    with pytest.raises(RefusedError) as caught:
        run("query", "t", "drop table t")
    assert caught.value.exit_code == 4
    assert not isinstance(caught.value, ConflictError)


def test_help_names_every_source(run):
    """Whoever asks for help learns what can be ingested, and which limits there are."""
    said = CliRunner().invoke(cli, ["data", "ingest", "--help"]).stdout
    assert all(name in said for name in (*BUILT_IN, *FORMATS, *ENCODINGS, *LimitSettings.model_fields))
