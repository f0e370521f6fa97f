"""What others wrote and this program only reads: a file, an object, or a folder of them, found first and then streamed.

A store holds what lepton-ray wrote; an input may lie anywhere that a path, a file:// or an s3:// URI leads to. Each is
read as it was when it was found: one that changed meanwhile is an error with its name, never half old and half new.
"""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lepton_ray.errors import IntegrityError, UsageError, shown
from lepton_ray.storage.store import redacted

ACCEPTED = "a path, file:///absolute/path or s3://bucket/key"
BUFFER_BYTES = 8 * 2**20
"""Bytes asked for at a time where a file is read from one end to the other."""

OnRead = Callable[[int], None]


class Input(ABC):
    """One file or object, as it was when it was found."""

    __slots__ = ("name", "path", "size")

    def __init__(self, name: str, path: str, size: int) -> None:
        self.name = name
        """Path or URI, for messages."""
        self.path = path
        """Relative to the folder that was asked for, `/` between its parts; of a single file, its name."""
        self.size = size
        """Bytes."""

    @abstractmethod
    def _raw(self, on_read: OnRead) -> io.RawIOBase:
        """A seekable stream of bytes that calls `on_read` with the number of bytes that each read gave."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise IntegrityError if this is no longer what was found."""

    def open(self, on_read: OnRead = lambda _: None, buffer_bytes: int = BUFFER_BYTES) -> io.BufferedIOBase:
        """A seekable stream of the bytes.

        Raises UsageError where it may not be read, IntegrityError where it was changed or removed since it was found.
        """
        return io.BufferedReader(self._raw(on_read), buffer_bytes)

    def read(self, on_read: OnRead = lambda _: None) -> bytes:
        """All bytes. Errors as for `open`."""
        with self.open(on_read, max(8192, min(self.size, BUFFER_BYTES))) as stream:
            data = stream.read(self.size + 1)
        if len(data) != self.size:
            raise changed(self)
        return data


@dataclass(frozen=True)
class Found:
    """What a path or URI leads to."""

    is_folder: bool
    inputs: list[Input]
    """Sorted by path. Files and folders whose name begins with `.` or `_` are not among them, but for
    `_annotations.coco.json`."""


def changed(found: Input, how: str = "was changed while it was read") -> IntegrityError:
    """The error for an input that is not what was found."""
    return IntegrityError(f"source {redacted(found.name)}: {how}; read it again when nobody writes to it")


def is_hidden_input(path: str) -> bool:
    """Whether a path within a folder is some program's own business, e.g. `_SUCCESS` or `.DS_Store`."""
    parts = path.split("/")
    return any(part.startswith((".", "_")) for part in parts) and parts[-1] != "_annotations.coco.json"


def check_input_path(path: str, where: str) -> str:
    """The path itself where it may become a key of a row: printable text."""
    if not path.isprintable():
        raise UsageError(f"source {where}: name {shown(path)} is not printable text; rename it")
    return path


def find_inputs(uri: str, most: int) -> Found:
    """The file, object or files of the folder at a path or URI.

    Args:
        uri: a path, file:// or s3://.
        most: files of a folder at most.

    Raises UsageError for what is nothing of that or is not there, UnavailableError when a remote does not answer.
    """
    if not uri or "\0" in uri:
        raise UsageError(f"source {shown(uri)}: expected {ACCEPTED}")
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return _find_local(Path(uri).expanduser(), uri, most)
    if scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UsageError(f"source {shown(uri)}: expected file:// and an absolute path")
        return _find_local(Path(unquote(parts.path)), uri, most)
    if scheme == "s3":
        from lepton_ray.storage.s3_inputs import find_objects

        return find_objects(uri, most)
    raise UsageError(f"source {redacted(uri)}: unknown scheme {shown(scheme)}; expected {ACCEPTED}")


class LocalInput(Input):
    """A file of a disk."""

    __slots__ = ("_file", "_identity")

    def __init__(self, file: str, path: str, found: os.stat_result) -> None:
        super().__init__(file, path, found.st_size)
        self._file = file
        self._identity = _identity(found)

    def _raw(self, on_read: OnRead) -> io.RawIOBase:
        try:
            # a pipe that took the file's place must not hang the reader
            number = os.open(self._file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise changed(self, "is gone since it was found") from error
        except OSError as error:
            raise UsageError(f"source {shown(self.name)}: {error.strerror}; give this user the right to it") from error
        raw = _CountedFile(number, on_read)
        if _identity(os.fstat(number)) != self._identity:
            raw.close()
            raise changed(self)
        return raw

    def check_unchanged(self) -> None:
        """See Input."""
        try:
            same = _identity(Path(self._file).stat()) == self._identity
        except OSError as error:
            raise changed(self, "is gone since it was found") from error
        if not same:
            raise changed(self)


class _CountedFile(io.FileIO):
    """A file that tells how much was read of it."""

    def __init__(self, number: int, on_read: OnRead) -> None:
        super().__init__(number, "rb")
        self._on_read = on_read

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override] # the stub's type is private
        count = super().readinto(buffer) or 0
        self._on_read(count)
        return count


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _find_local(path: Path, uri: str, most: int) -> Found:
    try:
        kind = path.stat()
        if stat.S_ISDIR(kind.st_mode):
            return Found(True, _walk(path, uri, most))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"source {shown(uri)}: {reason}; expected {ACCEPTED}") from error
    if not stat.S_ISREG(kind.st_mode):
        raise UsageError(f"source {shown(uri)}: is no regular file; expected a file or a folder")
    return Found(False, [LocalInput(str(path), path.name, kind)])


def _walk(folder: Path, uri: str, most: int) -> list[Input]:
    """All files in a folder and below. A link to a file counts as the file; one to a folder is an error."""

    def fail(error: OSError) -> None:
        raise error  # a folder that may not be read must not look like an empty one

    found: list[Input] = []
    for where, folders, files in os.walk(folder, onerror=fail):
        below = os.path.relpath(where, folder)
        folders[:] = sorted(name for name in folders if not is_hidden_input(f"{name}/x"))
        for name in folders:
            if Path(where, name).is_symlink():
                raise UsageError(
                    f"source {shown(uri)}: folder {shown(name)} is a symbolic link; give the folder that it leads to"
                )
        for name in files:
            relative = name if below == "." else f"{below}/{name}"
            if is_hidden_input(relative):
                continue
            kind = Path(where, name).stat()
            if not stat.S_ISREG(kind.st_mode):
                raise UsageError(f"source {shown(uri)}: {shown(relative)} is no regular file; remove it")
            found.append(LocalInput(str(Path(where, name)), check_input_path(relative, shown(uri)), kind))
        if len(found) > most:
            raise UsageError(f"source {shown(uri)}: more than {most} files; raise the limit max_files or split it")
    return sorted(found, key=lambda entry: entry.path)
