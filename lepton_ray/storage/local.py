"""A store in a folder of a local disk or a shared file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lepton_ray.errors import (
    ConflictError,
    LeptonError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
    shown,
)
from lepton_ray.storage.durable import make_folders, read_file, sync_folder, temporary_file, within
from lepton_ray.storage.store import (
    HIDDEN,
    Entries,
    Entry,
    Names,
    Store,
    Stored,
    check_key,
    check_prefix,
    is_hidden,
    sha256_hex,
)

TRIES = 10
"""How often a write is begun anew when its folder is deleted meanwhile."""
LOCKS = 256
"""Lock files per store: writers of different keys seldom wait for each other, and the folder stays small."""


class LocalStore(Store):
    """Objects are files; etags are SHA-256 of the content.

    A write goes to a hidden temporary file of the same folder, which is made durable and then moved or linked into
    place. What a killed writer leaves behind is a hidden file that no listing shows.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self.uri = self._folder.as_uri()

    def get(self, key: str) -> bytes:
        """See Store. Without the hashing that `fetch` does for its etag."""
        with self._errors_of(key):
            try:
                return read_file(self._path(key))
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NotFoundError(f"key {shown(key)}: no such object in store {self.uri}") from error

    def fetch(self, key: str) -> Stored:
        """See Store."""
        data = self.get(key)
        return Stored(data, sha256_hex(data))

    def put(self, key: str, data: bytes) -> str:
        """See Store."""

        def commit(temporary: Path, path: Path) -> None:
            with self._lock(key):
                temporary.replace(path)

        return self._write(key, data, commit)

    def put_if_absent(self, key: str, data: bytes) -> str:
        """See Store."""

        def commit(temporary: Path, path: Path) -> None:
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                # NFS may say "exists" to the retransmission of a link that it made: then the file has two names
                if temporary.stat().st_nlink != 2:
                    raise ConflictError(f"key {shown(key)}: exists already in store {self.uri}") from error

        return self._write(key, data, commit)

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """See Store."""

        def commit(temporary: Path, path: Path) -> None:
            with self._lock(key):
                try:
                    now = self.fetch(key).etag
                except NotFoundError as error:
                    raise ConflictError(f"key {shown(key)}: is gone from store {self.uri}; read it again") from error
                if now != etag:
                    raise ConflictError(f"key {shown(key)}: was changed by somebody else in store {self.uri}")
                temporary.replace(path)

        return self._write(key, data, commit)

    def exists(self, key: str) -> bool:
        """See Store."""
        with self._errors_of(key):
            return self._path(key).is_file()

    def list(self, prefix: str) -> Entries:
        """See Store."""
        folder = check_prefix(prefix)
        with self._errors_of(folder):
            return sorted(self._walk(folder), key=lambda entry: entry.key)

    def list_names(self, prefix: str) -> Names:
        """See Store."""
        folder = check_prefix(prefix)
        names = []
        with self._errors_of(folder):
            for found in self._scan(folder):
                key = f"{folder}/{found.name}" if folder else found.name
                # an empty folder is what a delete leaves behind; an object store would not show it
                if not found.is_dir(follow_symlinks=False) or next(self._walk(key), None) is not None:
                    names.append(found.name)
        return sorted(names)

    def delete(self, key: str) -> None:
        """See Store."""
        with self._errors_of(key), contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path = self._path(key)
            if path.parent.is_dir() and not path.is_dir():
                with self._lock(key):
                    path.unlink()
                    sync_folder(path.parent)

    def delete_prefix(self, prefix: str) -> int:
        """See Store."""
        folder = check_key(check_prefix(prefix))
        count = len(self.list(folder))
        with self._errors_of(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path = self._path(folder)
            if path.is_dir():
                # first out of sight in one step: nobody sees a part of it, nobody writes into what is being deleted
                doomed = path.rename(path.parent / f"{HIDDEN}-deleted-{secrets.token_hex(8)}")
                sync_folder(path.parent)
                shutil.rmtree(doomed)
        return count

    def check_writable(self) -> None:
        """See Store."""
        first, second = (self._folder / f"{HIDDEN}-probe-{secrets.token_hex(8)}" for _ in range(2))
        try:
            with self._errors_of(""):
                try:
                    make_folders(self._folder)
                    first.write_bytes(b"probe")
                    os.link(first, second)
                finally:
                    for probe in (first, second):
                        with contextlib.suppress(NotADirectoryError):
                            probe.unlink(missing_ok=True)
        except UnavailableError:
            raise
        except LeptonError as error:
            raise UsageError(str(error)) from error

    def delta_uri(self, key: str) -> str:
        """See Store."""
        with self._errors_of(key):
            return str(self._path(key))

    def delta_options(self) -> dict[str, str]:
        """See Store."""
        return {}

    def _path(self, key: str) -> Path:
        """The file of a key. Raises RefusedError where a symbolic link leads out of the store."""
        path = self._folder / check_key(key)
        if not within(path, self._folder):
            raise RefusedError(f"key {shown(key)}: a symbolic link leads out of store {self.uri}; remove the link")
        return path

    def _scan(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """Visible folders and files of a folder; a link counts only where it leads to a file of the store."""
        path = self._path(folder) if folder else self._folder
        try:
            with os.scandir(path) as found:
                entries = list(found)
        except (FileNotFoundError, NotADirectoryError):
            return  # empty, or deleted while we looked
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_symlink() and not within(Path(entry.path), self._folder):
                continue
            # Path.is_file, unlike that of the entry, takes a link that leads nowhere
            if entry.is_dir(follow_symlinks=False) or Path(entry.path).is_file():
                yield entry

    def _walk(self, folder: str) -> Iterator[Entry]:
        """All visible files in a folder and below."""
        for found in self._scan(folder):
            key = f"{folder}/{found.name}" if folder else found.name
            if found.is_dir(follow_symlinks=False):
                yield from self._walk(key)
            else:
                with contextlib.suppress(FileNotFoundError):  # deleted while we looked
                    yield Entry(key, found.stat().st_size)

    def _write(self, key: str, data: bytes, commit: Callable[[Path, Path], None]) -> str:
        """Write a durable temporary file beside the key's path, have it committed, and return the etag."""
        with self._errors_of(key):
            path = self._path(key)
            if path.is_dir():
                raise UsageError(f"key {shown(key)}: is a folder in store {self.uri}; give the name of a file")
            for left in reversed(range(TRIES)):
                try:
                    with temporary_file(path.parent, data) as temporary:
                        commit(temporary, path)
                        sync_folder(path.parent)
                        break
                except FileNotFoundError:  # somebody deleted the folder under our hands: make it again
                    if not left:
                        raise
        return sha256_hex(data)

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Exclusive among threads, processes and (where the file system has locks) hosts that change this key."""
        name = f"lock-{int(sha256_hex(key.encode()), 16) % LOCKS:02x}"
        folder = self._folder / HIDDEN
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)  # closing lets go of the lock

    @contextlib.contextmanager
    def _errors_of(self, key: str) -> Iterator[None]:
        """The errors of the operating system in the house's own words."""
        try:
            yield
        except OSError as error:
            raise _translated(error, f"store {self.uri}" + (f", key {shown(key)}" if key else "")) from error


def _translated(error: OSError, where: str) -> LeptonError:
    """The error that says in one line what the disk refused."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LeptonError(f"{where}: the disk is full ({reason}); free some space or choose another store")
    if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN):
        return UnavailableError(f"{where}: the disk does not answer ({reason}); try again or check the mount")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"{where}: not allowed ({reason}); give the folder to this user or choose another store")
    if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
        return UsageError(f"{where}: the file system lacks what a store needs ({reason}); use another disk or s3://")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG):
        return UsageError(f"{where}: cannot be a folder of a store ({reason}); choose another store or name")
    return LeptonError(f"{where}: {reason}")
