"""From what a user names to a stream of rows. Which reader a source gets is decided in `shapes` and looked up here."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.data.column_types import storable
from lepton_ray.data.digits import DIGITS, DIGITS_FULL, load_digits, load_digits_full
from lepton_ray.data.images import pack_pixel_columns
from lepton_ray.data.sources.cells import in_pieces, within_limits
from lepton_ray.data.sources.columnar import read_arrow, read_parquet
from lepton_ray.data.sources.csv_files import read_csv
from lepton_ray.data.sources.folders import media_rows
from lepton_ray.data.sources.json_lines import read_json_lines
from lepton_ray.data.sources.memory import arrow_of, digest_of_rows, in_batches
from lepton_ray.data.sources.rejects import Rejects
from lepton_ray.data.sources.shapes import Shape, shape_of
from lepton_ray.data.sources.shapes import accepted as accepted_shapes
from lepton_ray.data.sources.streams import Job, Meter
from lepton_ray.errors import UsageError, shown
from lepton_ray.settings.reading import ReadingSettings
from lepton_ray.storage import Input, find_inputs

KEY = "key"
MAX_WARNINGS = 100
Batches = Iterator[pa.Table]
Reader = Callable[[Job, pa.Schema | None], Batches]

READERS: dict[str, Reader] = {
    "csv": read_csv,
    "jsonl": read_json_lines,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
"""Readers of tables by format; the other formats are folders, see `folders`."""
BUILT_IN: dict[str, tuple[str, Callable[[], pa.Table]]] = {
    "digits": (DIGITS.sha256, load_digits),
    "digits-full": (DIGITS_FULL.sha256, load_digits_full),
}
"""Sources by name: SHA-256 of the package, and what loads the rows."""


@dataclass
class Source:
    """Rows on their way into a table: a stream of tables of one schema, each with a column `key`."""

    name: str
    """As the user gave it."""
    digest: str
    """SHA-256 of the source's bytes (of a folder, over names and contents): part of the keys that are made, and of the
    table's history. Of files it is known once all rows were read."""
    batches: Batches
    rejects: Rejects = field(default_factory=Rejects)
    """Rows that could not be read; grows as the rows are."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Files of a folder that are not of its format, by ending."""
    made_keys: bool = False
    """Whether the keys were made here, and so differ; known once the first rows were read."""
    warnings: list[str] = field(default_factory=list)
    """What is no fault but hardly meant, e.g. two files of a folder with the same content; the first 100."""
    meter: Meter = field(default_factory=Meter)
    """How far the reading is."""


def accepted() -> str:
    """The kinds of source, for messages."""
    return accepted_shapes(tuple(BUILT_IN))


def open_source(source: Any, reading: ReadingSettings = ReadingSettings()) -> Source:  # noqa: B008 - frozen
    """The source behind a name, a path, a file:// or s3:// URI, or rows in memory.

    A row without a column `key` gets one: the first 12 digits of its file's SHA-256, `-`, and the row's number in the
    file; of a folder of images, recordings or texts, the path of its file in the folder. Columns `pixel0`, `pixel1`,
    ... become the image columns. Nothing is read yet but names and sizes.

    Args:
        source: text, or an Arrow table, a pandas or polars frame, a Hugging Face or Ray data set.
        reading: format, types and limits.

    Raises UsageError for what is no source, and while the rows are read for rows that do not parse; RefusedError for
    Arrow extension types and formats that run code; IntegrityError for a file that changes meanwhile.
    """
    if not isinstance(source, str):
        rows = arrow_of(source)
        opened = Source("rows in memory", digest_of_rows(rows), iter(()))
        opened.batches = _finished(in_batches(rows), opened, reading, "rows", opened.digest)
        return opened
    where = f"source {shown(source)}"
    if source in BUILT_IN:
        digest, load = BUILT_IN[source]
        opened = Source(source, digest, iter(()))
        opened.batches = _finished(_loaded(load), opened, reading, where, digest)
        return opened
    try:
        found = find_inputs(source, reading.limits.max_files)
    except UsageError as error:
        raise UsageError(f"{error}; accepted are {accepted()}") from error
    shape = shape_of(found, where, reading.format, accepted())
    total = sum(entry.size for entry in shape.files)
    if total > reading.limits.max_source_bytes:
        limit = reading.limits.max_source_bytes
        raise UsageError(f"{where}: {total} bytes; expected at most {limit} (limit max_source_bytes)")
    opened = Source(source, "", iter(()), ignored=shape.ignored or Counter(), meter=Meter(total))
    if shape.format in READERS:
        opened.batches = _translated(_tables(shape, opened, reading, where, single=not found.is_folder), where)
        return opened
    job = Job(shape.files[0], where, reading, opened.rejects, opened.meter)
    opened.batches = _translated(_media(shape, opened, job), where)
    return opened


def _tables(shape: Shape, opened: Source, reading: ReadingSettings, where: str, *, single: bool) -> Batches:
    """The rows of one file after the other, all with the columns of the first."""
    known: pa.Schema | None = None
    schema: pa.Schema | None = None
    whole = hashlib.sha256()
    listed: dict[str, str] = {}
    for entry in shape.files:
        here = where if single else f"{where} file {shown(entry.path)}"
        if entry.size == 0:
            raise UsageError(f"{here}: 0 bytes, no rows in it; remove it or write it again")
        job = Job(entry, here, reading, opened.rejects, opened.meter)
        digest = job.digest()
        whole.update(f"{entry.path}\0{digest}\n".encode())
        opened.digest = digest if single else whole.hexdigest()
        if (same := listed.setdefault(digest, entry.path)) != entry.path:
            if len(opened.warnings) < MAX_WARNINGS:
                opened.warnings.append(f"file {shown(entry.path)} is the same as {shown(same)}")
            digest = hashlib.sha256(f"{entry.path}\0{digest}".encode()).hexdigest()  # keys of its own
        raw = READERS[shape.format](job, known)
        first, raw = _peeked(raw)
        if first is not None and known is None:
            known = first.schema
        in_order = (rows.select(known.names) for rows in raw) if known is not None else raw
        for rows in _finished(in_order, opened, reading, here, digest, entry):
            if schema is not None and rows.schema != schema:  # what no reader should let through
                raise UsageError(f"{here}: columns {shown(rows.schema, 200)}; expected {shown(schema, 200)}")
            schema = rows.schema
            yield rows
        entry.check_unchanged()


def _peeked(batches: Batches) -> tuple[pa.Table | None, Batches]:
    """The first table, and all of them."""
    first = next(batches, None)

    def again() -> Batches:
        if first is not None:
            yield first
            yield from batches

    return first, again()


def _media(shape: Shape, opened: Source, job: Job) -> Batches:
    """The rows of a folder of files, one each."""
    rows, batches = media_rows(shape, job)
    for batch in batches:
        yield from _finished(iter([batch]), opened, job.reading, job.where, "")
    opened.digest = rows.digest
    media = [entry.path for entry in shape.files if entry.path.lower().endswith(rows.media.endings)]
    if unnamed := [path for path in media if path not in rows.used]:
        opened.warnings.append(f"{len(unnamed)} files without an annotation, not read; one is {shown(unnamed[0])}")
    if opened.rejects.total == 0 and job.meter.done == 0:
        raise UsageError(f"{job.where}: no rows in it")


def _finished(
    batches: Batches, opened: Source, reading: ReadingSettings, where: str, digest: str, entry: Input | None = None
) -> Batches:
    """Each batch as a table wants it: no cell too large, pixels packed, types storable, a key as text."""
    start = 0
    for batch in batches:
        count = batch.num_rows
        kept, has_keys = batch, KEY in batch.column_names
        if not has_keys:
            opened.made_keys = True
            numbers = pa.array(range(start, start + count), pa.int64()).cast(pa.string())
            keys = pc.binary_join_element_wise(digest[:12], pc.utf8_lpad(numbers, 9, "0"), "-")
            kept = batch.add_column(0, KEY, keys)
        file = opened.name if entry is None else entry.name
        kept = within_limits(kept, reading.limits, file, start + 1, opened.rejects)
        for piece in in_pieces(kept):
            rows = storable(pack_pixel_columns(piece), where)
            index = rows.column_names.index(KEY)
            rows = rows.set_column(index, KEY, _key_texts(rows[KEY], where))
            if not has_keys:  # keys that are made come first
                rows = rows.select([KEY, *(name for name in rows.column_names if name != KEY)])
            if rows.num_columns < 2:
                raise UsageError(f"{where}: has no column but {KEY}; a table needs something to learn from")
            yield rows
        start += count


def _key_texts(keys: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    if not (pa.types.is_string(keys.type) or pa.types.is_integer(keys.type)):
        raise UsageError(f"{where}: column {KEY} holds {keys.type}; a key is text or a whole number")
    return keys.cast(pa.string())


def _translated(batches: Batches, where: str) -> Batches:
    """The libraries' errors in the house's own words."""
    try:
        yield from batches
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: cannot be read, {shown(' '.join(str(error).split()), 240)}") from error


def _loaded(load: Callable[[], pa.Table]) -> Batches:
    yield load()
