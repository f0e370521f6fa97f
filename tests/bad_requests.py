"""Requests that an endpoint refuses, as they go over the wire (B58 to B73 of the bad inputs)."""

from __future__ import annotations

import json

from served_model import image

GOOD = json.dumps({"image": image(0)}).encode()
JSON = {"content-type": "application/json"}

REFUSED = [
    ("POST", "/predict", b"", JSON, 400),
    ("POST", "/predict", b"{" * 60_000, JSON, 400),
    ("POST", "/predict", b"\xff\xfe{\x00}\x00", JSON, 400),
    ("POST", "/predict", b'{"image": [' + b"9" * 60_000 + b"]}", JSON, 400),
    ("POST", "/predict", b'{"image": [NaN]}', JSON, 400),
    ("POST", "/predict", b'{"image": 1, "image": 2}', JSON, 400),
    ("GET", "/nowhere", None, {}, 404),
    ("GET", "/..%2f..%2fetc/passwd", None, {}, 404),
    ("GET", "/predict", None, {}, 405),
    ("TRACE", "/predict", None, {}, 405),
    ("POST", "/predict", b" " * 65_537, JSON, 413),
    ("POST", "/predict", (b" " * 9_000,) * 9, JSON, 413),
    ("POST", "/predict/batch", json.dumps({"items": [0] * 9}).encode(), JSON, 413),
    ("POST", "/predict", GOOD, {"content-type": "text/plain"}, 415),
    ("POST", "/predict", GOOD, {**JSON, "content-encoding": "gzip"}, 415),
    ("POST", "/predict", b'{"image": [1]}', JSON, 422),
    ("POST", "/predict", b'{"image": "http://169.254.169.254"}', JSON, 422),
    ("POST", "/predict", GOOD, {**JSON, "x-request-timeout-seconds": "0.000001"}, 408),
    ("POST", "/predict", GOOD, {**JSON, "x-filler": "x" * 60_000}, 431),
    ("POST", "/predict", GOOD, {**JSON, **{f"x-{number}": "" for number in range(200)}}, 431),
    ("POST", "/predict", GOOD, {**JSON, "x-session-id": "\xff", "serve_multiplexed_model_id": "other"}, 200),
    ("POST", "/predict", GOOD, {**JSON, "x-request-timeout-seconds": "-1"}, 200),
]
"""Method, path, body (a tuple is sent in chunks), headers, and the status of the answer; a few are fine: 200."""


def raw(*lines: bytes) -> bytes:
    """A POST to /predict whose headers and body are these lines."""
    return b"\r\n".join([b"POST /predict HTTP/1.1", b"Host: x", b"Content-Type: application/json", *lines])


MALFORMED = {
    "CL.CL": (raw(b"Content-Length: 5", b"Content-Length: 6", b"", b"[1,2]x"), 400),
    "CL.TE": (raw(b"Content-Length: 5", b"Transfer-Encoding: chunked", b"", b"5", b"[1,2]", b"0", b"", b""), 400),
    "unknown TE": (raw(b"Transfer-Encoding: xchunked", b"", b"5", b"[1,2]", b"0", b"", b""), 400),
    "bad chunk": (raw(b"Transfer-Encoding: chunked", b"", b"ZZ", b"[1,2]", b"0", b"", b""), 400),
    "fold": (raw(b"X-A: b", b" folded", b"Content-Length: 5", b"", b"[1,2]"), 400),
    "CR": (raw(b"X-A: b\rc", b"Content-Length: 5", b"", b"[1,2]"), 400),
    "NUL": (raw(b"X-A: b\x00c", b"Content-Length: 5", b"", b"[1,2]"), 400),
    "space": (raw(b"X-A : b", b"Content-Length: 5", b"", b"[1,2]"), 400),
    "negative": (raw(b"Content-Length: -5", b"", b"[1,2]"), 400),
    "slow body": (raw(b"X-Request-Timeout-Seconds: 0.2", b"Content-Length: 50", b"", b"[1,2]"), 408),
}
"""By name: the bytes of a message that two servers could read in two ways or wait for, and the status."""
