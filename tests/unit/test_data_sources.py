"""Sources become streams of tables with keys, and input that is none is named with its fault."""

from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_ray.data import sources
from lepton_ray.data.images import unpack_images
from lepton_ray.data.sources import open_source
from lepton_ray.errors import IntegrityError, RefusedError, UsageError


def rows_of(source) -> pa.Table:
    return pa.concat_tables(open_source(source if isinstance(source, pa.Table) else str(source)).batches)


CSV = "a,b\n1,x\n2,y\n3,\n"


def write_csv(path):
    path.write_text(CSV)


def write_gzip(path):
    path.write_bytes(gzip.compress(CSV.encode()))


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}, {"a": 3}]))


def write_parquet(path):
    pq.write_table(pa.table({"a": [1, 2, 3], "b": ["x", "y", None]}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.csv", write_csv), ("A.CSV.GZ", write_gzip), ("a.jsonl", write_jsonl), ("a b#.parquet", write_parquet)],
)
def test_each_kind_of_file_gives_the_same_rows(tmp_path, name, write):
    """As a path and as a URI, with keys made of the file's hash and the row's number."""
    path = tmp_path / name
    write(path)
    for source in (path, path.as_uri()):
        rows = rows_of(source)
        assert rows.drop_columns(["key"]).to_pydict() == {"a": [1, 2, 3], "b": ["x", "y", None]}
        digest = open_source(str(source)).digest
        assert rows["key"].to_pylist() == [f"{digest[:12]}-{row:09d}" for row in range(3)]


def test_rows_in_memory_are_a_source():
    """Equal rows have equal keys, other rows others."""
    rows = rows_of(pa.table({"a": [1, 2]}))
    assert rows["key"].to_pylist() == rows_of(pa.table({"a": [1, 2]}))["key"].to_pylist()
    assert rows["key"].to_pylist() != rows_of(pa.table({"a": [1, 3]}))["key"].to_pylist()


@pytest.mark.parametrize("keys", [["x", "y"], [7, 8]])
def test_keys_of_the_source_are_kept(keys):
    """Whole numbers become text."""
    assert rows_of(pa.table({"key": keys, "a": [1, 2]}))["key"].to_pylist() == [str(key) for key in keys]


@pytest.mark.parametrize("rows", [pa.table({"key": [0.5], "a": [1]}), pa.table({"key": ["x"]})])
def test_rows_without_a_usable_key_or_content_are_refused(rows):
    """A key that is a fraction, and a table of nothing but keys."""
    with pytest.raises(UsageError, match="key"):
        rows_of(rows)


def test_pixel_columns_of_a_csv_become_images(tmp_path):
    """The usual CSV of digits: a header, a label, a column per pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4), np.uint8)
    lines = [
        "label,pixel0,pixel1,pixel2,pixel3",
        *(f"{i % 10}," + ",".join(map(str, row)) for i, row in enumerate(pixels)),
    ]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    rows = rows_of(tmp_path / "d.csv")
    assert rows.column_names == ["key", "image", "height", "width", "channels", "label"]
    assert np.array_equal(unpack_images(rows).reshape(20, 4), pixels)
    (tmp_path / "d.csv").write_text("label,pixel0\n1,7\n2,300\n")
    with pytest.raises(UsageError, match="300"):
        rows_of(tmp_path / "d.csv")


def test_large_csv_is_streamed(tmp_path, monkeypatch):
    """Many small batches, numbered through, none dropped at a border."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    path = tmp_path / "a.csv"
    path.write_text("a\n" + "".join(f"{row}\n" for row in range(5000)))
    batches = list(open_source(str(path)).batches)
    assert len(batches) > 10
    rows = pa.concat_tables(batches)
    assert rows["a"].to_pylist() == list(range(5000))
    assert rows["key"][-1].as_py().endswith("-000004999")


@pytest.mark.parametrize(
    "source",
    ["", "digit", "a.txt", "a.csv.bz2", "http://host/a.csv", "s3://bucket/a.csv", "file://host/a.csv", "file://a.csv",
     "a\0.csv", "/no/such/file.csv", "/dev/null.csv", "\x1b[2J.csv"],
)  # fmt: skip
def test_unknown_source_lists_what_is_accepted(source):
    """In one line that a terminal may show."""
    with pytest.raises(UsageError, match=r"digits, digits-full|absolute path") as caught:
        open_source(source)
    assert str(caught.value).isprintable()


def test_only_regular_files_are_read(tmp_path):
    """No folder, no pipe to wait for, no empty file, none beyond the limit."""
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "empty.csv").write_text("")
    with (tmp_path / "huge.csv").open("wb") as file:
        file.truncate(sources.MAX_FILE_BYTES + 1)  # takes no space on the disk
    for name, message in [("folder", "a folder"), ("pipe", "no regular file"), ("empty", "0 bytes"), ("huge", "bytes")]:
        with pytest.raises(UsageError, match=message):
            open_source(str(tmp_path / f"{name}.csv"))


BLOCK = 10_000
LONG = "x" * (BLOCK * 3)
BAD_TEXT = {
    "ragged rows": ("a.csv", b"a,b\n1,2\n3\n"),
    "late other type": ("a.csv", b"a\n" + b"1\n" * BLOCK + b"oops\n"),
    "not UTF-8": ("a.csv", b"a,b\n1,\xff\xfe\n"),
    "late not UTF-8": ("a.csv", b"a\n" + b"xx\n" * BLOCK + b"\xff\n"),
    "column without values": ("a.csv", b"a,b\n1,\n"),
    "columns of one name": ("a.csv", b"a,a\n1,2\n"),
    "cell of many megabytes": ("a.csv", f"a,b\n1,{LONG}\n".encode()),
    "zero bytes only": ("a.csv", b"\0" * 1000),
    "no gzip": ("a.csv.gz", b"a,b\n1,2\n"),
    "cut gzip": ("a.csv.gz", gzip.compress(os.urandom(10_000).hex().encode())[:-20]),
    "no Parquet": ("a.parquet", b"<html>not found</html>"),
    "cut Parquet": ("a.parquet", b"PAR1" + b"\0" * 100),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_file_that_does_not_parse_is_one_line(tmp_path, monkeypatch, kind):
    """Naming the file and the fault; nothing is turned into something else in silence."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", BLOCK)
    name, content = BAD_TEXT[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        rows_of(tmp_path / name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_small_gzip_cannot_become_a_huge_one(tmp_path, monkeypatch):
    """What it unpacks to is counted against the same limit."""
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1_000_000)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a\n" + b"1\n" * 1_000_000))
    with pytest.raises(UsageError, match="unpacks to more than 1000000 bytes"):
        rows_of(tmp_path / "a.csv.gz")


def test_small_parquet_cannot_become_a_huge_one(tmp_path, monkeypatch):
    """The size that its metadata declares is checked before a page is read."""
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 500_000)
    pq.write_table(pa.table({"a": np.arange(100_000) % 7}), tmp_path / "a.parquet", use_dictionary=False)
    with pytest.raises(UsageError, match="unpacks to more than 500000 bytes"):
        rows_of(tmp_path / "a.parquet")


def test_extension_types_are_refused(tmp_path):
    """From a file and from memory."""
    field = pa.field("x", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    rows = pa.table([pa.array([b"a"])], schema=pa.schema([field]))
    pq.write_table(rows, tmp_path / "a.parquet")
    for source in (tmp_path / "a.parquet", rows):
        with pytest.raises(RefusedError, match="extension type"):
            rows_of(source)


def test_file_changed_while_it_is_read_is_told(tmp_path, monkeypatch):
    """The rows would be of two files."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    path = tmp_path / "a.csv"
    path.write_text("a\n" + "1\n" * 5000)
    batches = open_source(str(path)).batches
    next(batches)
    with path.open("a") as file:
        file.write("1\n")
    with pytest.raises(IntegrityError, match="changed while it was read"):
        list(batches)
