"""The exporter's HTTP front: `/metrics`, `/healthz`, `/readyz`, nothing else, GET only."""

from __future__ import annotations

import errno
import hmac
import logging
import socket
import socketserver
import stat
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lepton_ray.errors import UsageError, shown
from lepton_ray.monitoring.exporter import Exporter
from lepton_ray.storage import Store

MAX_CONNECTIONS = 64
"""Connections served at a time; further ones are closed at once."""
IDLE_S = 10.0
"""A connection that sends nothing for so long is closed."""
_log = logging.getLogger(__name__)


class ExporterServer:
    """An exporter on a port of this host.

    Args:
        store: where runs and endpoints are; only read.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        retain_s: how long a run or endpoint is shown after its last sign of life.
        every_s: seconds between two readings of the store.
        token_file: `/metrics` then asks for `Authorization: Bearer <content of the file>`; read at each request, so
            that a token can be changed without a restart.

    Raises UsageError where the port or the token file cannot be used.
    """

    def __init__(
        self,
        store: Store,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        retain_s: float = 3600.0,
        every_s: float = 2.0,
        token_file: Path | None = None,
    ) -> None:
        if token_file is not None:
            read_token(token_file)
        self.exporter = Exporter(store, retain_s=retain_s, every_s=every_s)
        self._server = _listen(host, port, self.exporter, token_file)
        self._thread = threading.Thread(target=self._server.serve_forever, name="lepton-exporter-http", daemon=True)
        self._started = False

    @property
    def url(self) -> str:
        """Where `/metrics` is served, without the path: `http://127.0.0.1:9464`."""
        host, port = self._server.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def start(self) -> ExporterServer:
        """Begin to read the store and to answer; returns itself."""
        if not self._started:
            self._started = True
            self.exporter.start()
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop answering and reading, and free the port."""
        if self._started:
            self._server.shutdown()
            self._thread.join(5.0)
        self._server.server_close()
        self.exporter.close()


def read_token(path: Path) -> bytes:
    """The bearer token in a file. UsageError unless it is a private regular file with 16 to 4096 printable bytes."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UsageError(f"--token-file {shown(str(path))}: not a regular file")
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            raise UsageError(
                f"--token-file {shown(str(path))}: mode {stat.S_IMODE(mode):04o} lets everybody read it; chmod 0400 it"
            )
        with path.open("rb") as file:
            token = file.read(4097).strip()
    except OSError as error:
        raise UsageError(
            f"--token-file {shown(str(path))}: {error.strerror}; give a file that holds a token"
        ) from error
    if not 16 <= len(token) <= 4096 or not all(32 < byte < 127 for byte in token):
        raise UsageError(f"--token-file {shown(str(path))}: expected 16 to 4096 printable ASCII characters on one line")
    return token


class _Server(ThreadingHTTPServer):
    """Threads per connection, but only so many."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], family: int, exporter: Exporter, token_file: Path | None) -> None:
        self.address_family = family
        self.exporter = exporter
        self.token_file = token_file
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # the base class asks DNS for this host's name, which can take long and is not used
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("exporter: a connection ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """Three paths, GET only."""

    protocol_version = "HTTP/1.1"
    server_version = "lepton-ray"
    sys_version = ""
    timeout = IDLE_S
    server: _Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        exporter = self.server.exporter
        if path == "/healthz":
            self._answer(HTTPStatus.OK, b"ok\n")
        elif path == "/readyz":
            ready = exporter.ready.is_set()
            self._answer(
                HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE,
                b"ready\n" if ready else b"the store was not read yet\n",
            )
        elif path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, b"not found; try /metrics\n")
        elif not self._allowed():
            self._answer(HTTPStatus.UNAUTHORIZED, b"a bearer token is needed\n", ("WWW-Authenticate", "Bearer"))
        else:
            body, content_type = exporter.render(self.headers.get("Accept", ""))
            self._answer(HTTPStatus.OK, body, ("Content-Type", content_type))

    def _refuse(self) -> None:
        self.close_connection = True  # a body may follow that nobody reads
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"GET only\n", ("Allow", "GET"))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_HEAD = do_TRACE = do_CONNECT = _refuse  # noqa: N815 - the interface's names

    def _allowed(self) -> bool:
        if self.server.token_file is None:
            return True
        try:
            token = read_token(self.server.token_file)
        except UsageError as error:
            _log.warning("exporter: refuses all scrapes: %s", error)
            return False
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        return hmac.compare_digest(given, b"Bearer " + token)

    def _answer(self, status: HTTPStatus, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        fields = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff", **dict(headers)}
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the interface's name
        _log.debug("exporter: " + format, *args)


def _listen(host: str, port: int, exporter: Exporter, token_file: Path | None) -> _Server:
    """A server bound to the port. UsageError that tells what to do."""
    other = "choose another with --port, or --port 0 for a free one"
    if not 0 <= port <= 65_535:  # getaddrinfo would silently take the lower 16 bits
        raise UsageError(f"--port {port}: expected 0 to 65535; {other}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return _Server((str(address[0]), int(address[1])), family, exporter, token_file)
    except socket.gaierror as error:
        raise UsageError(f"--host {shown(host)}: unknown address ({error.strerror}); give one of this host") from error
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"--port {port}: in use on {shown(host)}; {other}",
            errno.EACCES: f"--port {port}: not allowed for this user; {other}",
            errno.EADDRNOTAVAIL: f"--host {shown(host)}: is no address of this host; 127.0.0.1 or 0.0.0.0 always are",
        }
        reason = reasons.get(error.errno or 0, f"--host {shown(host)} --port {port}: {error.strerror}; {other}")
        raise UsageError(reason) from error
