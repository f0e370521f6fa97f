"""Looking at all pieces of a table: in this process with its threads, or on Ray Data with the workers of a cluster.

A piece is a data file, known by its number; work on it is a function of that number and some bytes, and gives tables.
Only those travel: the rows themselves are read and written where the work is done. Both ways give the same answers in
the same order.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

Pieces = dict[str, pa.Table]
Work = Callable[[int, bytes], Pieces]

BUCKETS = 16
"""Where rows meet that are to be compared; each is held in one memory."""


class Passes(Protocol):
    """The two ways to look at all pieces."""

    def each(self, work: Work, payloads: Sequence[bytes]) -> Iterator[Pieces]:
        """What the work says about each piece, in order."""

    def grouped(
        self, work: Work, payloads: Sequence[bytes], buckets: int, reduce: Callable[[pa.Table], pa.Table]
    ) -> Iterator[pa.Table]:
        """What becomes of each bucket of what the work says (its table `entries`, by the column `bucket`)."""


class Here:
    """In this process. Memory: a piece for each thread, and the largest bucket."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or max(1, len(os.sched_getaffinity(0)))

    def each(self, work: Work, payloads: Sequence[bytes]) -> Iterator[Pieces]:
        """See Passes."""
        work = partial(_tidied, work)
        if len(payloads) == 1 or self._threads == 1:
            yield from (work(index, payload) for index, payload in enumerate(payloads))
            return
        waiting: deque[Future[Pieces]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="pieces") as pool:
            try:
                for index, payload in enumerate(payloads):
                    waiting.append(pool.submit(work, index, payload))
                    if len(waiting) >= self._threads:  # no more pieces in memory than threads
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for each in waiting:
                    each.cancel()

    def grouped(
        self, work: Work, payloads: Sequence[bytes], buckets: int, reduce: Callable[[pa.Table], pa.Table]
    ) -> Iterator[pa.Table]:
        """See Passes."""
        with tempfile.TemporaryDirectory(prefix="lepton-buckets-") as folder:
            _spill((said["entries"] for said in self.each(work, payloads)), Path(folder), buckets)
            for path in sorted(Path(folder).iterdir()):
                with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
                    yield reduce(stream.read_all())


def _tidied(work: Work, index: int, payload: bytes) -> Pieces:
    """The work, and then what the allocator keeps for later goes back to the system: pieces are few and large."""
    said = work(index, payload)
    pa.default_memory_pool().release_unused()
    return said


def _spill(tables: Iterator[pa.Table], folder: Path, buckets: int) -> None:
    """Write each line to the file of its bucket."""
    writers: dict[int, tuple[pa.OSFile, pa.RecordBatchStreamWriter]] = {}
    try:
        for table in tables:
            numbers = table["bucket"].to_numpy()
            order = np.argsort(numbers, kind="stable")
            ordered, edges = table.take(pa.array(order)), np.searchsorted(numbers[order], np.arange(buckets + 1))
            for bucket in range(buckets):
                lines = ordered.slice(edges[bucket], edges[bucket + 1] - edges[bucket])
                if lines.num_rows == 0:
                    continue
                if bucket not in writers:
                    file = pa.OSFile(str(folder / f"{bucket:05d}.arrow"), "wb")
                    writers[bucket] = file, pa.ipc.new_stream(file, table.schema)
                writers[bucket][1].write_table(lines)
    finally:
        for file, writer in writers.values():
            writer.close()
            file.close()


class OnRay:
    """On Ray Data: a task for each piece, and its shuffle for the buckets. Ray must be connected."""

    def each(self, work: Work, payloads: Sequence[bytes]) -> Iterator[Pieces]:
        """See Passes."""
        found: dict[int, Pieces] = {}
        expected = 0
        for batch in _said(work, payloads).iter_batches(batch_size=None, batch_format="pyarrow"):
            for line in batch.to_pylist():
                found.setdefault(line["index"], {})[line["name"]] = _read(line["data"])
        while expected < len(payloads):
            yield found.pop(expected, {})
            expected += 1

    def grouped(
        self, work: Work, payloads: Sequence[bytes], buckets: int, reduce: Callable[[pa.Table], pa.Table]
    ) -> Iterator[pa.Table]:
        """See Passes."""

        def entries(batch: pa.Table) -> pa.Table:
            said = [work(line["index"], line["payload"])["entries"].combine_chunks() for line in batch.to_pylist()]
            return pa.concat_tables(said)

        lines = _pieces(payloads).map_batches(entries, batch_size=1, batch_format="pyarrow")
        reduced = lines.groupby("bucket").map_groups(reduce, batch_format="pyarrow")
        for batch in reduced.iter_batches(batch_size=None, batch_format="pyarrow"):
            if batch.num_rows:
                yield batch


def _pieces(payloads: Sequence[bytes]) -> Any:
    """A Ray data set with a line for each piece."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    lines = pa.table({"index": pa.array(range(len(payloads)), pa.int64()), "payload": pa.array(payloads, pa.binary())})
    # one block for each piece, so that each is a task of its own
    return ray.data.from_arrow([lines.slice(index, 1) for index in range(len(payloads))])


def _said(work: Work, payloads: Sequence[bytes]) -> Any:
    def run(batch: pa.Table) -> pa.Table:
        lines: dict[str, list[Any]] = {"index": [], "name": [], "data": []}
        for line in batch.to_pylist():
            for name, table in work(line["index"], line["payload"]).items():
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                for column, value in zip(lines, (line["index"], name, sink.getvalue().to_pybytes()), strict=True):
                    lines[column].append(value)
        kinds = {"index": pa.int64(), "name": pa.string(), "data": pa.large_binary()}
        return pa.table({name: pa.array(values, kinds[name]) for name, values in lines.items()})

    return _pieces(payloads).map_batches(run, batch_size=1, batch_format="pyarrow")


def _read(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as stream:
        return stream.read_all()
