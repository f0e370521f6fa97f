"""The data files of a table: Parquet, written whole, each named by the SHA-256 of its bytes and checked when read.

A flipped bit in a Parquet file is not noticed by the usual readers (pages carry no checksum, or nobody looks at it),
so the name of a file says what its bytes must be. Rows come back in the order they were written: names sort by table
version, then by place within the version. A file that takes the place of another (rows updated, rows deleted) keeps
its place in the name, so the rows around a change stay where they were.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.data.column_types import refuse_extensions, refuse_marked_extensions
from lepton_ray.data.partitions import Bounds, Values, bounds_of, split
from lepton_ray.errors import IntegrityError, NotFoundError, UsageError, shown
from lepton_ray.storage import Store, sha256_hex

PART_BYTES = 64 * 2**20
"""Rows of this many bytes in memory go to one file; also what an ingest holds in memory at a time."""
ROW_GROUP_ROWS = 16_384
HELD_PARTS = 4
"""Rows of so many full files are held in memory at most while a partitioned table is written."""
MAX_PARTITIONS = 1000
"""Partitions of a table at most: each has files of its own."""

_NAME = re.compile(r"part-(\d{10}-\d{5})-[0-9a-f]{16}-([0-9a-f]{64})\.parquet")


@dataclass(frozen=True)
class Part:
    """One data file."""

    name: str
    """Relative to the table's folder."""
    size: int
    """Bytes."""
    rows: int
    partition: Values = ()
    """The values of the table's partition columns in all its rows, as the log has them."""
    bounds: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """`minValues`, `maxValues` and `nullCount` by column, as the log has them: a query leaves files out by them."""

    @property
    def place(self) -> str | None:
        """Where its rows stand among those of the table; None for a file that another program wrote."""
        ours = _NAME.fullmatch(self.name)
        return ours[1] if ours else None


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
        raise IntegrityError(
            f"data file {shown(f'{folder}/{name}', 250)}: is gone, by a vacuum or by accident; open a version that "
            "lepton-ray data history shows as readable, or ingest the table again"
        ) from error
    digest = sha256_hex(data)
    expected = _NAME.fullmatch(name)
    if expected and expected[2] != digest:
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
    with _opened(data, where) as file:
        rows: pa.Table = file.read(columns=None if columns is None else list(columns))
    return rows


def decode_slices(data: bytes, where: str, rows: int) -> Iterator[pa.Table]:
    """As `decode_part`, with at most so many rows at a time, which is all that is decoded then."""
    with _opened(data, where) as file:
        for batch in file.iter_batches(batch_size=rows):
            yield pa.Table.from_batches([batch])


@contextlib.contextmanager
def _opened(data: bytes, where: str) -> Iterator[pq.ParquetFile]:
    refuse_marked_extensions(data, where)
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data), page_checksum_verification=True, arrow_extensions_enabled=False, pre_buffer=False
        )
        refuse_extensions(file.schema_arrow, where)
        yield file
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{where}: no readable Parquet file, {shown(str(error), 160)}") from error


class PartWriter:
    """Gathers rows and writes them as data files that belong to no version until a commit names them.

    Args:
        store: where to.
        folder: of the table.
        version: that the files shall make.
        partition_by: columns whose values get files of their own.
        dry: write nothing, only say what would be written.
    """

    def __init__(
        self, store: Store, folder: str, version: int, partition_by: Sequence[str] = (), *, dry: bool = False
    ) -> None:
        self._store, self._folder, self._version = store, folder, version
        self.partition_by = tuple(partition_by)
        self._dry = dry
        # two writers that race for one version never share a file, even with equal rows
        self.token = secrets.token_hex(8)
        self.parts: list[Part] = []
        self._count = 0
        self._waiting: dict[Values, list[pa.Table]] = {}
        self._bytes: dict[Values, int] = {}
        self._partitions: set[Values] = set()

    def add(self, rows: pa.Table) -> None:
        """Take rows of one schema; writes a file whenever enough of them wait."""
        if not rows.num_rows:
            return
        for values, piece in split(rows, self.partition_by):
            self._partitions.add(values)
            if len(self._partitions) > MAX_PARTITIONS:
                names = ", ".join(self.partition_by)
                raise UsageError(f"partition by {names}: more than {MAX_PARTITIONS} values; choose a column with fewer")
            self._waiting.setdefault(values, []).append(piece)
            self._bytes[values] = self._bytes.get(values, 0) + piece.nbytes
            if self._bytes[values] >= PART_BYTES:
                self._flush(values)
        while sum(self._bytes.values()) >= HELD_PARTS * PART_BYTES:
            self._flush(max(self._bytes, key=self._bytes.__getitem__))

    def flush(self) -> None:
        """Write what waits."""
        for values in list(self._waiting):
            self._flush(values)

    def replace(self, old: Part, rows: pa.Table) -> None:
        """Write rows that take the place of those of another file, whose partition they share."""
        self._write(rows, old.place or self._next_place(), old.partition)

    def _flush(self, values: Values) -> None:
        rows = pa.concat_tables(self._waiting.pop(values))
        del self._bytes[values]
        self._write(rows, self._next_place(), values)

    def _next_place(self) -> str:
        if self._count >= 100_000:
            raise UsageError(f"{self._folder}: more than 100,000 data files in one version; write it in pieces")
        self._count += 1
        return f"{self._version:010d}-{self._count - 1:05d}"

    def _write(self, rows: pa.Table, place: str, values: Values) -> None:
        data = encode_part(rows)
        name = f"part-{place}-{self.token}-{sha256_hex(data)}.parquet"
        part = Part(name, len(data), rows.num_rows, values, bounds_of(rows))
        # entered before it is written, so that a failed or interrupted write is cleaned up, too
        self.parts.append(part)
        if not self._dry:
            self._store.put_if_absent(f"{self._folder}/{part.name}", data)

    def discard(self) -> None:
        """Remove the files again: no version will name them."""
        for part in self.parts if not self._dry else ():
            self._store.delete(f"{self._folder}/{part.name}")


class PartEncoder:
    """The bytes of a Parquet file from rows that come some at a time, so that they need not be in memory together."""

    def __init__(self, schema: pa.Schema) -> None:
        self.rows = 0
        self.bounds = Bounds()
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd", write_page_checksum=True)

    def add(self, rows: pa.Table) -> None:
        """Take rows of the schema."""
        self.rows += rows.num_rows
        self.bounds.add(rows)
        self._writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)

    def finish(self) -> bytes:
        """The whole file."""
        self._writer.close()
        data: bytes = self._sink.getvalue().to_pybytes()
        return data


def put_part(
    store: Store, folder: str, version: int, place: int, token: str, encoder: PartEncoder, values: Values
) -> Part:
    """Write one data file that belongs to no version until a commit names it; for several writers at once.

    Args:
        store: where the table is.
        folder: of the table.
        version: of the table that will name it.
        place: of the file within the version: files are read in this order.
        token: 16 hex digits that these writers share and no others.
        encoder: with at least one row.
        values: of the table's partition columns in all its rows.
    """
    data = encoder.finish()
    name = f"part-{version:010d}-{place:05d}-{token}-{sha256_hex(data)}.parquet"
    part = Part(name, len(data), encoder.rows, values, encoder.bounds.told())
    store.put_if_absent(f"{folder}/{part.name}", data)
    return part
