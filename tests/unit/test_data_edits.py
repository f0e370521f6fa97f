"""Rows change where they stand, or nothing changes at all; what does not fit is told in one line."""

from __future__ import annotations

import json

import deltalake
import pyarrow as pa
import pytest

from lepton_ray.data import parts
from lepton_ray.data.edits import delete, update
from lepton_ray.data.merging import merge
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.data.upkeep import compact, restore
from lepton_ray.errors import ConflictError, IntegrityError, LeptonError, NotFoundError, RefusedError, UsageError

ROWS = 30


def rows(start: int = 0, count: int = 10) -> pa.Table:
    numbers = range(start, start + count)
    return pa.table(
        {
            "key": [f"k{n}" for n in numbers],
            "word": ["abc"[n % 3] for n in numbers],
            "n": pa.array(numbers, pa.int32()),
            "f": pa.array([n / 2 for n in numbers], pa.float32()),
        }
    )


@pytest.fixture
def store(file_store):
    """With a table `t` of 30 rows in three files, version 2."""
    for start in (0, 10, 20):
        ingest(file_store, "t", rows(start), mode="append" if start else "create")
    return file_store


def column(store, name: str, ref: str = "t") -> list:
    return open_table(store, ref).read([name])[name].to_pylist()


def test_update_leaves_rows_in_their_places(store):
    """Only the files with changed rows are written anew, and each takes the place of the old one."""
    change = update(store, "t", {"n": "n + 100", "word": "upper(word)"}, where="n >= 8 AND n < 12")
    assert (change.base, change.version, change.matched, change.updated) == (2, 3, 4, 4)
    assert (change.files_added, change.files_removed, change.rows_after) == (2, 2, ROWS)
    assert column(store, "key") == [f"k{n}" for n in range(ROWS)]
    assert column(store, "n") == [n + 100 if 8 <= n < 12 else n for n in range(ROWS)]
    assert column(store, "word")[7:13] == ["b", "C", "A", "B", "C", "a"]
    assert column(store, "n", "t@2") == list(range(ROWS))
    assert open_table(store, "t").schema == open_table(store, "t@2").schema
    assert change.fingerprint == open_table(store, "t@3").fingerprint() != open_table(store, "t@2").fingerprint()


def test_expressions_see_the_row_as_it_was_and_the_table_as_t(store):
    """New values are computed from old ones; a subquery reads the whole table, not one file of it."""
    assert update(store, "t", {"n": "n + 1", "f": "n"}, where="n = (SELECT max(n) FROM t)").updated == 1
    assert (column(store, "n")[-1], column(store, "f")[-1]) == (30, 29.0)
    assert delete(store, "t", where="EXISTS (SELECT 1 FROM t AS o WHERE o.n = t.n + 10)").deleted == 20
    assert column(store, "n") == [19, *range(21, 29), 30]
    assert update(store, "t", {"word": "NULL"}, where="n = 21 -- only this one").updated == 1
    assert column(store, "word")[1] is None
    assert delete(store, "t", where="word = 'x' OR word IS NULL").deleted == 1


def test_change_that_changes_nothing_makes_no_version(store):
    """The same update again, a condition that no row meets, rows that are there already."""
    before = open_table(store, "t").fingerprint()
    assert update(store, "t", {"n": "n"}, where="true").matched == ROWS
    assert update(store, "t", {"n": "5"}, where="n = 99").matched == 0
    assert delete(store, "t", where="word = 'z'").deleted == 0
    assert merge(store, "t", rows(5)).matched == 10
    assert restore(store, "t@2").version == 2
    assert open_table(store, "t").version == 2
    assert open_table(store, "t").fingerprint() == before


def test_dry_run_counts_and_writes_nothing(store):
    """For each verb that destroys, the figures of the real one."""
    listed = store.list("")
    done = [
        update(store, "t", {"n": "0"}, where="n > 3", dry_run=True),
        delete(store, "t", where="n > 3", dry_run=True),
        merge(store, "t", rows(25), dry_run=True),
        restore(store, "t@0", dry_run=True),
        compact(store, "t", dry_run=True),
    ]
    assert store.list("") == listed
    assert all((change.version, change.base, change.dry_run) == (2, 2, True) for change in done)
    assert [change.rows_after for change in done] == [30, 4, 35, 10, 30]
    assert [change.files_removed for change in done] == [3, 3, 0, 2, 3]
    told = ingest(store, "t", rows(50, 5), mode="overwrite", dry_run=True)
    assert (told.dry_run, told.version, told.rows_written, told.rows_before) == (True, 2, 5, 30)
    assert store.list("") == listed
    with pytest.raises(UsageError, match="leave out --dry-run"):
        ingest(store, "new", rows(), dry_run=True)


def test_all_rows_may_go_and_others_come(store):
    """An empty table has its columns still."""
    assert delete(store, "t", where="true").rows_after == 0
    assert open_table(store, "t").read().schema.names == ["key", "word", "n", "f"]
    assert update(store, "t", {"n": "1"}, where="true").matched == 0
    assert open_table(store, "t").query("SELECT count(*) AS n FROM t")["n"].to_pylist() == [0]
    ingest(store, "t", rows(3, 2), mode="append")
    assert column(store, "n") == [3, 4]


BAD = {
    "unknown column in where": ({"n": "1"}, "nope = 1", r"where: .*No field named nope.* t\.key"),
    "unknown column in set": ({"n": "nope"}, "true", r"set 'n': .*No field named nope"),
    "column to set is not there": ({"nope": "1"}, "true", "no column 'nope'; it has 'key, word, n, f'"),
    "key": ({"key": "'x'"}, "true", "key names a row and stays"),
    "text into numbers": ({"n": "'seven'"}, "true", "gives string, the column holds int32"),
    "fraction into whole numbers": ({"n": "n / 2.0"}, "true", "gives double, the column holds int32"),
    "too large": ({"n": "n * 1000000000"}, "true", "not in range.*no value is cut"),
    "number into text": ({"word": "n"}, "true", "gives int32, the column holds string"),
    "text taken for a number": ({"n": "1"}, "n = '3'", "as if it were a number"),
    "column of text taken for numbers": ({"n": "1"}, "word > 2", "column 'word' of text"),
    "number out of text": ({"n": "n + '1'"}, "true", "Cannot coerce arithmetic expression Int32"),
    "no condition": ({"n": "1"}, "n", "non-boolean predicate"),
    "empty": ({"n": "1"}, "  ", "expected an SQL expression"),
    "another statement": ({"n": "1"}, "true; DROP TABLE t", "no SQL expression"),
    "out of its brackets": ({"n": "1"}, "true) ORDER BY (n", "no SQL expression"),
    "open quote": ({"n": "1"}, "word = 'a", "no SQL expression"),
    "two values": ({"n": "1, 2"}, "true", "no SQL expression"),
    "sum over rows": ({"n": "max(n)"}, "true", "sums up many rows"),
    "window": ({"n": "row_number() OVER (ORDER BY n)"}, "true", "sums up many rows"),
    "sum in where": ({"n": "1"}, "max(n) = 3", "Aggregate functions are not allowed"),
    "division by zero": ({"n": "n / 0"}, "true", "Divide by zero"),
    "not finite": ({"f": "CAST('NaN' AS float)"}, "n = 12", "row key 'k12' would be invalid .*f is not finite"),
    "failing cast": ({"n": "CAST(word AS int)"}, "true", "Cannot cast string 'a'"),
    "nothing to set": ({}, "true", "nothing to set"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_told_in_one_line(store, case):
    """And nothing is written, nothing converted in silence."""
    assignments, where, message = BAD[case]
    listed = store.list("")
    with pytest.raises(UsageError, match=message) as caught:
        update(store, "t", assignments, where=where)
    assert "\n" not in str(caught.value)
    assert store.list("") == listed


def test_query_takes_no_text_for_numbers_either(store):
    """The engine would do so in silence; whoever writes the cast may have it."""
    opened = open_table(store, "t")
    for sql in ("SELECT * FROM t WHERE n = '3'", "SELECT * FROM t WHERE word > 2"):
        with pytest.raises(UsageError, match="as if it were a number"):
            opened.query(sql)
    assert opened.query("SELECT key FROM t WHERE n = CAST('3' AS int)")["key"].to_pylist() == ["k3"]
    mixed = "SELECT key FROM t WHERE word = 'a' AND f >= 6 AND n + 1 < 20.5 AND word <> ') AS Int64)' ORDER BY n"
    assert opened.query(mixed)["key"].to_pylist() == ["k12", "k15", "k18"]
    assert opened.query("SELECT concat(word, n) AS c FROM t WHERE n = 3 AND word = 'a'")["c"].to_pylist() == ["a3"]


def test_merge_replaces_adds_and_takes_away(store):
    """By the key; what becomes of either side is said by the caller."""
    changed = rows(28, 4).set_column(1, "word", pa.array(["x"] * 4))
    change = merge(store, "t", changed)
    assert (change.matched, change.updated, change.inserted, change.rows_after) == (2, 2, 2, 32)
    assert column(store, "key") == [f"k{n}" for n in range(32)]
    assert column(store, "word")[27:] == ["a", "x", "x", "x", "x"]
    kept = merge(store, "t", rows(31, 2), matched="keep")
    assert (kept.matched, kept.updated, kept.inserted) == (1, 0, 1)
    gone = merge(store, "t", rows(30, 9), matched="delete", unmatched="skip")
    assert (gone.deleted, gone.inserted, gone.rows_after) == (3, 0, 30)


def test_merge_on_another_column(store):
    """Rows that are there keep their key; new ones bring theirs, which nobody may have."""
    new = pa.table({"word": ["x", "y"], "n": pa.array([3, 77], pa.int32()), "f": pa.array([9, 9], pa.float32())})
    change = merge(store, "t", new, on="n")
    assert (change.updated, change.inserted) == (1, 1)
    assert (column(store, "key")[3], column(store, "word")[3]) == ("k3", "x")
    taken = rows(99, 1).set_column(0, "key", pa.array(["k4"]))
    with pytest.raises(UsageError, match="key 'k4' of a new row stands in the table already"):
        merge(store, "t", taken, on="n")


@pytest.mark.parametrize(
    ("source", "on", "message"),
    [
        (rows().drop_columns(["key"]), "key", "has no column key to merge on"),
        (rows(), "nope", "table t@2: no column 'nope' to merge on"),
        (rows().set_column(2, "n", pa.array([1] * 10, pa.int32())), "n", "1 stands in several rows"),
        (rows(), "f", "holds float; rows are merged on text"),
        (rows().drop_columns(["f"]), "key", "no 'f' of float.*--evolve takes them in"),
        (rows().set_column(2, "n", pa.array(range(10), pa.int64())), "key", "'n' of the rows is int64"),
        (rows().slice(0, 0), "key", "no rows to merge"),
    ],
)  # fmt: skip
def test_merge_of_what_does_not_fit(store, source, on, message):
    """One line, nothing written."""
    listed = store.list("")
    with pytest.raises(UsageError, match=message):
        merge(store, "t", source, on=on)
    assert store.list("") == listed


def test_merge_of_a_folder_whose_keys_are_made(store, tmp_path):
    """Keys that number the rows of each file are nothing to merge on."""
    folder = tmp_path / "more"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.csv").write_text(f"word,n,f\n{name},1,2.0\n")
    with pytest.raises(UsageError, match="has no column key to merge on"):
        merge(store, "t", str(folder), evolve=True)


def test_columns_join_on_request(store):
    """New ones at the end, in one version; rows from before have nothing there; narrow numbers fit into wide ones."""
    wider = pa.table({"key": ["k98", "k99"], "n": pa.array([98, 99], pa.int8()), "extra": [1.5, 2.5]})
    with pytest.raises(UsageError, match=r"new 'extra' of double.*--evolve"):
        ingest(store, "t", wider, mode="append")
    report = ingest(store, "t", wider, mode="append", evolve=True)
    assert (report.version, report.rows_written, report.missing) == (3, 2, 0)
    opened = open_table(store, "t")
    assert opened.schema.names == ["key", "word", "n", "f", "extra"]
    assert opened.schema.field("n").type == pa.int32()
    assert column(store, "extra") == [None] * ROWS + [1.5, 2.5]
    assert column(store, "word")[-2:] == [None, None]
    assert opened.query("SELECT sum(extra) AS s, count(word) AS c FROM t").to_pylist() == [{"s": 4.0, "c": 30}]
    assert "extra" not in open_table(store, "t@2").schema.names
    assert ingest(store, "t", wider, mode="append", evolve=True).rows_written == 0  # they are there already
    assert merge(store, "t", pa.table({"key": ["k0"], "extra": [7.5]}), evolve=True).updated == 1
    assert (column(store, "extra")[0], column(store, "word")[0]) == (7.5, "a")
    assert update(store, "t", {"extra": "0"}, where="extra IS NULL").updated == ROWS - 1


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (pa.table({"key": ["z"], "n": pa.array([1], pa.int64())}), "'n' of the rows is int64, the table's int32"),
        (pa.table({"key": ["z"], "n": ["1"]}), "'n' of the rows is string, the table's int32"),
        (pa.table({"key": ["z"], "N": [1]}), "columns 'n' and 'N'; names must differ in more than case"),
    ],
)
def test_columns_never_change_their_type(store, new, message):
    """Not even on request: what an older version says must stay true."""
    with pytest.raises(UsageError, match=message):
        ingest(store, "t", new, mode="append", evolve=True)


def test_restore_brings_rows_and_columns_back(store):
    """A new version with the fingerprint of the old one; the versions between stay."""
    ingest(store, "t", pa.table({"key": ["a"], "other": [1]}), mode="overwrite")
    change = restore(store, "t@1")
    assert (change.version, change.inserted, change.deleted, change.rows_after) == (4, 20, 1, 20)
    assert open_table(store, "t").fingerprint() == open_table(store, "t@1").fingerprint() == change.fingerprint
    assert open_table(store, "t").query("SELECT count(*) AS n FROM t WHERE n > 4")["n"].to_pylist() == [15]
    ingest(store, "t", rows(20), mode="append")
    assert column(store, "n") == list(range(30))
    assert open_table(store, "t@3").schema.names == ["key", "other"]
    told = [(entry["mode"], entry["detail"]) for entry in open_table(store, "t").history()[:2]]
    assert told == [("append", None), ("restore", "version 1")]
    for ref, error in (("t", UsageError), ("t@9", NotFoundError), ("u@0", NotFoundError)):
        with pytest.raises(error):
            restore(store, ref)


def test_version_whose_files_are_gone_is_not_restored(store):
    """The table stays as it is."""
    ingest(store, "t", rows(), mode="overwrite")
    store.delete(f"datasets/t/{open_table(store, 't@2').log.parts[0].name}")
    with pytest.raises(IntegrityError, match="1 of its 3 data files are gone"):
        restore(store, "t@2")
    assert [entry["readable"] for entry in open_table(store, "t").history()] == [True, False, False, False]


def test_compact_joins_files_and_keeps_the_order(store, monkeypatch):
    """Up to the usual size; rows appended later come after."""
    before = open_table(store, "t").read()
    change = compact(store, "t")
    assert (change.version, change.files_added, change.files_removed) == (3, 1, 3)
    assert open_table(store, "t").read() == before
    assert compact(store, "t").version == 3
    ingest(store, "t", rows(30), mode="append")
    assert column(store, "n") == list(range(40))
    monkeypatch.setattr(parts, "PART_BYTES", 2 * open_table(store, "t").log.parts[0].size + 1)
    restore(store, "t@2")
    assert 1 <= compact(store, "t").files_added < 3
    assert open_table(store, "t").read() == before


def test_partitions_have_files_of_their_own(file_store):
    """Rows are grouped by value, files outside of a query are left out, other programs read the same."""
    ingest(file_store, "p", rows(0, 30), partition_by=["word"])
    opened = open_table(file_store, "p")
    assert [(dict(part.partition), part.rows) for part in opened.log.parts] == [({"word": w}, 10) for w in "abc"]
    assert opened.read()["n"].to_pylist() == [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]
    assert opened.query("SELECT count(*) AS c, min(n) AS m FROM t WHERE word = 'b'").to_pylist() == [{"c": 10, "m": 1}]
    for part in opened.log.parts[1:]:
        file_store.delete(f"datasets/p/{part.name}")
    assert opened.query("SELECT n FROM t WHERE word = 'a' AND n > 25")["n"].to_pylist() == [27]
    assert opened.query("SELECT n FROM t WHERE n < 1")["n"].to_pylist() == [0]  # by the bounds alone


def test_rows_move_between_partitions_by_merge_only(file_store):
    """An update leaves a row in its file, so that its place says which."""
    ingest(file_store, "p", rows(0, 9), partition_by=["word"])
    with pytest.raises(UsageError, match="says which file a row is in"):
        update(file_store, "p", {"word": "'b'"}, where="n = 0")
    assert merge(file_store, "p", rows(0, 1).set_column(1, "word", pa.array(["c"]))).updated == 1
    ingest(file_store, "p", rows(9, 3), mode="append")
    assert update(file_store, "p", {"n": "n + 1"}, where="word = 'c'").updated == 5
    opened = open_table(file_store, "p")
    assert sorted(opened.read()["n"].to_pylist()) == [1, 1, 3, 3, 4, 6, 6, 7, 9, 9, 10, 12]
    assert opened.query("SELECT count(*) AS c FROM t WHERE word = 'c'")["c"].to_pylist() == [5]
    grouped = opened.query("SELECT word, count(*) AS c FROM t GROUP BY word ORDER BY word").to_pylist()
    assert grouped == [{"word": "a", "c": 3}, {"word": "b", "c": 4}, {"word": "c", "c": 5}]
    assert compact(file_store, "p").files_added == 3
    assert sorted(open_table(file_store, "p").read()["n"].to_pylist()) == sorted(opened.read()["n"].to_pylist())


def test_partitions_stay_with_the_table(file_store):
    """Appends keep to them, an overwrite does where it can; others are asked for by name."""
    ingest(file_store, "p", rows(0, 9), partition_by=["word"])
    with pytest.raises(UsageError, match="leave out --partition-by"):
        ingest(file_store, "p", rows(9, 3), mode="append", partition_by=["n"])
    ingest(file_store, "p", rows(20, 3), mode="overwrite")
    assert open_table(file_store, "p").log.partition_by == ("word",)
    ingest(file_store, "p", pa.table({"key": ["a"], "other": [1]}), mode="overwrite")
    assert open_table(file_store, "p").log.partition_by == ()
    restore(file_store, "p@0")
    assert open_table(file_store, "p").log.partition_by == ("word",)
    assert open_table(file_store, "p").query("SELECT n FROM t WHERE word = 'c' ORDER BY n")["n"].to_pylist() == [
        2,
        5,
        8,
    ]


@pytest.mark.parametrize(
    ("by", "message"),
    [(["nope"], "is no column"), (["f"], "of float; expected text"), (["word", "word"], "name each once")],
)
def test_columns_that_name_no_partition(file_store, by, message):
    """Told before a file is written."""
    with pytest.raises(UsageError, match=message):
        ingest(file_store, "p", rows(), partition_by=by)
    assert file_store.list("datasets") == []


def test_values_that_name_no_partition(file_store, monkeypatch):
    """Empty text would come back as a missing value; a thousand partitions would be a thousand files."""
    with pytest.raises(UsageError, match="empty text names no partition"):
        ingest(file_store, "p", rows().set_column(1, "word", pa.array([""] * 10)), partition_by=["word"])
    monkeypatch.setattr(parts, "MAX_PARTITIONS", 5)
    with pytest.raises(UsageError, match="more than 5 values"):
        ingest(file_store, "p", rows(), partition_by=["key"])
    assert file_store.list("datasets") == []


def test_other_programs_read_what_was_written(store):
    """The Delta Lake library sees the rows, the columns and the history of every kind of change."""
    update(store, "t", {"n": "n + 1"}, where="word = 'a'")
    delete(store, "t", where="word = 'b'")
    merge(store, "t", pa.table({"key": ["k0", "new"], "extra": [1, 2]}), evolve=True)
    compact(store, "t")
    uri = store.delta_uri("datasets/t")
    for version in range(7):
        ours = open_table(store, "t", version).read().sort_by("key")
        theirs = pa.table(deltalake.DeltaTable(uri, version=version).scan(columns=ours.column_names))
        assert theirs.cast(ours.schema).sort_by("key") == ours
    assert [entry["operation"] for entry in deltalake.DeltaTable(uri).history()] == [
        "OPTIMIZE", "MERGE", "DELETE", "UPDATE", "WRITE", "WRITE", "CREATE TABLE",
    ]  # fmt: skip


def test_tables_of_other_programs_are_changed_too(file_store):
    """Partition values that stand in the log alone, and files without a place in their name."""
    uri = file_store.delta_uri("datasets/foreign")
    deltalake.write_deltalake(uri, rows(0, 9), partition_by=["word"])
    assert sorted(column(file_store, "word", "foreign")) == sorted("abc" * 3)
    assert update(file_store, "foreign", {"n": "-n"}, where="word = 'b'").updated == 3
    assert delete(file_store, "foreign", where="word = 'c'").deleted == 3
    read = open_table(file_store, "foreign").read().sort_by("key").to_pydict()
    assert read["n"] == [0, -1, 3, -4, 6, -7]
    assert read["word"] == ["a", "b", "a", "b", "a", "b"]
    assert pa.table(deltalake.DeltaTable(uri).scan()).num_rows == 6


@pytest.mark.parametrize(
    ("protocol", "settings", "said"),
    [
        ({"minReaderVersion": 1, "minWriterVersion": 4}, {}, "writer version 4"),
        ({"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": [], "writerFeatures": ["rowTracking"]}, {},
         "rowTracking"),
        ({"minReaderVersion": 1, "minWriterVersion": 2}, {"delta.appendOnly": "true"}, "appendOnly"),
    ],
)  # fmt: skip
def test_rules_that_this_program_does_not_keep_are_not_broken(store, protocol, settings, said):
    """Another program demands of writers what this one would not do: it writes nothing."""
    key = "datasets/t/_delta_log/00000000000000000000.json"
    lines = [json.loads(line) for line in store.get(key).decode().splitlines()]
    for line in lines:
        if "protocol" in line:
            line["protocol"] = protocol
        if "metaData" in line:
            line["metaData"]["configuration"].update(settings)
    store.put(key, "\n".join(json.dumps(line) for line in lines).encode())
    listed = store.list("")
    with pytest.raises(RefusedError, match=said):
        delete(store, "t", where="n = 1")
    assert store.list("") == listed


def test_times_without_a_zone_may_come_later(file_store):
    """A feature that the table announces from then on, so that the library still opens it."""
    ingest(file_store, "t", pa.table({"key": ["a"], "x": [1]}))
    when = pa.table({"key": ["b"], "x": [2], "at": pa.array([10**15], pa.timestamp("us"))})
    ingest(file_store, "t", when, mode="append", evolve=True)
    assert deltalake.DeltaTable(file_store.delta_uri("datasets/t")).protocol().reader_features == ["timestampNtz"]
    assert open_table(file_store, "t").read()["at"].null_count == 1
    assert open_table(file_store, "t").query("SELECT max(at) AS m FROM t")["m"][0].as_py().year == 2001


def test_versions_by_time(store):
    """The newest at that time, by the clock of its writer."""
    times = [entry["time"] for entry in open_table(store, "t").history()][::-1]
    for version, at in enumerate(times):
        text = pa.scalar(round(at * 1000), pa.timestamp("ms", "UTC")).as_py().isoformat()
        assert open_table(store, f"t@{text}").version >= version
    assert open_table(store, "t@2999-01-01").version == 2
    with pytest.raises(NotFoundError, match="no version at 1999"):
        open_table(store, "t@1999-12-31T23:59:59+01:00")
    for ref in ("t@yesterday", "t@2026-13-01", "t@2026-01-01T99"):
        with pytest.raises(UsageError, match="name@time"):
            open_table(store, ref)


def test_log_is_summed_up_and_kept(file_store, monkeypatch):
    """Every so many versions, so that opening stays fast; the entries stay, for the versions that runs name."""
    monkeypatch.setattr("lepton_ray.data.commits.CHECKPOINT_EVERY", 3)
    ingest(file_store, "t", rows())
    for number in range(1, 8):
        update(file_store, "t", {"n": f"{number}"}, where="key = 'k0'")
    names = [entry.key.rpartition("/")[2] for entry in file_store.list("datasets/t/_delta_log")]
    assert [name for name in names if "checkpoint" in name] == [
        "00000000000000000003.checkpoint.parquet", "00000000000000000006.checkpoint.parquet", "_last_checkpoint",
    ]  # fmt: skip
    assert [open_table(file_store, "t", at).read()["n"][0].as_py() for at in range(8)] == list(range(8))
    assert len(open_table(file_store, "t").history()) == 8


def test_failed_change_leaves_no_file(store, monkeypatch):
    """A disk that fills up after the first data file."""
    written: list[str] = []
    put = type(store).put_if_absent

    def full(self, key: str, data: bytes) -> str:
        if written:
            raise LeptonError("the disk is full")
        written.append(key)
        return put(self, key, data)

    listed = store.list("")
    monkeypatch.setattr(type(store), "put_if_absent", full)
    with pytest.raises(LeptonError, match="full"):
        update(store, "t", {"n": "n + 1"}, where="true")
    assert written
    assert store.list("") == listed


def test_change_gives_up_in_one_line_when_others_always_come_first(store, monkeypatch):
    """After so many tries; nothing of it stays."""
    monkeypatch.setattr("lepton_ray.data.commits.TRIES", 3)
    monkeypatch.setattr("lepton_ray.data.commits._LONGEST_PAUSE_S", 0.001)
    put = type(store).put_if_absent

    def outrun(self, key: str, data: bytes) -> str:
        if "_delta_log" in key:
            put(self, key, json.dumps({"commitInfo": {"lepton_mode": "other"}}).encode())
        return put(self, key, data)

    files = [entry.key for entry in store.list("datasets/t") if "_delta_log" not in entry.key]
    monkeypatch.setattr(type(store), "put_if_absent", outrun)
    with pytest.raises(ConflictError, match=r"somebody else wrote version \d first.* 3 tries"):
        delete(store, "t", where="n = 1")
    assert [entry.key for entry in store.list("datasets/t") if "_delta_log" not in entry.key] == files
