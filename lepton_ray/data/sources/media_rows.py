"""Folders whose files become one row each: read one after the other, the bad ones rejected by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from lepton_ray.data.sources.media import Media
from lepton_ray.data.sources.rejects import Rejects, Unreadable
from lepton_ray.data.sources.streams import Meter
from lepton_ray.errors import shown
from lepton_ray.settings.reading import LimitSettings
from lepton_ray.storage import Input

BATCH_BYTES = 16 * 2**20
"""Bytes of files that become one table."""
BATCH_ROWS = 2048
AT_ONCE = 8
"""Files that are read and looked at together: a small object of S3 is mostly waiting."""


@dataclass(frozen=True)
class Item:
    """One file and what is known of it besides its content."""

    file: Input | None
    """None where there is no such file."""
    key: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further columns: label, transcript, boxes."""
    fault: tuple[str, str] | None = None
    """Rule and reason, where the item is rejected whatever the file holds."""
    check: Callable[[Mapping[str, Any]], None] = lambda _: None
    """Called with the file's columns; raises Unreadable where they do not fit what is known."""


@dataclass
class MediaRows:
    """The rows of a folder. `digest` is complete once all of them were read."""

    media: Media
    extra: pa.Schema
    """Columns that the items bring, after the key and before those of the file."""
    limits: LimitSettings
    rejects: Rejects
    meter: Meter

    def __post_init__(self) -> None:
        self._digest = hashlib.sha256()
        self.used: set[str] = set()
        """Paths of the files that became rows or were rejected."""

    @property
    def digest(self) -> str:
        """SHA-256 over path and content of each file read so far, and over what was known of it."""
        return self._digest.hexdigest()

    @property
    def schema(self) -> pa.Schema:
        """Of the rows."""
        return pa.schema([pa.field("key", pa.string()), *self.media.columns, *self.extra])

    def batches(self, items: Iterable[Item]) -> Iterator[pa.Table]:
        """Tables of some megabytes, in the order of the items.

        Raises IntegrityError naming a file that changed since it was found.
        """
        rows: list[dict[str, Any]] = []
        size = 0
        for item, found in self._read(items):
            if isinstance(found, Unreadable):
                self.rejects.add(item.key, None, found.rule, found.reason)
                continue
            rows.append({"key": item.key, **found, **item.extra})
            size += item.file.size if item.file is not None else 0
            if size >= BATCH_BYTES or len(rows) >= BATCH_ROWS:
                yield pa.Table.from_pylist(rows, schema=self.schema)
                rows, size = [], 0
        if rows:
            yield pa.Table.from_pylist(rows, schema=self.schema)

    def _read(self, items: Iterable[Item]) -> Iterator[tuple[Item, Mapping[str, Any] | Unreadable]]:
        """Each item with its row or its fault; a few files are read ahead."""
        waiting = iter(items)
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="lepton-read") as pool:
            while some := list(islice(waiting, AT_ONCE)):
                for item, outcome in zip(some, pool.map(self._row, some), strict=True):
                    digest, found = outcome
                    self._digest.update(f"{item.key}\0{digest}\0{sorted(item.extra.items())!r}\n".encode())
                    if item.file is not None:
                        self.used.add(item.file.path)
                    yield item, found

    def _row(self, item: Item) -> tuple[str, Mapping[str, Any] | Unreadable]:
        """Digest and row of an item."""
        if item.fault is not None:
            return "", Unreadable(*item.fault)
        if item.file is None:
            return "", Unreadable("file is missing", "nothing of that name in the folder; expected the file")
        if item.file.size > self.limits.max_object_bytes:
            limit = self.limits.max_object_bytes
            reason = f"{item.file.size} bytes; expected at most {limit} (limit max_object_bytes)"
            return "", Unreadable("file too large", reason)
        if item.file.size == 0:
            return "", Unreadable("file is empty", "0 bytes; expected content")
        data = item.file.read(self.meter.add)
        digest = hashlib.sha256(data).hexdigest()
        try:
            row = self.media.row(data, item.file.path, self.limits)
            item.check(row)
        except Unreadable as fault:
            return digest, fault
        return digest, row


class Paths:
    """Files by the names that others give them: the whole path, an end of it, or an absolute path that ends so."""

    def __init__(self, inputs: Iterable[Input]) -> None:
        self._whole = {entry.path: entry for entry in inputs}
        self._ends: dict[str, Input | None] = {}  # None where an end is that of several
        for path, entry in self._whole.items():
            parts = path.split("/")
            for start in range(1, len(parts)):
                end = "/".join(parts[start:])
                self._ends[end] = None if end in self._ends else entry

    def find(self, name: str) -> Input | None:
        """The file, None where there is none. Raises Unreadable where there are several."""
        name = name.replace("\\", "/").removeprefix("file://").removeprefix("./")
        if name in self._whole:
            return self._whole[name]
        if name in self._ends:
            if (found := self._ends[name]) is None:
                raise Unreadable("name of several files", f"{shown(name)} is in several folders; give the whole path")
            return found
        parts = name.split("/")
        ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
        return next((self._whole[end] for end in ends if end in self._whole), None) if name.startswith("/") else None
