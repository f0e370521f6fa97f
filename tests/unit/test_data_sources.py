"""Sources become streams of tables with keys, and input that is none is named with its fault."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_ray.data.images import unpack_images
from lepton_ray.data.sources import open_source
from lepton_ray.errors import IntegrityError, RefusedError, UsageError
from lepton_ray.settings import LimitSettings, ReadingSettings


def limited(**limits) -> ReadingSettings:
    return ReadingSettings(limits=LimitSettings(**limits))


def rows_of(source, reading: ReadingSettings = ReadingSettings()) -> pa.Table:  # noqa: B008 - frozen
    opened = open_source(source if isinstance(source, pa.Table) else str(source), reading)
    return pa.concat_tables(opened.batches)


def arrow_bytes(rows: pa.Table, new=pa.ipc.new_file, **options) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, rows.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


CSV = "a,b\n1,x\n2,y\n3,\n"


def write_csv(path):
    path.write_text(CSV)


def write_gzip(path):
    path.write_bytes(gzip.compress(CSV.encode()))


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}, {"a": 3}]))


def write_parquet(path):
    pq.write_table(pa.table({"a": [1, 2, 3], "b": ["x", "y", None]}), path)


def write_tsv(path):
    path.write_text(CSV.replace(",", "\t"))


def write_arrow(path):
    rows = pa.table({"a": [1, 2, 3], "b": pa.array(["x", "y", None]).dictionary_encode()})
    path.write_bytes(arrow_bytes(rows, compression="zstd"))


def write_stream(path):
    path.write_bytes(arrow_bytes(pa.table({"a": [1, 2, 3], "b": ["x", "y", None]}), pa.ipc.new_stream))


def write_packed_lines(path):
    write_jsonl(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.csv", write_csv), ("A.CSV.GZ", write_gzip), ("a.tsv", write_tsv), ("a.jsonl", write_jsonl),
     ("a.jsonl.gz", write_packed_lines), ("a b#.parquet", write_parquet), ("a.arrow", write_arrow),
     ("a.feather", write_arrow), ("a.arrows", write_stream)],
)  # fmt: skip
def test_each_kind_of_file_gives_the_same_rows(tmp_path, name, write):
    """As a path and as a URI, with keys made of the file's hash and the row's number."""
    path = tmp_path / name
    write(path)
    for source in (path, path.as_uri()):
        rows = rows_of(source)
        assert rows.drop_columns(["key"]).to_pydict() == {"a": [1, 2, 3], "b": ["x", "y", None]}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
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


def test_large_csv_is_streamed(tmp_path):
    """Many small batches, numbered through, none dropped at a border."""
    path = tmp_path / "a.csv"
    path.write_text("a\n" + "".join(f"{row}\n" for row in range(5000)))
    batches = list(open_source(str(path), limited(max_row_bytes=1024)).batches)
    assert len(batches) > 10
    rows = pa.concat_tables(batches)
    assert rows["a"].to_pylist() == list(range(5000))
    assert rows["key"][-1].as_py().endswith("-000004999")


@pytest.mark.parametrize(
    "source",
    ["", "digit", "a.txt", "a.csv.bz2", "http://host/a.csv", "s3://b/a.csv", "file://host/a.csv", "file://a.csv",
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
        file.truncate(10**12 + 1)  # takes no space on the disk
    expected = {
        "folder": "no rows in it",
        "pipe": "no regular file",
        "empty": "0 bytes, no rows in it",
        "huge": "at most",
    }
    for name, message in expected.items():
        with pytest.raises(UsageError, match=message):
            rows_of(tmp_path / f"{name}.csv")


BLOCK = 10_000
LONG = "x" * (BLOCK * 3)
MANY = b"1\n" * BLOCK
SQUARES = b"a\n" + b"".join(b"%d\n" % (number * number) for number in range(9999))
ARROW = arrow_bytes(pa.table({"a": list(range(1000))}))
STREAM = arrow_bytes(pa.table({"a": list(range(1000))}), pa.ipc.new_stream)
BAD_FILES = {
    "header only": ("a.csv", b"a,b\n", "no rows in it"),
    "blank lines only": ("a.csv", b"\n\n\n", "no rows in it"),
    "ragged rows": ("a.csv", b"a,b\n1,2\n3\n", "row 2: 1 values, '3'; expected 2"),
    "late ragged row": ("a.csv", b"a,b\n" + b"1,2\n" * BLOCK + b"1,2,3\n", "row 10001: 3 values, '1,2,3'; expected 2"),
    "late other type": ("a.csv", b"a\n" + MANY + b"oops\n", "row 10001: column 'a' holds 'oops'; expected int64"),
    "early other type": (
        "a.csv",
        b"a\n" + b"1\n" * 50 + b"oops\n" + b"1\n" * 50,
        "row 51: column 'a' holds 'oops', and n",
    ),
    "late fraction": ("a.csv", b"a\n" + MANY + b"1.5\n", "row 10001: column 'a' holds '1.5'; expected int64"),
    "not UTF-8": ("a.csv", b"a,b\n1,\xff\xfe\n", "column 'b' is not UTF-8"),
    "late not UTF-8": ("a.csv", b"a\n" + b"xx\n" * BLOCK + b"\xff\n", "row 10001: column 'a' is not UTF-8"),
    "UTF-16": ("a.csv", "a,b\n1,2\n".encode("utf-16"), "not UTF-16"),
    "zero byte": ("a.csv", b"a,b\n" + b"1,x\n" * BLOCK + b"1,x\0y\n", "line 10002: a zero byte"),
    "column without values": ("a.csv", b"a,b\n1,\n", "column 'b' has no values"),
    "columns of one name": ("a.csv", b"a,a\n1,2\n", "column 'a' stands twice"),
    "row of many bytes": ("a.csv", f"a,b\n1,{LONG}\n".encode(), "a row has more than 10000 bytes"),
    "open quote": ("a.csv", b'a,b\n1,x\n2,"y\n', "line 3: a quote is opened and never closed"),
    "zero bytes only": ("a.csv", b"\0" * 1000, "zero byte"),
    "no gzip": ("a.csv.gz", b"a,b\n1,2\n", "cannot be read"),
    "cut gzip": (
        "a.csv.gz",
        gzip.compress(b"a\n" + b"".join(b"%d\n" % (n * n) for n in range(9999)))[:-20],
        "cannot be read",
    ),
    "no Parquet": ("a.parquet", b"<html>not found</html>", "begins with b'<htm'"),
    "cut Parquet": ("a.parquet", b"PAR1" + b"\0" * 100, "no whole Parquet file"),
    "no Arrow": ("a.arrow", b"<html>not found</html>", "no Arrow file"),
    "cut Arrow file": ("a.arrow", ARROW[:-50], "its end is missing"),
    "half an Arrow file": ("a.arrow", ARROW[: len(ARROW) // 2], "cut short"),
    "half an Arrow stream": ("a.arrows", STREAM[: len(STREAM) // 2], "cut short"),
    "empty Arrow": ("a.arrow", b"", "0 bytes, no rows in it"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_file_that_does_not_parse_is_one_line(tmp_path, kind):
    """Naming file, row, column, value and what was expected; nothing is turned into something else in silence."""
    name, content, message = BAD_FILES[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"^source '[^']*{name}'.*{re.escape(message)}") as caught:
        rows_of(tmp_path / name, limited(max_row_bytes=BLOCK))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(("name", "line"), [("a.csv.gz", b"1\n"), ("a.jsonl.gz", b'{"a": 1}\n')])
def test_small_gzip_cannot_become_a_huge_one(tmp_path, name, line):
    """What it unpacks to is counted against the same limit."""
    (tmp_path / name).write_bytes(gzip.compress((b"a\n" if name == "a.csv.gz" else b"") + line * 1_000_000))
    with pytest.raises(UsageError, match="unpacks to more than 1000000 bytes"):
        rows_of(tmp_path / name, limited(max_source_bytes=1_000_000))


def test_small_file_cannot_become_a_huge_one(tmp_path):
    """The size that the metadata of Parquet or Arrow declares is checked before any of it is unpacked."""
    rows = pa.table({"a": np.arange(100_000) % 7})
    pq.write_table(rows, tmp_path / "a.parquet", use_dictionary=False)
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(rows, compression="zstd"))
    (tmp_path / "b.arrow").write_bytes(arrow_bytes(rows, pa.ipc.new_stream, compression="lz4"))
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        assert (tmp_path / name).stat().st_size < 400_000
        with pytest.raises(UsageError, match=r"unpacks to \d+ bytes; expected at most 500000"):
            rows_of(tmp_path / name, limited(max_unpacked_bytes=500_000, max_batch_bytes=500_000))


@pytest.mark.parametrize("kind", ["dictionary", "zeros", "prefixes"])
def test_bombs_of_text_are_taken_in_small_pieces(tmp_path, kind):
    """A file of some kilobytes whose texts take 200 MB: none of the pieces does, and no row is lost."""
    text = "x" * 500_000
    rows = pa.table({"a": list(range(400)), "b": [text] * 400})
    if kind == "dictionary":
        pq.write_table(rows, tmp_path / "a.parquet")
    elif kind == "zeros":
        rows = pa.table({"a": list(range(400)), "b": pa.array([text] * 400).dictionary_encode()})
        (tmp_path / "a.arrow").write_bytes(arrow_bytes(rows, compression="zstd"))
    else:
        encodings = {"a": "PLAIN", "b": "DELTA_BYTE_ARRAY"}
        pq.write_table(rows, tmp_path / "a.parquet", use_dictionary=False, column_encoding=encodings)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 200_000
    count, largest = 0, 0
    for batch in open_source(str(path)).batches:
        count += batch.num_rows
        largest = max(largest, batch.nbytes)
    assert count == 400
    assert largest < 70_000_000


def test_metadata_of_a_file_is_bounded(tmp_path):
    """A footer beyond the limit is not read."""
    columns = {f"column{index}": [1] for index in range(100)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="max_footer_bytes"):
        rows_of(tmp_path / "a.parquet", limited(max_footer_bytes=2000))
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(pa.table(columns)))
    with pytest.raises(UsageError, match="no Arrow file or stream"):
        rows_of(tmp_path / "a.arrow", limited(max_footer_bytes=2000))


def test_flipped_bit_in_a_page_is_found(tmp_path):
    """Where the file has checksums of its pages, they are looked at."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": np.arange(10_000)}), path, write_page_checksum=True, compression=None)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"a\.parquet': cannot be read, .*CRC"):
        rows_of(path)


def test_extension_types_are_refused(tmp_path):
    """From a file and from memory."""
    field = pa.field("x", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    rows = pa.table([pa.array([b"a"])], schema=pa.schema([field]))
    pq.write_table(rows, tmp_path / "a.parquet")
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(rows))
    (tmp_path / "a.arrows").write_bytes(arrow_bytes(rows, pa.ipc.new_stream))
    for source in (tmp_path / "a.parquet", tmp_path / "a.arrow", tmp_path / "a.arrows", rows):
        with pytest.raises(RefusedError, match="extension type"):
            rows_of(source)


def test_file_changed_while_it_is_read_is_told(tmp_path):
    """The rows would be of two files."""
    path = tmp_path / "a.csv"
    path.write_text("a\n" + "1\n" * 5000)
    batches = open_source(str(path), limited(max_row_bytes=1024)).batches
    next(batches)
    with path.open("a") as file:
        file.write("1\n")
    with pytest.raises(IntegrityError, match="changed while it was read"):
        list(batches)


@pytest.mark.parametrize("new", [None, pa.ipc.new_file, pa.ipc.new_stream])
def test_registered_type_of_a_file_runs_no_code(tmp_path, new):
    """The library that reads the schema would call the type's own code at once; it does not get to see the file."""
    ran: list[str] = []

    class Trap(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.int64(), "lepton.source-trap")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type, serialized) -> Trap:
            ran.append("code")
            return cls()

    rows = pa.table({"a": [1], "x": pa.ExtensionArray.from_storage(Trap(), pa.array([1]))})
    path = tmp_path / ("a.parquet" if new is None else "a.arrow")
    if new is None:
        pq.write_table(rows, path)
    else:
        path.write_bytes(arrow_bytes(rows, new))
    pa.register_extension_type(Trap())
    try:
        with pytest.raises(RefusedError, match="extension type"):
            rows_of(path)
    finally:
        pa.unregister_extension_type("lepton.source-trap")
    assert ran == []


@pytest.mark.parametrize("name", ["a.pkl", "a.npy", "a.pt", "a.joblib", "folder", "a.tar", "a.tar.gz"])
def test_formats_that_run_code_are_refused(tmp_path, name):
    """Alone, in a folder, or in an archive."""
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "a.csv").write_text(CSV)
        (path / "weights.pt").write_bytes(b"x")
    elif ".tar" in name:
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
            for member in ("1.jpg", "1.pt"):
                archive.addfile(tarfile.TarInfo(member))
    else:
        path.write_bytes(b"x")
    with pytest.raises(RefusedError, match="may run code"):
        open_source(str(path))


def test_text_that_looks_like_a_number_stays_text(tmp_path):
    """Codes with leading zeros, numbers beyond a float's digits, words that stand for missing elsewhere."""
    (tmp_path / "a.csv").write_text(
        'zip,id,country,time,n,note\n01234,12345678901234567890,NA,12:30:00,1,\n99999,1,null,08:00:00,NA,"a,\n""b"""\n'
    )
    rows = rows_of(tmp_path / "a.csv").drop_columns(["key"]).to_pydict()
    assert rows == {
        "zip": ["01234", "99999"], "id": ["12345678901234567890", "1"], "country": ["NA", "null"],
        "time": ["12:30:00", "08:00:00"], "n": [1, None], "note": [None, 'a,\n"b"'],
    }  # fmt: skip


def test_types_and_delimiter_of_a_csv_can_be_given(tmp_path):
    """A value that does not fit the type is named with its row; so is a column that is not there."""
    path = tmp_path / "a.csv"
    path.write_text("a;b\n1;2024-02-29\n2;2024-03-01\n")
    rows = rows_of(path, ReadingSettings(delimiter=";", types={"a": "text", "b": "date"}))
    assert [str(kind) for kind in rows.schema.types] == ["string", "string", "date32[day]"]
    with pytest.raises(UsageError, match="row 1: column 'b' holds '2024-02-29'; expected int64"):
        rows_of(path, ReadingSettings(delimiter=";", types={"b": "int"}))
    with pytest.raises(UsageError, match="no column 'c'; it has 'a, b'"):
        rows_of(path, ReadingSettings(delimiter=";", types={"c": "int"}))


def test_quote_within_an_unquoted_value_is_text(tmp_path):
    """An inch sign is no opened quote."""
    (tmp_path / "a.csv").write_text('a,b\n1,5" pipe\n2,x\n')
    assert rows_of(tmp_path / "a.csv")["b"].to_pylist() == ['5" pipe', "x"]


def test_cells_beyond_the_limit_are_rejected_one_by_one(tmp_path):
    """Text, bytes and lists, from a file or from memory; each by its row, the others stay."""
    rows = pa.table(
        {
            "a": [1, 2, 3, 4],
            "text": ["x", "x" * 200, "x", "x"],
            "blob": pa.array([b"x", b"x", b"x" * 300, b"x"]),
            "numbers": [[1], [1], [1], [1] * 100],
            "words": [["x"], ["x"], ["x"], ["x"]],
        }
    )
    pq.write_table(rows, tmp_path / "a.parquet")
    for source in (str(tmp_path / "a.parquet"), rows):
        opened = open_source(source, limited(max_cell_bytes=100, max_object_bytes=250))
        assert [value for batch in opened.batches for value in batch["a"].to_pylist()] == [1]
        assert [(found.row, found.rule) for found in opened.rejects.rows] == [
            (2, "cell too large"), (3, "cell too large"), (4, "cell too large"),
        ]  # fmt: skip
        assert "column 'numbers' holds 800 bytes; expected at most 100" in opened.rejects.rows[2].reason


def many_files(folder, count: int = 20) -> None:
    folder.mkdir()
    for number in range(count):
        (folder / f"part-{number:02d}.csv").write_text(f"a,b\n{number},x\n")


def test_folder_of_files_is_one_source(tmp_path):
    """In the order of their names; columns in another order are found by name; hidden files are passed over."""
    many_files(tmp_path / "set")
    (tmp_path / "set" / "part-20.csv").write_text("b,a\ny,20\n")
    (tmp_path / "set" / "_SUCCESS").write_text("")
    (tmp_path / "set" / "README.md").write_text("about")
    opened = open_source(str(tmp_path / "set"))
    rows = pa.concat_tables(opened.batches)
    assert rows["a"].to_pylist() == list(range(21))
    assert len(set(rows["key"].to_pylist())) == 21
    assert opened.ignored == {".md": 1}
    assert len(opened.digest) == 64
    assert opened.meter.share == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n1\n", "no column 'b'; the files before have it"),
        ("a,b,c\n1,x,2\n", "column 'c' is not in the files before"),
        ("a,B\n1,x\n", "no column 'b'"),
        ("a,b\noops,x\n", "row 1: column 'a' holds 'oops'; expected int64"),
        ("", "0 bytes, no rows in it"),
    ],
)
def test_file_unlike_those_before_is_named(tmp_path, content, message):
    """The 17th of 20: a column missing, extra or renamed, another type, or nothing at all."""
    many_files(tmp_path / "set")
    (tmp_path / "set" / "part-16.csv").write_text(content)
    with pytest.raises(UsageError, match=f"file 'part-16.csv'.*{message}"):
        rows_of(tmp_path / "set")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_other_type_in_a_later_file_is_no_silent_cast(tmp_path, kind):
    """Fractions after whole numbers, in files that bring their types."""
    for name, rows in {"a": pa.table({"x": [1, 2]}), "b": pa.table({"x": [1.0, 2.5]})}.items():
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(rows, path)
        elif kind == "arrow":
            path.write_bytes(arrow_bytes(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))
    with pytest.raises(UsageError, match=rf"file 'b\.{kind}'.*column 'x'.*(double|1\.0)"):
        rows_of(tmp_path)


def test_same_content_twice_is_told(tmp_path):
    """Keys still differ, so that the rows can be kept where that is meant."""
    many_files(tmp_path / "set", 2)
    (tmp_path / "set" / "copy.csv").write_bytes((tmp_path / "set" / "part-00.csv").read_bytes())
    opened = open_source(str(tmp_path / "set"))
    rows = pa.concat_tables(opened.batches)
    assert len(set(rows["key"].to_pylist())) == rows.num_rows == 3
    assert opened.warnings == ["file 'part-00.csv' is the same as 'copy.csv'"]


def test_folders_that_are_no_source_say_why(tmp_path):
    """Nothing in it, several kinds, unknown files, folders that stand for columns, links to folders, too many files."""
    cases = {
        "empty": ([], "no rows in it, the folder has no files"),
        "mixed": (["a.csv", "a.parquet"], "holds csv and parquet files; say which with --format"),
        "media": (["a.png", "a.wav"], "holds images and audio"),
        "unknown": (["a.xyz"], r"unknown kind, holds '1 \.xyz'; expected digits"),
        "columns": (["year=2024/a.csv"], "stands for a column"),
    }
    for name, (files, message) in cases.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(CSV)
        with pytest.raises(UsageError, match=message):
            open_source(str(tmp_path / name))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "away").symlink_to(tmp_path / "mixed")
    with pytest.raises(UsageError, match="folder 'away' is a symbolic link"):
        open_source(str(tmp_path / "links"))
    with pytest.raises(UsageError, match="more than 1 files"):
        open_source(str(tmp_path / "mixed"), limited(max_files=1))
    assert rows_of(tmp_path / "mixed", ReadingSettings(format="csv")).num_rows == 3
