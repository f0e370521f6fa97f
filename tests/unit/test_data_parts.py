"""Data files hold what was written, say when they do not, and never run what is in them."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_ray.data import parts
from lepton_ray.data.parts import PartWriter, decode_part, encode_part, read_part
from lepton_ray.errors import IntegrityError, RefusedError

ROWS = pa.table({"key": [f"k{index}" for index in range(1000)], "x": list(range(1000)), "b": [b"\0\xff" * 9] * 1000})
FOLDER = "datasets/t"


def test_rows_come_back_and_bytes_are_the_same_each_time():
    """Two ingests of the same rows make the same file, so that their fingerprints agree."""
    data = encode_part(ROWS)
    assert decode_part(data, "file") == ROWS
    assert decode_part(data, "file", ["x"]).column_names == ["x"]
    assert encode_part(ROWS) == data


def test_writer_cuts_files_and_names_them_by_hash(file_store, monkeypatch):
    """Files of bounded size whose names sort in the order of the rows."""
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    writer = PartWriter(file_store, FOLDER, 7)
    for start in range(0, 1000, 100):
        writer.add(ROWS.slice(start, 100))
    writer.add(ROWS.slice(0, 0))
    writer.flush()
    writer.flush()
    names = file_store.list_names(FOLDER)
    assert [part.name for part in writer.parts] == names
    assert len(names) > 1
    assert sum(part.rows for part in writer.parts) == 1000
    read = []
    for name, part in zip(names, writer.parts, strict=True):
        data, digest = read_part(file_store, FOLDER, name)
        assert digest == hashlib.sha256(data).hexdigest()
        assert digest in name
        assert part.size == len(data)
        read.append(decode_part(data, name))
    assert pa.concat_tables(read) == ROWS


def test_two_writers_of_one_version_share_no_file(file_store):
    """The loser of a race removes its files; the winner's must not be among them."""
    writers = [PartWriter(file_store, FOLDER, 0) for _ in range(2)]
    for writer in writers:
        writer.add(ROWS)
        writer.flush()
    writers[0].discard()
    assert file_store.list_names(FOLDER) == [part.name for part in writers[1].parts]


def damage(data: bytes) -> dict[str, bytes]:
    """What disks and networks do to a file."""
    return {
        "flipped bit": data[:200] + bytes([data[200] ^ 4]) + data[201:],
        "cut short": data[:-50],
        "empty": b"",
        "a web page": b"<html><body>503 Service Unavailable</body></html>",
        "another file": encode_part(ROWS.slice(1)),
    }


@pytest.mark.parametrize("kind", damage(encode_part(ROWS)))
def test_damaged_file_is_named(file_store, kind):
    """By its SHA-256, before it is parsed."""
    writer = PartWriter(file_store, FOLDER, 0)
    writer.add(ROWS)
    writer.flush()
    name = writer.parts[0].name
    file_store.put(f"{FOLDER}/{name}", damage(encode_part(ROWS))[kind])
    with pytest.raises(IntegrityError, match=name):
        read_part(file_store, FOLDER, name)


def test_missing_file_is_named(file_store):
    """A file that the log names and nobody has."""
    with pytest.raises(IntegrityError, match=r"datasets/t/part-1.*is gone"):
        read_part(file_store, FOLDER, "part-1.parquet")


@pytest.mark.parametrize("kind", sorted({*damage(encode_part(ROWS))} - {"another file"}))
def test_unreadable_parquet_is_one_clear_line(kind):
    """Files without a hash in their name, from another program: the page checksums or the structure tell."""
    with pytest.raises(IntegrityError, match=r"^data file 'x': no readable Parquet file") as caught:
        decode_part(damage(encode_part(ROWS))[kind], "data file 'x'")
    assert "\n" not in str(caught.value)


class Trap(pa.ExtensionType):
    """Tells when it is made from foreign bytes, as a type that unpickles would run them."""

    sprung = 0

    def __init__(self) -> None:
        super().__init__(pa.int64(), "lepton.trap.parts")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"foreign"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized) -> Trap:
        cls.sprung += 1
        return cls()


def test_extension_type_is_refused_before_its_code_runs():
    """Although the type is registered in this process, as it is where Ray Data was imported."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": pa.ExtensionArray.from_storage(Trap(), pa.array([1]))}), sink)
    data = sink.getvalue().to_pybytes()
    pa.register_extension_type(Trap())
    try:
        Trap.sprung = 0
        pq.read_table(pa.BufferReader(data))
        assert Trap.sprung > 0  # the trap works
        Trap.sprung = 0
        with pytest.raises(RefusedError, match="extension type"):
            decode_part(data, "file")
        assert Trap.sprung == 0
    finally:
        pa.unregister_extension_type("lepton.trap.parts")
