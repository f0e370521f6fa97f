"""Only SELECT reaches the query engine, whose other statements would write to any file of the machine."""

from __future__ import annotations

import time

import pyarrow as pa
import pytest

from lepton_ray.data.delta import open_log
from lepton_ray.data.query import MAX_SQL, refuse_writing
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.errors import IntegrityError, RefusedError, UsageError


@pytest.mark.parametrize(
    "sql",
    ["select 1", "  SELECT 'drop table t'", "-- a comment\nselect 1", "/* insert */ (select 1)", "((select 1))",
     "with a as (select 1) select * from a"],
)  # fmt: skip
def test_select_passes(sql):
    """Whatever its letters, comments and brackets."""
    refuse_writing(sql)


@pytest.mark.parametrize(
    "sql",
    ["insert into t values (1)", "update t set a = 1", "delete from t", "drop table t", "create table x as select 1",
     "copy t to '/x.csv'", "create external table x stored as csv location '/x'", "set a = 1",
     "explain analyze select 1",
     "with a as (select 1) insert into t select * from a", "with a as (select E'\\' ' ) Insert into t select 1 --'",
     "/* /* */ */ delete from t", "-- select\ndelete from t", "", "   ", "1", "/*", "describe t", "show tables",
     "values (1)", "\0select 1"],
)  # fmt: skip
def test_every_other_statement_is_refused(sql):
    """Also where quotes or comments hide it from a simple reader."""
    with pytest.raises(RefusedError, match="query"):
        refuse_writing(sql)


def test_judging_a_query_takes_no_time():
    """Thousands of comments, and a text without end."""
    begun = time.process_time()
    with pytest.raises(RefusedError):
        refuse_writing("/**/" * 20_000 + "1")
    with pytest.raises(RefusedError):
        refuse_writing("(" * 90_000)
    with pytest.raises(UsageError, match="at most"):
        refuse_writing(" " * (MAX_SQL + 1))
    assert time.process_time() - begun < 1.0


def test_engine_really_would_have_written(file_store, tmp_path):
    """Shows what the refusal is for: the same engine copies a table to any file when nobody stops it."""
    ingest(file_store, "t", pa.table({"a": [1]}))
    log = open_log(file_store, "t")
    with pytest.raises(RefusedError):
        list(log.query(f"copy t to '{tmp_path}/out.csv'"))
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("damage", [b"{not json", b"", b'{"add": {}}\n', b"\xff\xfe"])
def test_damaged_log_is_told(file_store, damage):
    """A log that cannot be read names the table."""
    ingest(file_store, "t", pa.table({"a": [1]}))
    file_store.put("datasets/t/_delta_log/00000000000000000000.json", damage)
    with pytest.raises(IntegrityError, match="table 't'"):
        open_log(file_store, "t")


def test_log_that_names_a_file_outside_is_not_followed(file_store, tmp_path):
    """A log from elsewhere must not read files of this machine."""
    ingest(file_store, "t", pa.table({"a": [1]}))
    key = "datasets/t/_delta_log/00000000000000000000.json"
    entry = file_store.get(key).decode()
    name = open_log(file_store, "t").parts[0].name
    for outside in (f"{tmp_path}/x.parquet", "../other/x.parquet", "s3://bucket/x.parquet"):
        file_store.put(key, entry.replace(name, outside).encode())
        with pytest.raises((UsageError, IntegrityError)):
            open_table(file_store, "t").read()


def test_tables_with_foreign_features_are_refused(file_store):
    """Deleted rows that another program marks beside the files would be read as present."""
    ingest(file_store, "t", pa.table({"a": [1]}))
    key = "datasets/t/_delta_log/00000000000000000000.json"
    lines = file_store.get(key).decode().splitlines()
    for index, line in enumerate(lines):
        if line.startswith('{"protocol"'):
            lines[index] = (
                '{"protocol":{"minReaderVersion":3,"minWriterVersion":7,'
                '"readerFeatures":["deletionVectors"],"writerFeatures":["deletionVectors"]}}'
            )
    file_store.put(key, "\n".join(lines).encode())
    with pytest.raises(RefusedError, match="deletionVectors"):
        open_log(file_store, "t")
