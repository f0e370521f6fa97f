"""Sources on a real S3 server: the same rows as from a disk, streamed, and never half of an old and a new object."""

from __future__ import annotations

import io
import tracemalloc
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lepton_ray.data.sources import open_source
from lepton_ray.data.tables import ingest, open_table
from lepton_ray.errors import IntegrityError, UsageError
from lepton_ray.settings import LimitSettings, ReadingSettings
from lepton_ray.storage import find_inputs

pytestmark = pytest.mark.s3


@pytest.fixture
def bucket(s3_environment):
    """Puts objects under a prefix of its own and tells their URIs."""
    client, prefix = s3_environment.client(), f"in-{uuid.uuid4().hex[:8]}"

    class Bucket:
        @staticmethod
        def put(name: str, data: bytes) -> str:
            client.put_object(Bucket=s3_environment.bucket, Key=f"{prefix}/{name}", Body=data)
            return Bucket.uri(name)

        @staticmethod
        def uri(name: str = "") -> str:
            return s3_environment.uri(f"{prefix}/{name}")

        @staticmethod
        def delete(name: str) -> None:
            client.delete_object(Bucket=s3_environment.bucket, Key=f"{prefix}/{name}")

    return Bucket


def parquet(rows: pa.Table, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(rows, sink, **options)
    return sink.getvalue()


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


ROWS = pa.table({"a": list(range(1000)), "b": [f"text {number}" for number in range(1000)]})
CSV = ("a,b\n" + "".join(f"{number},text {number}\n" for number in range(1000))).encode()


@pytest.mark.parametrize(("name", "data"), [("a b#.csv", CSV), ("x.parquet", parquet(ROWS, row_group_size=100))])
def test_object_gives_the_rows_of_the_same_file(bucket, tmp_path, name, data):
    """And the same digest and keys, so that a copy in a bucket is known for what it is."""
    (tmp_path / name).write_bytes(data)
    here, there = open_source(str(tmp_path / name)), open_source(bucket.put(name, data))
    assert pa.concat_tables(here.batches) == pa.concat_tables(there.batches)
    assert here.digest == there.digest
    assert there.meter.share == 1.0


def test_folder_of_objects_is_ingested(bucket, file_store, tmp_path):
    """Files of a table, and images of classes; more than a page of a listing; into a table."""
    for number in range(3):
        bucket.put(f"tables/part-{number}.csv", CSV)
    report = ingest(file_store, "t", bucket.uri("tables"))
    assert (report.rows_read, report.rows_written, len(report.warnings)) == (3000, 1000, 2)
    for number in range(30):
        bucket.put(f"images/{'cat' if number % 2 else 'dog'}/{number:02d}.png", png(number))
    bucket.put("images/cat/broken.png", png(0)[:50])
    reading = ReadingSettings(limits=LimitSettings(max_rejected_share=0.1))
    report = ingest(file_store, "images", bucket.uri("images/"), reading=reading)
    assert (report.rows_written, report.rejected, report.labels) == (30, 1, {"0": 15, "1": 15})
    assert [row.file for row in report.rejected_rows] == ["cat/broken.png"]
    rows = open_table(file_store, "images").read()
    assert rows["image"][0].as_py() == png(1)


@pytest.mark.parametrize("how", ["other", "same size", "gone"])
def test_object_changed_since_it_was_found_ends_the_ingest(bucket, file_store, how):
    """Between listing and read: by its etag, whatever its size; nothing is written."""
    uri = bucket.put("a.csv", CSV)
    (found,) = find_inputs(uri, 1).inputs
    assert found.read() == CSV
    bucket.delete("a.csv") if how == "gone" else bucket.put("a.csv", CSV + b"7,x\n" if how == "other" else CSV[::-1])
    with pytest.raises(IntegrityError, match=r"a\.csv': (is gone|was changed)"):
        found.read()


def test_object_changed_while_it_is_read_ends_the_ingest(bucket, file_store):
    """After the first rows went by."""
    data = b"a\n" + b"".join(b"%d\n" % number for number in range(3_000_000))
    uri = bucket.put("a.csv", data)
    source = open_source(uri, ReadingSettings(limits=LimitSettings(max_row_bytes=65_536)))
    next(source.batches)
    bucket.put("a.csv", data[::-1])
    with pytest.raises(IntegrityError, match="was changed"):
        list(source.batches)
    assert file_store.list("") == []


def test_large_object_is_streamed(bucket):
    """Its bytes are never in memory at once."""
    uri = bucket.put("a.csv", b"a,b\n" + b"12345,some words that are long enough\n" * 2_000_000)
    (found,) = find_inputs(uri, 1).inputs
    tracemalloc.start()
    try:
        with found.open() as stream:
            size = 0
            while data := stream.read(2**20):
                size += len(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == found.size > 70_000_000
    assert peak < 50_000_000


def test_object_that_is_not_there_is_named(bucket, s3_environment):
    """And a bucket, too."""
    with pytest.raises(UsageError, match=r"no such object, and none under it.*accepted are digits"):
        open_source(bucket.uri("none.csv"))
    with pytest.raises(UsageError, match="bucket"):
        open_source("s3://no-such-bucket-here/a.csv")
