"""Where rows come from: the built-in digits, and CSV, JSON lines and Parquet files.

A source is read once, as a stream of Arrow tables of one schema, so that a large file needs little memory. Which reader
a source gets is decided in `open_source` and nowhere else.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from lepton_ray.data.cleaning import KEY
from lepton_ray.data.column_types import check_text_columns, refuse_extensions, storable
from lepton_ray.data.digits import DIGITS, DIGITS_FULL, load_digits, load_digits_full
from lepton_ray.data.images import pack_pixel_columns, pixel_columns
from lepton_ray.data.json_lines import read_json_lines
from lepton_ray.errors import IntegrityError, UsageError, shown

MAX_FILE_BYTES = 20 * 10**9
"""Bytes of a source at most, compressed and uncompressed alike."""
BLOCK_BYTES = 4 * 2**20
"""Bytes of CSV parsed at a time: the longest row."""
PARQUET_ROWS = 4096
"""Rows of Parquet decoded at a time."""

Batches = Iterator[pa.Table]


@dataclass(frozen=True)
class Source:
    """Rows on their way into a table: a stream of tables of one schema, each with a column `key`."""

    name: str
    """As the user gave it."""
    digest: str
    """SHA-256 of the source's bytes: part of the keys that are made, and of the table's history."""
    batches: Batches


def open_source(source: str | pa.Table) -> Source:
    """The source behind a name, a path, a file:// URI, or rows in memory.

    A source without a column `key` gets one: the first 12 digits of the source's SHA-256, `-`, and the row's number in
    the source. Columns `pixel0`, `pixel1`, ... become the image columns. Nothing is read or
    fetched yet but the digest of a file.

    Raises UsageError for what is no source, and while the rows are read for rows that do not parse; RefusedError for
    Arrow extension types.
    """
    if isinstance(source, pa.Table):
        return Source("rows in memory", digest := _digest_of_rows(source), _finished(iter([source]), digest, "rows"))
    if source in BUILT_IN:
        digest, load = BUILT_IN[source]
        return Source(source, digest, _finished(_loaded(load), digest, f"source {source}"))
    path = _local_path(source)
    readers = [read for suffix, read in READERS.items() if path.name.lower().endswith(suffix)]
    if not readers:
        raise UsageError(f"source {shown(source)}: unknown kind; expected {accepted()}")
    size, changed = _check_file(path, source)
    where = f"source {shown(source)}"
    digest = _digest_of_file(path, where)
    batches = _finished(_translated(readers[0](path, where), where), digest, where)
    return Source(source, digest, _unchanged(batches, path, (size, changed), where))


def accepted() -> str:
    """The kinds of source, for messages."""
    return f"{', '.join(BUILT_IN)}, or a file that ends in {', '.join(READERS)}"


def _local_path(source: str) -> Path:
    """The path in a path or file:// URI."""
    scheme, separator, _ = source.partition("://")
    if not source or "\0" in source or (separator and scheme != "file"):
        raise UsageError(f"source {shown(source)}: not accepted; expected {accepted()}, as a path or file:// URI")
    if not separator:
        return Path(source).expanduser()
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise UsageError(f"source {shown(source)}: expected file:// and an absolute path")
    return Path(unquote(parts.path))


def _check_file(path: Path, source: str) -> tuple[int, int]:
    """Size and time of change of a regular file within the limit."""
    try:
        kind = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"source {shown(source)}: {reason}; expected {accepted()}") from error
    if not stat.S_ISREG(kind.st_mode):
        what = "a folder" if stat.S_ISDIR(kind.st_mode) else "no regular file"
        raise UsageError(f"source {shown(source)}: is {what}; expected {accepted()}")
    if not 0 < kind.st_size <= MAX_FILE_BYTES:
        raise UsageError(f"source {shown(source)}: {kind.st_size} bytes; expected 1 to {MAX_FILE_BYTES}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"source {shown(source)}: may not be read by this user; change its permissions")
    return kind.st_size, kind.st_mtime_ns


def _digest_of_file(path: Path, where: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror or error}; is the disk in order?") from error


def _digest_of_rows(rows: pa.Table) -> str:
    """SHA-256 of the rows as an Arrow stream."""
    refuse_extensions(rows.schema, "rows")
    digest = hashlib.sha256(rows.schema.remove_metadata().serialize())
    for batch in rows.combine_chunks().to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()


def _finished(batches: Batches, digest: str, where: str) -> Batches:
    """Each batch as a table wants it: pixels packed, types storable, a key as text."""
    start = 0
    for batch in batches:
        count = batch.num_rows
        rows = storable(pack_pixel_columns(batch), where)
        if KEY in rows.column_names:
            index = rows.column_names.index(KEY)
            rows = rows.set_column(index, KEY, _key_texts(rows[KEY], where))
        else:
            numbers = pa.array(range(start, start + count), pa.int64()).cast(pa.string())
            keys = pc.binary_join_element_wise(digest[:12], pc.utf8_lpad(numbers, 9, "0"), "-")
            rows = rows.add_column(0, KEY, keys)
        if rows.num_columns < 2:
            raise UsageError(f"{where}: has no column but {KEY}; a table needs something to learn from")
        start += count
        yield rows


def _key_texts(keys: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    if not (pa.types.is_string(keys.type) or pa.types.is_integer(keys.type)):
        raise UsageError(f"{where}: column {KEY} holds {keys.type}; a key is text or a whole number")
    return keys.cast(pa.string())


def _translated(batches: Batches, where: str) -> Batches:
    """The readers' errors in the house's own words."""
    try:
        yield from batches
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: cannot be read, {shown(' '.join(str(error).split()), 240)}") from error


def _unchanged(batches: Batches, path: Path, before: tuple[int, int], where: str) -> Batches:
    """The batches, and at the end a look whether the file is still the one that was begun."""
    yield from batches
    now = path.stat()
    if (now.st_size, now.st_mtime_ns) != before:
        raise IntegrityError(f"{where}: was changed while it was read; ingest it again")


class _Bounded(gzip.GzipFile):
    """A gzip file whose unpacked bytes are counted, so that a small file cannot become a huge one."""

    def __init__(self, path: Path, where: str) -> None:
        super().__init__(path, "rb")
        self._where, self._unpacked = where, 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._unpacked += len(data)
        if self._unpacked > MAX_FILE_BYTES:
            raise UsageError(f"{self._where}: unpacks to more than {MAX_FILE_BYTES} bytes; ingest it in pieces")
        return data


def _read_csv(path: Path, where: str) -> Batches:
    """Rows of a CSV file with a header. Types come from the first 4 MiB; a later value of another kind is an error."""
    with _open_csv(path, where) as reader:
        schema = reader.schema
        check_text_columns(schema, where)
    # pixels parsed as bytes from the start take an eighth of the memory
    pixels = [name for name in pixel_columns(schema.names) if pa.types.is_integer(schema.field(name).type)]
    with _open_csv(path, where, dict.fromkeys(pixels, pa.uint8())) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


@contextlib.contextmanager
def _open_csv(
    path: Path, where: str, types: dict[str, pa.DataType] | None = None
) -> Iterator[pa.csv.CSVStreamingReader]:
    packed = path.name.lower().endswith(".gz")
    with pa.PythonFile(_Bounded(path, where), mode="r") if packed else pa.OSFile(str(path)) as file:
        yield pa.csv.open_csv(
            file,
            read_options=pa.csv.ReadOptions(block_size=BLOCK_BYTES),
            # empty text is a missing value, as it is for numbers
            convert_options=pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True),
        )


def _read_parquet(path: Path, where: str) -> Batches:
    """Rows of a Parquet file; page checksums are verified where the file has them."""
    with pq.ParquetFile(
        path, page_checksum_verification=True, arrow_extensions_enabled=False, pre_buffer=False
    ) as file:
        refuse_extensions(file.schema_arrow, where)
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > MAX_FILE_BYTES:
            raise UsageError(f"{where}: unpacks to more than {MAX_FILE_BYTES} bytes; ingest it in pieces")
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            yield pa.Table.from_batches([batch])


def _loaded(load: Callable[[], pa.Table]) -> Batches:
    yield load()


BUILT_IN: dict[str, tuple[str, Callable[[], pa.Table]]] = {
    "digits": (DIGITS.sha256, load_digits),
    "digits-full": (DIGITS_FULL.sha256, load_digits_full),
}
"""Sources by name: SHA-256 of the package, and what loads the rows."""
READERS: dict[str, Callable[[Path, str], Batches]] = {
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".jsonl": read_json_lines,
    ".parquet": _read_parquet,
}
"""Readers of files by how the name ends."""
