"""A proxy on loopback that stands before an S3 server and does to it what networks do."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self

HOST = "127.0.0.1"
Deed = Literal[
    "pass", "drop", "lose", "cut", "drip", "slow_down", "deny", "claim", "hang", "stall", "reset_early", "reset_late",
    "slow",
]  # fmt: skip
"""What is done with a request: `pass` it on; `drop` it unseen by the server; pass it on and `lose` the answer; `cut`
the answer's body in the middle, or `drip` it byte by byte, ten a second; answer 503 (`slow_down`) or 403 (`deny`)
without asking the server; `claim` a success that is none; `hang` until the proxy stops; `stall`, that is hang without
even reading the request's body; reset the connection after half of the request's body, which the server never sees
(`reset_early`), or after half of the first line of the answer, when it is all done (`reset_late`); pass on so `slow`
that bodies take `bytes_per_s`."""
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of a socket that is reset when it is closed."""
_ANSWERS = {
    "slow_down": (503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"),
    "deny": (403, b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"),
    "claim": (200, b""),
}


@dataclass(frozen=True)
class Request:
    """A request that came by."""

    method: str
    path: str
    """With the query."""
    headers: dict[str, str] = field(repr=False)
    """Names in lower case."""


class FaultProxy:
    """Passes S3 requests on to a port of this host, except where `rule` says otherwise; a context manager.

    Whoever stops one and later starts another at the same `port` has a server that was away in between.
    """

    def __init__(self, upstream: int, rule: Callable[[Request], Deed] = lambda _: "pass", port: int = 0) -> None:
        self.rule = rule
        self.seen: list[Request] = []
        self.bytes_per_s = 200_000.0
        """Speed of what passes `slow`, per request and way."""
        self._upstream = upstream
        self._stopped = threading.Event()
        self._server = ThreadingHTTPServer((HOST, port), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_port)

    @property
    def endpoint(self) -> str:
        """URL of the S3 API behind the proxy."""
        return f"http://{HOST}:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def count(self, method: str) -> int:
        """How many requests of this method came by."""
        return sum(request.method == method for request in self.seen)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def handle_any(self) -> None:
                if proxy._stopped.is_set():  # a connection that was kept open does not outlive the proxy
                    self.close_connection = True
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers)
                proxy.seen.append(request)
                deed = proxy.rule(request)
                length = int(headers.get("content-length", 0))
                shares = {"stall": 0, "reset_early": length // 2}
                body = self.rfile.read(shares.get(deed, length))
                proxy.serve(self, deed, body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815 - names fixed by http.server

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        return Handler

    def serve(self, client: BaseHTTPRequestHandler, deed: Deed, body: bytes) -> None:
        """Do the deed with one request of a client."""
        if deed in _ANSWERS:
            status, content = _ANSWERS[deed]
            self._answer(client, status, {"ETag": '"claimed"'}, content)
        elif deed in ("hang", "stall"):
            self._stopped.wait(60)
            client.close_connection = True
        elif deed == "drop":
            client.close_connection = True
        elif deed == "reset_early":
            self._reset(client)
        else:
            self._pass_on(client, deed, body)

    def _pass_on(self, client: BaseHTTPRequestHandler, deed: Deed, body: bytes) -> None:
        """Let the server answer, and do the deed with its answer."""
        if deed == "slow":
            self._stopped.wait(len(body) / self.bytes_per_s)
        status, headers, content = self._ask(client, body)
        if deed == "slow":
            self._stopped.wait(len(content) / self.bytes_per_s)
        if deed == "lose":
            client.close_connection = True
        elif deed == "reset_late":
            with contextlib.suppress(OSError):
                client.wfile.write(b"HTTP/1.1 2")
            self._reset(client)
        elif deed == "drip":
            self._answer(client, status, headers, content, sent=0)
            self._drip(client, content)
        elif deed == "cut":
            self._answer(client, status, headers, content, sent=len(content) // 2)
        else:
            self._answer(client, status, headers, content)

    @staticmethod
    def _reset(client: BaseHTTPRequestHandler) -> None:
        """Close with RST, as a peer does that has lost its memory."""
        client.close_connection = True
        with contextlib.suppress(OSError):
            client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            os.close(client.connection.detach())

    def _drip(self, client: BaseHTTPRequestHandler, content: bytes) -> None:
        with contextlib.suppress(OSError):  # the client gave up
            for byte in content:
                client.wfile.write(bytes([byte]))
                if self._stopped.wait(0.1):
                    break

    def _ask(self, client: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body that the server answers."""
        upstream = http.client.HTTPConnection(HOST, self._upstream, timeout=30)
        with contextlib.closing(upstream):
            upstream.putrequest(client.command, client.path, skip_host=True, skip_accept_encoding=True)
            for name, value in client.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            kept = {n: v for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")}
            return answer.status, kept, answer.read()

    @staticmethod
    def _answer(
        client: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes, sent: int | None = None
    ) -> None:
        client.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                client.send_header(name, value)
        length = headers.get("Content-Length", "0") if client.command == "HEAD" else str(len(content))
        client.send_header("Content-Length", length)
        client.end_headers()
        with contextlib.suppress(ConnectionError):
            client.wfile.write(content if sent is None else content[:sent])
        if sent is not None:
            client.close_connection = True
