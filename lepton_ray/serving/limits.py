"""What is checked before a body is looked at: its type, its size, how long it may take, and who asked."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from lepton_ray.serving.problems import ProblemError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

REQUEST_ID = "x-request-id"
SERVE_TIMEOUT = "x-request-timeout-seconds"
"""Serve's header for a request's own time limit; here it can shorten the endpoint's, never lengthen it."""
CLIENT_TIMEOUT = "x-lepton-timeout-seconds"
"""What `edge` makes of it, so that Serve does not obey it."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LENGTH = re.compile(r"[0-9]{1,19}")
_JSON = re.compile(r'application/json(?:\s*;\s*charset\s*=\s*"?utf-?8"?)?', re.IGNORECASE)


class ClientGoneError(Exception):
    """The client went away before its request was complete; there is nobody to answer."""


class Headers:
    """The headers of an ASGI scope by lower-case name; a name that stands several times keeps all its values."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in raw:
            self._values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").strip())

    def get(self, name: str) -> str | None:
        """The value, None where there is none; values that stand several times are joined by commas (RFC 9110)."""
        values = self._values.get(name)
        return ", ".join(values) if values else None


def request_id(headers: Headers) -> str:
    """The client's request id where it is harmless in a log and a header, else a new one of 32 hex digits."""
    given = headers.get(REQUEST_ID)
    return given if given is not None and is_request_id(given) else secrets.token_hex(16)


def is_request_id(text: str) -> bool:
    """1 to 64 letters, digits, `_` and `-`."""
    return _REQUEST_ID.fullmatch(text) is not None


def time_limit(headers: Headers, limit_s: float) -> float:
    """Seconds for this request: the client's wish where it is shorter than `limit_s`."""
    try:
        wish = float(headers.get(CLIENT_TIMEOUT) or headers.get(SERVE_TIMEOUT) or "nan")
    except ValueError:
        return limit_s
    return min(wish, limit_s) if math.isfinite(wish) and wish > 0 else limit_s


def check_headers(headers: Headers, max_body_bytes: int) -> None:
    """Refuse by the headers alone, before a byte of the body is read.

    Raises ProblemError: 415 for a type other than JSON in UTF-8 or any content encoding, 413 for a length above
    `max_body_bytes`, 400 for a length that is no number.
    """
    encoding = headers.get("content-encoding")
    if encoding is not None and encoding.lower() != "identity":
        raise ProblemError(
            415, "content-encoding is not accepted; send the body as it is", headers={"accept-encoding": "identity"}
        )
    if not _JSON.fullmatch(headers.get("content-type") or ""):
        raise ProblemError(
            415, "content-type must be application/json in UTF-8", headers={"accept": "application/json"}
        )
    length = headers.get("content-length")
    if length is None:
        return
    if not _LENGTH.fullmatch(length):
        raise ProblemError(400, "content-length is not a number of bytes")
    if int(length) > max_body_bytes:
        raise too_long(max_body_bytes)


async def read_body(receive: Receive, headers: Headers, max_body_bytes: int) -> bytes:
    """The body from ASGI's `receive`, never holding more than `max_body_bytes` and one message.

    Raises ProblemError 413 as soon as it is longer, 400 where it is not as long as announced; ClientGoneError where
    the client went away.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client went away while it sent the body")
        part = message.get("body", b"")
        size += len(part)
        if size > max_body_bytes:
            raise too_long(max_body_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            break
    length = headers.get("content-length")
    if length is not None and int(length) != size:
        raise ProblemError(400, f"the body has {size} bytes, content-length announced {int(length)}")
    return b"".join(parts) if len(parts) > 1 else parts[0]


def too_long(max_body_bytes: int) -> ProblemError:
    """413. The connection is closed, as the rest of the body will not be read."""
    return ProblemError(413, f"the body is longer than {max_body_bytes} bytes", headers={"connection": "close"})
