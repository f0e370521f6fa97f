"""The `Store` interface, the rules for keys and URIs, and `open_store`."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import unquote

from lepton_ray.errors import UsageError, shown

DEFAULT_STORE = "./lepton-store"
ACCEPTED = "file:///absolute/path, s3://bucket/prefix, or the path of a folder"
HIDDEN = ".lepton"
"""Names that begin so are the store's own (temporary files, locks, probes): never listed, never accepted in a key."""
MAX_KEY_BYTES = 1024
"""S3's own limit."""
MAX_NAME_BYTES = 255
"""The longest file name of the usual file systems; kept on S3 too, so that a store can be copied."""
_USER_INFO = re.compile(r"(?<=//)[^/]*@")


@dataclass(frozen=True)
class Entry:
    """One object of a listing."""

    key: str
    """Relative to the store."""
    size: int
    """Bytes."""


# inside the class the method `list` hides the builtin, also for annotations
Entries: TypeAlias = list[Entry]
Names: TypeAlias = list[str]


@dataclass(frozen=True)
class Stored:
    """The content of an object together with the etag that `Store.replace` wants back."""

    data: bytes
    etag: str
    """Opaque: changes whenever the content changes."""


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def redacted(uri: str) -> str:
    """A URI as it may stand in a message: escaped, cut, and without user and password."""
    return shown(_USER_INFO.sub("***@", uri), 200)


def check_key(key: str) -> str:
    """The key itself where it is valid.

    Keys are relative and `/`-separated, printable, at most 1024 bytes, each name at most 255 bytes; no name is empty,
    `.`, `..` or begins with `.lepton`. Raises UsageError.
    """
    names = key.split("/")
    if not key.isprintable() or "\\" in key or len(key.encode()) > MAX_KEY_BYTES:
        raise UsageError(f"key {shown(key)}: expected at most {MAX_KEY_BYTES} bytes of printable text without '\\'")
    for name in names:
        if name in ("", ".", "..") or name.startswith(HIDDEN) or len(name.encode()) > MAX_NAME_BYTES:
            raise UsageError(
                f"key {shown(key)}: part {shown(name)} is not accepted; expected relative names joined by '/', "
                f"none empty, '.', '..', begun by '{HIDDEN}' or longer than {MAX_NAME_BYTES} bytes"
            )
    return key


def check_prefix(prefix: str) -> str:
    """The folder that a listing is asked for, without a slash at its end; `""` is the whole store."""
    bare = prefix.removesuffix("/")
    return check_key(bare) if bare else ""


def is_hidden(key: str) -> bool:
    """Whether a key found in a listing is the store's own business."""
    return any(name.startswith(HIDDEN) for name in key.split("/"))


class Store(ABC):
    """Whole objects under relative keys, on a disk or an object store.

    Every write is atomic: a reader sees the old object, the new one or none, never a part of one, whatever kills the
    writer. A store may be used from several threads and, sent by its URI, from several processes and hosts.
    Every method raises UsageError for a bad key, missing rights or a missing bucket, and UnavailableError when a
    remote does not answer within its deadline.
    """

    uri: str
    """Canonical, without a slash at its end: `file:///absolute/path` or `s3://bucket/prefix`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        """Stores travel by their URI: connections, locks and credentials stay in the process that has them."""
        return open_store, (self.uri,)

    def get(self, key: str) -> bytes:
        """The content of an object. Raises NotFoundError."""
        return self.fetch(key).data

    @abstractmethod
    def fetch(self, key: str) -> Stored:
        """Content and etag, read together. Raises NotFoundError."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> str:
        """Write or overwrite; returns the new etag."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> str:
        """Write where nothing is yet; returns the etag. Of any number of racing callers exactly one succeeds.

        Raises ConflictError when the object exists, with whatever content. Where the answer of a remote was lost, the
        object is looked at: if it is this very write that made it, that is a success.
        """

    @abstractmethod
    def replace(self, key: str, data: bytes, etag: str) -> str:
        """Compare-and-swap: overwrite only while the object still has this etag; returns the new etag.

        Raises ConflictError when it has another one or is gone. A lost answer is treated as by `put_if_absent`.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object under this very key (a folder is not an object)."""

    @abstractmethod
    def list(self, prefix: str) -> Entries:
        """All objects in the folder `prefix` and below, sorted by key; `""` lists the store; nothing there is `[]`."""

    @abstractmethod
    def list_names(self, prefix: str) -> Names:
        """Names of the objects and non-empty folders right under the folder `prefix`, sorted.

        A folder that lost its last object to `delete` is still shown by some S3 servers: look for what must be in it.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine."""

    @abstractmethod
    def delete_prefix(self, prefix: str) -> int:
        """Remove all objects in a folder and below; returns how many there were."""

    @abstractmethod
    def check_writable(self) -> None:
        """Prove by writing that the store takes atomic writes.

        Raises UsageError naming the store and the reason, UnavailableError when a remote is away.
        """

    @abstractmethod
    def delta_uri(self, key: str) -> str:
        """Where a Delta Lake table under this key lies, as its library wants it."""

    @abstractmethod
    def delta_options(self) -> dict[str, str]:
        """Storage options for the Delta Lake library, without credentials: it reads those from the environment."""


def open_store(uri: str | None = None) -> Store:
    """The store at `uri`, or at `$LEPTON_STORE`, or at `./lepton-store`; nothing is read or written yet.

    Credentials and endpoint of `s3://` come from the standard AWS variables and files. Raises UsageError for a URI
    of another scheme or shape.
    """
    if uri is None:
        uri = os.environ.get("LEPTON_STORE") or DEFAULT_STORE
    if not uri or not uri.isprintable() or len(uri) > 4096:
        raise UsageError(f"store {redacted(uri)}: expected {ACCEPTED}, in printable characters")
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "file", os.path.abspath(os.path.expanduser(uri))  # noqa: PTH100, PTH111 - keep symlinks as typed
    elif scheme == "file":
        rest = unquote(rest.removeprefix("localhost"))
    if scheme == "file":
        from lepton_ray.storage.local import LocalStore

        return LocalStore(_folder(uri, rest))
    if scheme == "s3":
        from lepton_ray.storage.s3 import S3Store

        return S3Store(*bucket_and_prefix(uri, rest))
    raise UsageError(f"store {redacted(uri)}: unknown scheme {shown(scheme)}; expected {ACCEPTED}")


def _folder(uri: str, path: str) -> str:
    """The folder of a file store: absolute, normalised, not the root of the file system."""
    if not path.startswith("/") or ".." in path.split("/") or not path.isprintable():
        raise UsageError(
            f"store {redacted(uri)}: expected file:// and an absolute path without '..', e.g. file:///data"
        )
    folder = os.path.normpath(path)
    if folder.strip("/") == "":
        raise UsageError(f"store {redacted(uri)}: is the root of the file system; expected a folder, e.g. file:///data")
    return "/" + folder.lstrip("/")


def bucket_and_prefix(uri: str, rest: str, what: str = "store") -> tuple[str, str]:
    """Bucket and prefix (perhaps empty) of an S3 URI, of which `rest` follows the `s3://`; `what` begins messages."""
    bucket, _, prefix = rest.partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) or ".." in bucket:
        raise UsageError(
            f"{what} {redacted(uri)}: expected s3://bucket/prefix, the bucket 3 to 63 of a-z, 0-9, '.' and '-'; "
            "credentials belong into the AWS_* variables"
        )
    prefix = prefix.rstrip("/")
    try:
        if "?" in prefix or "#" in prefix:
            raise UsageError("'?' and '#' are not accepted")  # noqa: TRY301 - one message for all faults of a prefix
        return bucket, check_key(prefix) if prefix else ""
    except UsageError as error:
        raise UsageError(f"{what} {redacted(uri)}: expected s3://bucket/prefix; {error}") from error
