"""A cleaning plan on real tables: counts checked by hand, the quarantine, and nothing where it must be nothing."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from airports import airports
from click.testing import CliRunner

from lepton_ray.cli.main import cli
from lepton_ray.data import edits
from lepton_ray.data.cleaning import publishing, table
from lepton_ray.data.cleaning.publishing import in_quarantine
from lepton_ray.data.cleaning.table import clean
from lepton_ray.data.digits import load_digits
from lepton_ray.data.profile import profile
from lepton_ray.data.retention import vacuum
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.errors import ConflictError, NotFoundError, RefusedError, UnavailableError, UsageError
from lepton_ray.settings.cleaning import parse_plan
from lepton_ray.settings.tree import CleaningSettings
from lepton_ray.storage import Store

AS_IT_IS = CleaningSettings(drop_duplicates=False, drop_missing=False)


def plan(*steps, share=1.0):
    return parse_plan({"steps": list(steps), "max_quarantine": share})


def filled(store: Store, name: str, rows: pa.Table, pieces: int = 3) -> None:
    """A table of these rows in several data files."""
    if "key" not in rows.column_names:
        rows = rows.add_column(0, "key", pa.array([f"k{row:06d}" for row in range(rows.num_rows)]))
    size = -(-rows.num_rows // pieces)
    for start in range(0, rows.num_rows, size):
        ingest(store, name, rows.slice(start, size), mode="append" if start else "create", cleaning=AS_IT_IS)


def keys(store: Store, name: str) -> list[str]:
    return open_table(store, name).read(["key"])["key"].to_pylist()


def data_files(store: Store, name: str) -> list[str]:
    return [entry.key for entry in store.list(f"datasets/{name}") if "_delta_log" not in entry.key]


def test_airports_as_counted_by_hand(store, tmp_path):
    """A real CSV, on disk and S3: each count is the one in tests/airports.py, and what is left is what should be."""
    ingest(store, "airports", airports(tmp_path), cleaning=AS_IT_IS)
    wanted = plan(
        {"normalise": {"columns": ["name", "city"]}},
        {"allowed": {"columns": ["country"], "values": ["USA"]}},
        {"markers": {"columns": ["city", "state"], "values": ["NA"]}},
        {"missing": {"columns": ["city", "state"], "fill": "drop"}},
        {"check": {"rule": "-180 <= longitude < 0 and 0 < latitude <= 90"}},
        {"duplicates": {"columns": ["name", "city", "state"]}},
        share=0.01,
    )
    found = clean(store, "airports", wanted)
    assert [(each.rule, each.dropped, each.quarantined, each.changed) for each in found.steps] == [
        ("normalise", 0, 0, 12),
        ("allowed", 0, 4, 0),
        ("markers", 0, 0, 0),
        ("missing", 8, 0, 0),
        ("check", 0, 0, 0),
        ("duplicates", 1, 0, 0),
    ]
    assert (found.rows_read, found.rows_written, found.version) == (3376, 3376 - 4 - 8 - 1, 1)
    assert found.missing["city"] == (0, 0)
    rows = open_table(store, "airports").read()
    assert rows.num_rows == 3363
    assert not any("  " in name for name in rows["name"].to_pylist())
    gone = in_quarantine(store, "airports", limit=10)
    assert gone["rules"] == {"allowed": 4}
    assert [each["row"] for each in gone["rows"]] == [2794, 2795, 3001, 3355]
    assert "country is 'Thailand'" in gone["rows"][0]["reason"]
    assert gone["rows"][0]["file"] in data_files(store, "airports")[0] + data_files(store, "airports")[1]
    report = pq.read_table(io.BytesIO(store.get("reports/airports/cleaning-0000000001.parquet")))
    assert report["quarantined"].to_pylist() == [0, 4, 0, 0, 0, 0]
    page = store.get(found.page).decode()
    assert "3,363" in page
    assert "<script" not in page
    # 1,336 of 3,376 codes are no three capital letters: far above 1%, so nothing happens
    codes = {"pattern": {"columns": ["iata"], "regex": "[A-Z]{3}"}}
    with pytest.raises(RefusedError, match=r"1,3\d\d of 3,363 rows .* max_quarantine of 1.00%: steps.0.pattern"):
        clean(store, "airports", plan(codes, share=0.01))
    ingest(store, "again", airports(tmp_path), cleaning=AS_IT_IS)
    assert clean(store, "again", plan(codes), dry_run=True).rows_quarantined == 1336
    assert open_table(store, "airports").version == 1


PLAN = (
    {"normalise": {"columns": ["name"], "html": True, "case": "lower"}},
    {"markers": {"columns": ["age"], "values": ["?", "n/a"]}},
    {"type": {"columns": ["age"], "to": "int64"}},
    {"range": {"columns": ["age"], "min": 0, "max": 120}},
    {"missing": {"columns": ["age"], "fill": "median"}},
    {"missing": {"columns": ["kind"], "fill": "most_frequent"}},
    {"missing": {"columns": ["level"], "fill": "interpolate", "along": "at"}},
    {"outliers": {"columns": ["size"], "by": "zscore", "limit": 4}},
    {"outliers": {"columns": ["level"], "by": "iqr", "limit": 3, "action": "clip"}},
    {"labels": {"column": "kind", "values": ["a", "b", "c"], "conflicts": False}},
    {"near_duplicates": {"column": "text"}},
    {"duplicates": {"columns": ["name", "age"]}},
)


def messy(rows: int = 600) -> pa.Table:
    """Rows with something for every step of PLAN, the same each time."""
    generator = np.random.default_rng(7)
    texts = [" ".join(f"w{word}" for word in generator.integers(0, 2000, 25)) for _ in range(rows)]
    texts[400:420] = [f"{text} more" for text in texts[:20]]
    ages = [str(age) for age in generator.integers(0, 100, rows)]
    ages[5], ages[6], ages[7], ages[8] = "?", "old", "130", None
    sizes, levels = generator.normal(10, 1, rows), np.linspace(0, 1, rows)
    sizes[50], levels[60] = 99.0, 50.0
    return pa.table(
        {
            "name": [f"<b>Name {row % 550}</b>" for row in range(rows)],
            "age": ages,
            "kind": [None if row % 97 == 3 else "abcx"[min(3, row % 5 % 4 if row != 70 else 3)] for row in range(rows)],
            "size": sizes,
            "at": np.arange(rows, dtype=float),
            "level": pa.array(levels, mask=np.arange(rows) % 53 == 9),
            "text": texts,
        }
    )


def test_the_result_does_not_depend_on_the_pieces(file_store):
    """One data file or nine: the same rows, the same figures learnt, the same rows in quarantine."""
    kept, gone, learnt = [], [], []
    for name, pieces in (("one", 1), ("nine", 9)):
        filled(file_store, name, messy(), pieces)
        found = clean(file_store, name, plan(*PLAN), on="here")
        kept.append(open_table(file_store, name).read().sort_by("key"))
        gone.append(sorted((row["key"], row["rule"]) for row in in_quarantine(file_store, name, limit=1000)["rows"]))
        learnt.append([step.learnt for step in found.steps])
    assert kept[0].equals(kept[1])
    assert gone[0] == gone[1]
    assert {rule for _, rule in gone[0]} == {"type", "range", "outliers", "labels"}
    for one, other in zip(*learnt, strict=True):
        for name, value in one.items():
            assert other[name] == (pytest.approx(value, rel=1e-12) if not isinstance(value, str) else value)
    assert len(data_files(file_store, "nine")) == 18


def test_doing_it_again_changes_nothing(file_store):
    """No new version, by the plan's mark; nor by the rows themselves where another plan finds nothing to do."""
    filled(file_store, "t", messy())
    first = clean(file_store, "t", plan(*PLAN))
    before = [entry.key for entry in file_store.list("")]
    again = clean(file_store, "t", plan(*PLAN))
    assert (again.state, again.version) == ("already clean", first.version)
    assert [entry.key for entry in file_store.list("")] == before
    # all but the steps that learn from what is there, which is other rows now
    same = [step for step in PLAN if "outliers" not in step and "type" not in step and "markers" not in step]
    other = clean(file_store, "t", plan(*same))
    assert (other.state, other.rows_dropped, other.rows_quarantined) == ("unchanged", 0, 0)
    assert [entry.key for entry in file_store.list("")] == before
    # rows that came later are looked at
    late = messy().slice(0, 10).append_column("key", pa.array([f"late{row}" for row in range(10)]))
    late = late.set_column(1, "age", pa.array(range(200, 210)))
    ingest(file_store, "t", late.select(open_table(file_store, "t").schema.names), mode="append", cleaning=AS_IT_IS)
    found = clean(file_store, "t", plan(*same))
    assert found.state == "cleaned"
    assert {step.rule: step.quarantined for step in found.steps}["range"] == 10


def test_too_many_failures_write_nothing(file_store):
    """The share is of all rows read; at the limit it passes, above it no file is left."""
    filled(file_store, "t", pa.table({"a": list(range(100))}))
    before = [entry.key for entry in file_store.list("")]
    bad = {"range": {"columns": ["a"], "min": 2}}
    with pytest.raises(RefusedError, match=r"2 of 100 rows \(2.00%\).*a is 0; expected at least 2"):
        clean(file_store, "t", plan(bad, share=0.01))
    assert [entry.key for entry in file_store.list("")] == before
    assert clean(file_store, "t", plan(bad, share=0.02)).rows_quarantined == 2
    with pytest.raises(UsageError, match="no row is left"):
        clean(file_store, "t", plan({"range": {"columns": ["a"], "min": 1000}}))
    assert open_table(file_store, "t").num_rows == 98


def test_quarantine_grows_and_starts_anew_with_other_columns(file_store):
    """Rows of one schema are added; what a former run entered stays readable as a version."""
    filled(file_store, "t", pa.table({"a": [1, 2, 300, 4], "b": ["x", "y", "z", "?"]}))
    clean(file_store, "t", plan({"range": {"columns": ["a"], "max": 100}}))
    clean(file_store, "t", plan({"allowed": {"columns": ["b"], "values": ["x", "y"]}}))
    assert in_quarantine(file_store, "t")["rules"] == {"range": 1, "allowed": 1}
    assert in_quarantine(file_store, "t", rule="range")["rows"][0]["from"] == "t@1"
    with pytest.raises(UsageError, match="no row of t-quarantine@1 failed it"):
        in_quarantine(file_store, "t", rule="pattern")
    clean(file_store, "t", plan({"type": {"columns": ["a"], "to": "text"}}))
    clean(file_store, "t", plan({"pattern": {"columns": ["a"], "regex": "2"}}))
    assert open_table(file_store, "t-quarantine").read()["a"].to_pylist() == ["1"]
    assert open_table(file_store, "t-quarantine@1").num_rows == 2


def test_a_lost_race_leaves_nothing(file_store, monkeypatch):
    """Somebody else wrote first: exit code 4, the files of the version are gone, the next try works."""
    filled(file_store, "t", pa.table({"a": [1, 2, 300]}))
    wanted = plan({"range": {"columns": ["a"], "max": 100}})

    def meanwhile(store, outcome):
        raise AssertionError("no report of a version that was not made")

    def committed(*args, commit=publishing.Publication.commit, **kwargs):
        ingest(file_store, "t", pa.table({"key": ["n"], "a": [7]}), mode="append", cleaning=AS_IT_IS)
        return commit(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(publishing.Publication, "commit", committed)
        patch.setattr(table, "write_report", meanwhile)
        with pytest.raises(ConflictError):
            clean(file_store, "t", wanted)
    assert keys(file_store, "t") == ["k000000", "k000001", "k000002", "n"]
    assert len(data_files(file_store, "t")) == 4
    assert clean(file_store, "t", wanted).rows_quarantined == 1


def test_a_crash_between_the_commits_is_made_good(file_store, monkeypatch):
    """The quarantine was written, the table was not: the same run again enters no row twice."""
    filled(file_store, "t", pa.table({"a": [1, 2, 300]}))
    wanted = plan({"range": {"columns": ["a"], "max": 100}})

    def torn(store, name, *args, commit=publishing.commit, **kwargs):
        if not name.endswith("-quarantine"):
            raise UnavailableError("the store went away")
        return commit(store, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "commit", torn)
        with pytest.raises(UnavailableError):
            clean(file_store, "t", wanted)
    assert open_table(file_store, "t").num_rows == 3
    found = clean(file_store, "t", wanted)
    assert (found.rows_written, found.quarantine) == (2, "t-quarantine@0")
    assert in_quarantine(file_store, "t")["rules"] == {"range": 1}


def test_labels_that_contradict_each_other(file_store):
    """Digits of MNIST with planted faults: a class that is none, one digit under two labels, a copy, a rare class."""
    digits = load_digits().slice(0, 400).append_column("note", pa.array([""] * 400))
    rows = digits.to_pylist()
    rows[10]["label"] = 11
    rows[20]["label"] = None
    rows.append({**rows[30], "key": "twin", "label": (rows[30]["label"] + 1) % 10})
    rows.append({**rows[50], "key": "copy"})
    filled(file_store, "d", pa.Table.from_pylist(rows, digits.schema))
    found = clean(
        file_store, "d",
        plan(
            {"readable": {"columns": ["image"], "kind": "image"}},
            {"labels": {"classes": 10}},
            {"near_duplicates": {"column": "image", "kind": "image", "distance": 0}},
        ),
    )  # fmt: skip
    gone = {row["key"]: row["reason"] for row in in_quarantine(file_store, "d", limit=100)["rows"]}
    assert set(gone) == {"digits-00010", "digits-00020", "twin", "digits-00030"}
    assert "label is 11; expected a class from 0 to 9" in gone["digits-00010"]
    assert "label: not that of row" in gone["twin"]
    assert "copy" not in keys(file_store, "d")
    assert found.steps[-1].dropped >= 1
    with pytest.raises(UsageError, match="no row is left"):
        clean(file_store, "d", plan({"labels": {"min_rows": 1000}}), dry_run=True)


def test_a_killed_plan_and_a_missing_table(file_store):
    """What is no table, a version, a quarantine: told in one line."""
    wanted = plan({"duplicates": {}})
    with pytest.raises(NotFoundError):
        clean(file_store, "nothing", wanted)
    with pytest.raises(UsageError, match="leave out the @"):
        clean(file_store, "t@0", wanted)
    filled(file_store, "t-quarantine", pa.table({"a": [1]}))
    with pytest.raises(UsageError, match="is a quarantine"):
        clean(file_store, "t-quarantine", wanted)
    filled(file_store, "x" * 60, pa.table({"a": [1]}))
    with pytest.raises(UsageError, match="at most 52"):
        clean(file_store, "x" * 60, wanted)


def test_command_line_from_plan_to_quarantine(file_store, tmp_path, monkeypatch):
    """clean, again, dry run, quarantine and profile, in words and as JSON."""
    monkeypatch.setenv("LEPTON_STORE", file_store.uri)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli, ["data", *arguments])
        assert result.exit_code == code, result.output
        return result.stdout

    filled(file_store, "t", pa.table({"a": [1, 2, 300, None], "name": [" x", "y\x1b[31m", "z", "x"]}))
    path = tmp_path / "plan.yaml"
    path.write_text(
        "max_quarantine: 0.3\nsteps:\n- normalise: {columns: [name]}\n- range: {columns: [a], max: 100}\n"
        "- missing: {columns: [a], fill: mean}\n"
    )
    assert "3 of 4 rows would be kept" in run("clean", "t", str(path), "--dry-run")
    assert open_table(file_store, "t").version == 1
    said = run("clean", "t", str(path))
    assert "t@2: 3 of 4 rows kept, 0 left out, 1 quarantined" in said
    assert "a is 300; expected at most 100" in said
    assert "nothing to do" in run("clean", "t", str(path))
    assert json.loads(run("clean", "t", str(path), "--on", "here", "--json"))["state"] == "already clean"
    assert "1 x range" in run("quarantine", "t")
    assert json.loads(run("quarantine", "t", "--json"))["rows"][0]["row"] == 0
    assert open_table(file_store, "t").read()["a"].to_pylist() == [1, 2, 2]
    assert json.loads(run("profile", "t", "--json"))["rows"] == 3
    assert "greatest" in run("profile", "t")


def test_profile_of_images_and_of_everything(file_store):
    """Types, missing values, distributions, class balance, sample images: figures, and a page without scripts."""
    filled(file_store, "digits", load_digits().slice(0, 200))
    found = profile(file_store, "digits")
    page = file_store.get(found.page).decode()
    assert page.count("data:image/png;base64,") == 24
    assert "Class balance" in page
    label = next(each for each in found.columns if each.name == "label")
    assert sum(count for _, count in label.top) == 200
    wide = messy().append_column("<script>alert(1)</script>", pa.array(["<img src=x>"] * 600))
    wide = wide.append_column("huge", pa.array([1e308, -1e308] * 299 + [None, None]))
    wide = wide.append_column("day", pa.array(np.datetime64("2024-01-01") + np.arange(600)))
    wide = wide.append_column("none", pa.array([None] * 600, pa.int64())).append_column(
        "list", pa.array([[1, 2]] * 600)
    )
    filled(file_store, "wide", wide)
    found = profile(file_store, "wide")
    columns = {each.name: each for each in found.columns}
    assert columns["huge"].quantiles == [-1e308, -1e308, 0.0, 1e308, 1e308]
    assert (columns["huge"].missing, columns["huge"].mean, sum(columns["huge"].histogram)) == (2, 0.0, 598)
    assert columns["day"].span == ("2024-01-01", "2025-08-22")
    assert columns["none"].missing == 600
    assert columns["level"].missing == sum(row % 53 == 9 for row in range(600))
    assert columns["at"].quantiles == [0.0, 149.75, 299.5, 449.25, 599.0]
    assert columns["key"].distinct == 600
    page = file_store.get(found.page).decode()
    assert "<script" not in page
    assert "<img src=x>" not in page


def test_encoded_images_are_judged_and_shown(file_store):
    """PNGs in a binary column: one that is none goes, the page shows the others."""
    from PIL import Image

    def png(seed: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)).save(file, "PNG")
        return file.getvalue()

    images = pa.table({"image": [png(0), png(1), b"<html>", png(0), png(2)]})
    for name, value in (("encoding", "png"), ("height", 16), ("width", 16), ("channels", 3)):
        images = images.append_column(name, pa.array([value] * 5))
    filled(file_store, "p", images)
    wanted = plan(
        {"range": {"columns": ["height", "width", "channels"], "min": 1}},
        {"readable": {"columns": ["image"], "kind": "image"}},
        {"near_duplicates": {"column": "image", "kind": "image"}},
    )
    found = clean(file_store, "p", wanted)
    assert keys(file_store, "p") == ["k000000", "k000001", "k000004"]
    assert [(step.dropped, step.quarantined) for step in found.steps] == [(0, 0), (0, 1), (1, 0)]
    assert file_store.get(profile(file_store, "p").page).decode().count("data:image/png") == 2


@pytest.mark.ray
def test_ray_data_gives_the_same_table(file_store, ray_cluster):
    """Four data files on Ray Data: the version has the same rows in the same order, the quarantine too."""
    rules = ("normalise", "allowed", "missing", "near_duplicates")
    some = [{"allowed": {"columns": ["kind"], "values": ["a", "b", "c"]}}, *PLAN]
    chosen = [step for step in some if next(iter(step)) in rules and "along" not in next(iter(step.values()))]
    chosen = [step for step in chosen if step.get("missing", {}).get("columns") != ["age"]]
    for name, on in (("here", "here"), ("there", "ray")):
        filled(file_store, name, messy(), 4)
        found = clean(file_store, name, plan(*chosen), on=on)
        assert found.rows_written < 600
    assert open_table(file_store, "here").read().equals(open_table(file_store, "there").read())
    one, other = (open_table(file_store, f"{name}-quarantine").read() for name in ("here", "there"))
    assert one.drop_columns(["quarantine_file", "quarantine_from"]).equals(
        other.drop_columns(["quarantine_file", "quarantine_from"])
    )


def partitioned(store: Store) -> None:
    """Rows of two countries in files of their own, then rows with a column more."""
    rows = pa.table({"key": [f"a{n}" for n in range(6)], "country": ["de", "fr"] * 3, "price": [1.0, 2.0, -1.0] * 2})
    ingest(store, "p", rows, cleaning=AS_IT_IS, partition_by=["country"])
    more = pa.table({"key": ["b0", "b1"], "country": ["de", " DE"], "price": [5.0, 6.0], "note": ["x", None]})
    ingest(store, "p", more, mode="append", cleaning=AS_IT_IS, evolve=True)


def test_a_partitioned_table_whose_files_lack_a_column(file_store):
    """It stays partitioned, older rows have nothing in the new column, queries leave files out, a vacuum knows all."""
    partitioned(file_store)
    found = clean(file_store, "p", plan({"range": {"columns": ["price"], "min": 0}}))
    assert (found.rows_written, found.rows_quarantined) == (6, 2)
    made = open_table(file_store, "p")
    assert made.log.partition_by == ("country",)
    assert {part.partition for part in made.log.parts} == {
        (("country", value),) for value in ("de", "fr", " DE")
    }  # fmt: skip
    assert sorted(made.query("SELECT key FROM t WHERE country = 'de' AND price > 0")["key"].to_pylist()) == [
        "a0", "a4", "b0",
    ]  # fmt: skip
    prices = {part.partition[0][1]: part.bounds["maxValues"]["price"] for part in made.log.parts if part.rows == 2}
    assert prices["fr"] == 2.0
    assert dict(zip(*made.read(["key", "note"]).to_pydict().values(), strict=True))["b0"] == "x"
    assert made.history()[0]["source"] == "p@1"
    gone = open_table(file_store, "p-quarantine").read()
    assert sorted(gone["key"].to_pylist()) == ["a2", "a5"]
    assert vacuum(file_store, "p", keep_days=0).lost == [0, 1]
    assert open_table(file_store, "p").read().num_rows == 6
    edits.delete(file_store, "p", where="key = 'a0'")
    assert open_table(file_store, "p").num_rows == 5


def test_a_plan_that_changes_partitions(file_store):
    """Rows go to the files of their new values; a column that can name none is refused before anything is read."""
    partitioned(file_store)
    with pytest.raises(UsageError, match="cannot be partitioned by 'price'"):
        ingest(file_store, "q", pa.table({"key": ["a"], "price": [1.5]}), partition_by=["price"])
    clean(file_store, "p", plan({"normalise": {"columns": ["country"], "case": "lower"}}))
    made = open_table(file_store, "p")
    assert {part.partition for part in made.log.parts} == {(("country", "de"),), (("country", "fr"),)}
    assert made.query("SELECT count(*) AS n FROM t WHERE country = 'de'")["n"].to_pylist() == [5]
    assert sum(part.rows for part in made.log.parts) == made.read().num_rows == 8
    years = pa.table({"key": ["a", "b"], "year": ["1", "2"]})
    ingest(file_store, "y", years, partition_by=["year"])
    with pytest.raises(UsageError, match="after the plan: cannot be partitioned by 'year' of double"):
        clean(file_store, "y", plan({"type": {"columns": ["year"], "to": "float64"}}), dry_run=True)
    assert clean(file_store, "y", plan({"type": {"columns": ["year"], "to": "int64"}})).rows_written == 2
    assert open_table(file_store, "y").query("SELECT key FROM t WHERE year = 2")["key"].to_pylist() == ["b"]
