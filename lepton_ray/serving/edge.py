"""What Serve's proxy does to a request before anything else: the proxy imports this module, so it is light.

Serve's proxy takes headers of any size and number, echoes any request id, and obeys headers by which a client lifts
Serve's time limit or steers its routing. `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`, set in the environment of the
nodes to `lepton_ray.serving.edge:middlewares`, puts this in front of it. The application keeps its own limits and is
complete without it.
"""

from __future__ import annotations

import secrets

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lepton_ray.serving.limits import CLIENT_TIMEOUT, REQUEST_ID, SERVE_TIMEOUT, is_request_id
from lepton_ray.serving.problems import CONTENT_TYPE, ProblemError

IMPORT_PATH = "lepton_ray.serving.edge:middlewares"
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16_384
"""Names and values of all headers together."""
STEERING = frozenset(
    {
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
        b"x-session-id",
        b"x-request-disconnect-disabled",
    }
)
"""Headers by which a client would steer Serve itself; dropped."""


def middlewares() -> list[Middleware]:
    """What Serve calls when its proxy starts."""
    return [Middleware(Edge)]


class Edge:
    """ASGI middleware: 431 for too many or too long headers, a harmless request id, no headers that steer Serve."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        given = next((value for name, value in headers if name == REQUEST_ID.encode()), b"").decode("latin-1")
        request_id = given if is_request_id(given) else secrets.token_hex(16)
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            await _refuse(send, request_id)
            return
        dropped = STEERING | {REQUEST_ID.encode(), SERVE_TIMEOUT.encode(), CLIENT_TIMEOUT.encode()}
        # the endpoint itself still sees the client's wish for a shorter time limit; Serve does not
        wishes = [(CLIENT_TIMEOUT.encode(), value) for name, value in headers if name == SERVE_TIMEOUT.encode()]
        kept = [(name, value) for name, value in headers if name not in dropped]
        scope["headers"] = [*kept, *wishes, (REQUEST_ID.encode(), request_id.encode())]
        await self._app(scope, receive, send)


async def _refuse(send: Send, request_id: str) -> None:
    body = ProblemError(
        431, f"more than {MAX_HEADERS} headers, or more than {MAX_HEADER_BYTES} bytes of them"
    ).document(request_id)
    headers = [
        (b"content-type", CONTENT_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        (REQUEST_ID.encode(), request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": 431, "headers": headers})
    await send({"type": "http.response.body", "body": body})
