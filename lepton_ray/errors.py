"""The error tree: every error a user can meet, with the exit code that goes with it.

A message is one line: the key or name, the value seen, what was expected, and what to do. Libraries' errors are
translated at the door of the room that uses the library and chained (`raise ... from error`), so nothing above a
room needs to know which library stands behind it.
"""

from __future__ import annotations

from typing import ClassVar


class LeptonError(Exception):
    """Something failed while running (exit code 1). Every error of the framework is one of these."""

    exit_code: ClassVar[int] = 1


class UsageError(LeptonError):
    """Wrong use or invalid input: a setting, a file, a name, an option (exit code 2)."""

    exit_code: ClassVar[int] = 2


class IntegrityError(UsageError):
    """Bytes are not what their hash or manifest says: torn, short or flipped (exit code 2)."""


class RefusedError(LeptonError):
    """Allowed by nobody's mistake but by no policy either: a lease held by another, an unsafe format (exit code 4)."""

    exit_code: ClassVar[int] = 4


class ConflictError(RefusedError):
    """Somebody else changed a shared record first; read it again and decide anew (exit code 4)."""


class NotFoundError(LeptonError):
    """A run, table, model, version or alias that does not exist (exit code 5)."""

    exit_code: ClassVar[int] = 5


class UnavailableError(LeptonError):
    """A remote (storage, cluster, endpoint) is away; the same call may work later (exit code 6)."""

    exit_code: ClassVar[int] = 6


def shown(value: object, limit: int = 80) -> str:
    """A value as it may stand in a one-line message: escaped, quoted when text, cut at `limit` characters."""
    return _cut(ascii(value), limit) if isinstance(value, str) else escaped(str(value), limit)


def escaped(text: str, limit: int = 200) -> str:
    """Somebody else's words in a one-line message: control and foreign characters escaped, cut at `limit`."""
    return _cut(ascii(" ".join(text.split()))[1:-1].replace("\\'", "'"), limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
