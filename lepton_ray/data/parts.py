"""The data files of a table: Parquet, written whole, each named by the SHA-256 of its bytes and checked when read.

A flipped bit in a Parquet file is not noticed by the usual readers (pages carry no checksum, or nobody looks at it),
so the name of a file says what its bytes must be. Rows come back in the order they were written: names sort by table
version, then by place within the version.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.data.column_types import refuse_extensions, refuse_marked_extensions
from lepton_ray.errors import IntegrityError, NotFoundError, UsageError, shown
from lepton_ray.storage import Store, sha256_hex

PART_BYTES = 64 * 2**20
"""Rows of this many bytes in memory go to one file; also what an ingest holds in memory at a time."""
ROW_GROUP_ROWS = 16_384

_NAME = re.compile(r"part-\d{10}-\d{5}-[0-9a-f]{16}-([0-9a-f]{64})\.parquet")


@dataclass(frozen=True)
class Part:
    """One data file."""

    name: str
    """Relative to the table's folder."""
    size: int
    """Bytes."""
    rows: int


def encode_part(rows: pa.Table) -> bytes:
    """Rows as the bytes of a Parquet file; the same rows give the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_part(store: Store, folder: str, name: str) -> tuple[bytes, str]:
    """The bytes of a data file and their SHA-256.

    Raises IntegrityError naming the file when it is gone or is not what its name says. Files that another program
    wrote into the table carry no hash in their name and are taken as they are.
    """
    try:
        data = store.get(f"{folder}/{name}")
    except NotFoundError as error:
        raise IntegrityError(f"data file {shown(f'{folder}/{name}', 250)}: is gone; ingest the table again") from error
    digest = sha256_hex(data)
    expected = _NAME.fullmatch(name)
    if expected and expected[1] != digest:
        raise IntegrityError(
            f"data file {shown(f'{folder}/{name}', 250)}: {len(data)} bytes with another SHA-256 than its name says; "
            "the file is damaged: restore it or ingest the table again"
        )
    return data, digest


def decode_part(data: bytes, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows in the bytes of a Parquet file.

    Raises RefusedError for extension types (before any value is decoded), IntegrityError for bytes that are no whole
    Parquet file.
    """
    refuse_marked_extensions(data, where)
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data), page_checksum_verification=True, arrow_extensions_enabled=False, pre_buffer=False
        )
        refuse_extensions(file.schema_arrow, where)
        return file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{where}: no readable Parquet file, {shown(str(error), 160)}") from error


class PartWriter:
    """Gathers cleaned rows and writes them as data files that belong to no version until a commit names them."""

    def __init__(self, store: Store, folder: str, version: int) -> None:
        self._store, self._folder, self._version = store, folder, version
        # two writers that race for one version never share a file, even with equal rows
        self.token = secrets.token_hex(8)
        self.parts: list[Part] = []
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0

    def add(self, rows: pa.Table) -> None:
        """Take rows of one schema; writes a file whenever enough of them wait."""
        if rows.num_rows:
            self._waiting.append(rows)
            self._waiting_bytes += rows.nbytes
        if self._waiting_bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        if len(self.parts) >= 100_000:
            raise UsageError(f"{self._folder}: more than 100,000 data files in one ingest; ingest it in pieces")
        rows = pa.concat_tables(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        data = encode_part(rows)
        place = f"{self._version:010d}-{len(self.parts):05d}"
        part = Part(f"part-{place}-{self.token}-{sha256_hex(data)}.parquet", len(data), rows.num_rows)
        # entered before it is written, so that a failed or interrupted write is cleaned up, too
        self.parts.append(part)
        self._store.put_if_absent(f"{self._folder}/{part.name}", data)

    def discard(self) -> None:
        """Remove the files again: no version will name them."""
        for part in self.parts:
            self._store.delete(f"{self._folder}/{part.name}")


def decode_slices(data: bytes, where: str, rows: int) -> Iterator[pa.Table]:
    """As `decode_part`, with at most so many rows at a time, which is all that is decoded then."""
    refuse_marked_extensions(data, where)
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data), page_checksum_verification=True, arrow_extensions_enabled=False, pre_buffer=False
        )
        refuse_extensions(file.schema_arrow, where)
        for batch in file.iter_batches(batch_size=rows):
            yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{where}: no readable Parquet file, {shown(str(error), 160)}") from error


class PartEncoder:
    """The bytes of a Parquet file from rows that come some at a time, so that they need not be in memory together."""

    def __init__(self, schema: pa.Schema) -> None:
        self.rows = 0
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd", write_page_checksum=True)

    def add(self, rows: pa.Table) -> None:
        """Take rows of the schema."""
        self.rows += rows.num_rows
        self._writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)

    def finish(self) -> bytes:
        """The whole file."""
        self._writer.close()
        data: bytes = self._sink.getvalue().to_pybytes()
        return data


def put_part(store: Store, folder: str, version: int, place: int, token: str, encoder: PartEncoder) -> Part:
    """Write one data file that belongs to no version until a commit names it; for several writers at once.

    Args:
        store: where the table is.
        folder: of the table.
        version: of the table that will name it.
        place: of the file within the version: files are read in this order.
        token: 16 hex digits that these writers share and no others.
        encoder: with at least one row.
    """
    data = encoder.finish()
    part = Part(f"part-{version:010d}-{place:05d}-{token}-{sha256_hex(data)}.parquet", len(data), encoder.rows)
    store.put_if_absent(f"{folder}/{part.name}", data)
    return part
