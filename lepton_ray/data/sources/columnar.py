"""Parquet and Arrow files: types come with them, and so may traps, which are looked for before the library opens them.

An extension type runs code of its library when a column is converted, and a file of some kilobytes may claim to unpack
to gigabytes. Both stand in the metadata, so nothing of the data is touched to find them.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedIOBase

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.data.column_types import EXTENSION_MARK, refusal, refuse_extensions, refuse_marked_extensions
from lepton_ray.data.sources.arrow_messages import Message, next_message
from lepton_ray.data.sources.cells import PIECE_BYTES
from lepton_ray.data.sources.parquet_pages import longest_text
from lepton_ray.data.sources.streams import Job
from lepton_ray.errors import UsageError, shown

BATCH_BYTES = 16 * 2**20
"""Bytes of rows that are handed on together, about."""
BATCH_ROWS = 4096
"""Rows decoded at a time at most."""
_MAGIC = b"ARROW1\0\0"


def read_parquet(job: Job, known: pa.Schema | None) -> Iterator[pa.Table]:
    """The rows of one Parquet file; page checksums are verified where the file has them.

    Raises RefusedError for extension types, UsageError for what is no whole Parquet file, unpacks to more than the
    limits allow, or has other columns than the files before.
    """
    with job.open() as stream:
        _check_footer(stream, job)
        refuse_marked_extensions(stream, job.where)
        stream.seek(0)
        with pq.ParquetFile(
            pa.PythonFile(stream, mode="r"),
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
            pre_buffer=False,
            buffer_size=2**20,
        ) as file:
            refuse_extensions(file.schema_arrow, job.where)
            if known is not None:
                job.check_schema(file.schema_arrow, known)
            for index in range(file.metadata.num_row_groups):
                rows = _rows_at_once(file, index, stream, job)
                batches = file.iter_batches(batch_size=rows, row_groups=[index])
                yield from _joined(pa.Table.from_batches([batch]) for batch in batches)


def _check_footer(stream: BufferedIOBase, job: Job) -> None:
    """Raise UsageError where the file does not end as Parquet does, or with metadata beyond the limit."""
    start = stream.read(4)
    stream.seek(max(0, job.input.size - 8))
    end = stream.read(8)
    if start != b"PAR1" or end[4:] != b"PAR1":
        what = "begins" if start != b"PAR1" else "ends"
        seen = start if start != b"PAR1" else end[4:]
        raise UsageError(f"{job.where}: no whole Parquet file, {what} with {seen!r}; expected b'PAR1'")
    length = int.from_bytes(end[:4], "little")
    if length > min(job.reading.limits.max_footer_bytes, job.input.size - 12):
        raise UsageError(
            f"{job.where}: metadata of {length} bytes in a file of {job.input.size}; expected at most "
            f"{job.reading.limits.max_footer_bytes} (limit max_footer_bytes)"
        )


def _rows_at_once(file: pq.ParquetFile, index: int, stream: BufferedIOBase, job: Job) -> int:
    """Rows of a row group to decode together, so that they take some 64 MB at most.

    A text that stands once in a dictionary may be the value of every row, and a list may be long in few bytes.
    """
    group, limit = file.metadata.row_group(index), job.reading.limits.max_unpacked_bytes
    if group.total_byte_size > limit:
        raise UsageError(
            f"{job.where}: a row group unpacks to {group.total_byte_size} bytes; expected at most {limit} "
            "(limit max_unpacked_bytes)"
        )
    longest = 1
    for position in range(group.num_columns):
        column, described = group.column(position), file.schema.column(position)
        if described.max_repetition_level:
            values = column.num_values * 8
            if values > limit:
                raise UsageError(
                    f"{job.where}: column {shown(described.path)} has lists of {column.num_values} values in one row "
                    f"group; expected at most {limit} bytes of them (limit max_unpacked_bytes)"
                )
            longest += values // max(1, group.num_rows)
        if column.physical_type == "BYTE_ARRAY":
            longest += longest_text(column, stream)
    return max(1, min(BATCH_ROWS, PIECE_BYTES // longest))


def _joined(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables of some rows made larger where they are small: what comes after has a price per table."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(len(rows) for rows in waiting) >= BATCH_ROWS or sum(rows.nbytes for rows in waiting) >= BATCH_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def read_arrow(job: Job, known: pa.Schema | None) -> Iterator[pa.Table]:
    """The rows of one Arrow file or stream (also Feather version 2). Raises as `read_parquet` does."""
    with job.open() as stream:
        _check_messages(stream, job)
        stream.seek(0)
        is_file = stream.read(len(_MAGIC)) == _MAGIC
        stream.seek(0)
        source = pa.PythonFile(stream, mode="r")
        if is_file:
            file = pa.ipc.open_file(source)
            schema, count = file.schema, file.num_record_batches
            batches = (file.get_batch(index) for index in range(count))
        else:
            reader = pa.ipc.open_stream(source)
            schema, batches = reader.schema, iter(reader)
        refuse_extensions(schema, job.where)
        if known is not None:
            job.check_schema(schema, known)
        for batch in batches:
            whole = pa.Table.from_batches([batch], schema)
            for start in range(0, len(whole), BATCH_ROWS):
                yield whole.slice(start, BATCH_ROWS)


def _check_messages(stream: BufferedIOBase, job: Job) -> None:
    """Look at all metadata of the file before the library does: extension types, and what batches unpack to."""
    limits = job.reading.limits
    start = stream.read(len(_MAGIC))
    stream.seek(len(_MAGIC) if start == _MAGIC else 0)
    first = True
    while (message := next_message(stream, job.input.size, limits.max_footer_bytes, job.where)) is not None:
        if first and EXTENSION_MARK in message.metadata:
            raise refusal(job.where, "a column")
        first = False
        _check_size(message, limits.max_batch_bytes, job.where)
    if start == _MAGIC:
        stream.seek(max(0, job.input.size - 10))
        length = int.from_bytes(stream.read(4), "little")
        if stream.read(6) != _MAGIC[:6] or not 0 < length <= min(limits.max_footer_bytes, job.input.size):
            raise UsageError(f"{job.where}: no whole Arrow file, its end is missing; write it again")
        stream.seek(max(0, job.input.size - 10 - length))
        if EXTENSION_MARK in stream.read(length):
            raise refusal(job.where, "a column")


def _check_size(message: Message, limit: int, where: str) -> None:
    if message.unpacked > limit:
        raise UsageError(
            f"{where}: a batch unpacks to {message.unpacked} bytes; expected at most {limit} (limit max_batch_bytes)"
        )
