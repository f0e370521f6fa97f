"""One file on its way into a table: its bytes, unpacked and counted, and what is known of the files before it."""

from __future__ import annotations

import gzip
import hashlib
import io
from dataclasses import dataclass, field

import pyarrow as pa

from lepton_ray.data.sources.rejects import Rejects
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.reading import ReadingSettings
from lepton_ray.storage import Input


@dataclass
class Meter:
    """How far the reading is."""

    total: int = 0
    """Bytes of the source."""
    done: int = 0
    """Bytes read of them."""

    def add(self, count: int) -> None:
        """Enter bytes read."""
        self.done += count

    @property
    def share(self) -> float | None:
        """0 to 1; None where nobody knows."""
        return min(1.0, self.done / self.total) if self.total else None


@dataclass(frozen=True)
class Job:
    """One file, how to read it, and where to account for it."""

    input: Input
    where: str
    """How a message begins: `source 'path'`."""
    reading: ReadingSettings
    rejects: Rejects = field(default_factory=Rejects)
    meter: Meter = field(default_factory=Meter)

    @property
    def packed(self) -> bool:
        """Whether the file is gzip."""
        return self.input.path.lower().endswith(".gz")

    def open(self, *, counted: bool = True) -> io.BufferedIOBase:
        """The bytes, unpacked; `counted` tells the meter. Raises UsageError and IntegrityError as they are read."""
        stream = self.input.open(self.meter.add if counted else lambda _: None)
        if self.packed:
            return _Bounded(stream, self.reading.limits.max_source_bytes, self.where)
        return stream

    def digest(self) -> str:
        """SHA-256 of the bytes as they lie there."""
        with self.input.open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def check_names(self, names: list[str], known: list[str]) -> None:
        """Raise UsageError where the columns are not those of the files before, in whatever order."""
        for name in known:
            if name not in names:
                raise UsageError(f"{self.where}: no column {shown(name)}; the files before have it")
        for name in names:
            if name not in known:
                raise UsageError(f"{self.where}: column {shown(name)} is not in the files before")

    def check_schema(self, schema: pa.Schema, known: pa.Schema) -> None:
        """As `check_names`, and where a column holds another type."""
        self.check_names(schema.names, known.names)
        for column in known:
            kind = schema.field(column.name).type
            if kind != column.type:
                raise UsageError(
                    f"{self.where}: column {shown(column.name)} holds {kind}; the files before hold {column.type}"
                )


class _Bounded(gzip.GzipFile):
    """A gzip file whose unpacked bytes are counted, so that a small file cannot become a huge one."""

    def __init__(self, stream: io.BufferedIOBase, limit: int, where: str) -> None:
        super().__init__(fileobj=stream, mode="rb")
        self._stream, self._limit, self._where, self._unpacked = stream, limit, where, 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._count(len(data))
        return data

    def readline(self, size: int | None = -1) -> bytes:
        data = super().readline(-1 if size is None else size)
        self._count(len(data))
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._unpacked = 0
        return super().seek(offset, whence)

    def close(self) -> None:
        super().close()
        self._stream.close()

    def _count(self, count: int) -> None:
        self._unpacked += count
        if self._unpacked > self._limit:
            raise UsageError(f"{self._where}: unpacks to more than {self._limit} bytes; ingest it in pieces")
