"""The ASGI application of one endpoint: what a replica answers to HTTP.

`POST /predict` and `/predict/batch`; `GET /health`, `/ready`, `/metadata` and `/openapi.json`. Every answer carries
the model version in `x-lepton-model`; every refusal is a problem document (`problems`). It knows no Ray: the tests
drive it in-process and `replica` puts it behind Ray Serve.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from lepton_ray.serving import limits
from lepton_ray.serving.batching import Meter
from lepton_ray.serving.limits import ClientGoneError, Headers, Receive
from lepton_ray.serving.openapi import openapi
from lepton_ray.serving.predictions import Predictions
from lepton_ray.serving.problems import CONTENT_TYPE, ProblemError
from lepton_ray.settings import ServingSettings
from lepton_ray.tasks import Predictor

MODEL_HEADER = "x-lepton-model"
STUCK_S = 30.0
"""A call of the model that takes this much longer than a request may take is taken for hung."""

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Handler = Callable[[Headers, Receive], Awaitable[bytes]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Which model version answers, and where."""

    endpoint: str
    model: str
    version: int
    digest: str
    """SHA-256 of the version's manifest."""

    @property
    def ref(self) -> str:
        """`model:version`, as the registry writes it."""
        return f"{self.model}:{self.version}"


@dataclass(frozen=True)
class _Route:
    method: str
    handler: Handler


class EndpointApp:
    """Answers HTTP requests with the predictions of one model version.

    Args:
        identity: what is served; in every answer.
        predictor: the loaded model.
        settings: limits, batching and time limit.
        meter: where requests are recorded.
        metrics: the version's metrics, shown by `/metadata`.
        echo_request_id: put the request id into the answer; not behind Serve, which does so itself.
    """

    def __init__(
        self,
        identity: Identity,
        predictor: Predictor,
        settings: ServingSettings,
        meter: Meter,
        *,
        metrics: Mapping[str, Any] | None = None,
        echo_request_id: bool = True,
    ) -> None:
        self._identity = identity
        self._settings = settings
        self._meter = meter
        self._echo_request_id = echo_request_id
        self._inflight = 0
        self._predictions = Predictions(predictor, settings, meter)
        task = predictor.task
        metadata = {
            "endpoint": identity.endpoint,
            "model": identity.model,
            "version": identity.version,
            "digest": identity.digest,
            "task": {"name": task.name, "options": task.options.model_dump(mode="json")},
            "metrics": dict(metrics or {}),
        }
        document = openapi(identity.endpoint, identity.ref, task.Request, task.Answer, settings.max_batch)
        self._routes = {
            "/predict": _Route("POST", self._predictions.one),
            "/predict/batch": _Route("POST", self._predictions.many),
            # a replica listens only once its model is loaded and warm, so that being ready is being healthy
            "/health": _Route("GET", self._health),
            "/ready": _Route("GET", self._health),
            "/metadata": _Route("GET", _constant(metadata)),
            "/openapi.json": _Route("GET", _constant(document)),
        }

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI interface: HTTP and lifespan; a websocket is closed."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    def check_health(self) -> None:
        """Raise RuntimeError where this replica should be replaced: no more calls are made, or one hangs."""
        batcher = self._predictions.batcher
        if batcher.failed():
            raise RuntimeError("the batcher has ended")
        if batcher.stuck_for() > self._settings.request_timeout_s + STUCK_S:
            raise RuntimeError(f"a call of the model hangs since {batcher.stuck_for():.0f} s")

    async def _http(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers = Headers(scope["headers"])
        request_id = limits.request_id(headers)
        route = self._routes.get(scope["path"].removeprefix(scope.get("root_path", "")))
        predicts = route is not None and route.method == "POST"
        self._went_in(predicts)
        code = 499  # stays so where the client goes away or Serve cancels: nothing is sent
        try:
            problem = None
            try:
                body = await self._body(scope["method"], route, headers, receive)
            except ProblemError as error:
                problem = error
            except ClientGoneError:
                return
            except Exception:  # noqa: BLE001 - a failed request never takes down a replica
                # the client gets no details: they are in the log, under the request id
                _log.exception("endpoint %s: request %s failed", self._identity.endpoint, request_id)
                problem = ProblemError(500, "the endpoint could not answer; its log says why under this request_id")
            code = problem.status if problem else 200
            if problem:
                body = problem.document(request_id)
            await self._send(send, code, body, request_id, problem.headers if problem else {})
        finally:
            self._went_out(predicts, code, time.perf_counter() - began)

    async def _body(self, method: str, route: _Route | None, headers: Headers, receive: Receive) -> bytes:
        """The body of a successful answer. Raises ProblemError for any other."""
        if route is None:
            raise ProblemError(404, "no such path; see /openapi.json")
        if method != route.method and (method, route.method) != ("HEAD", "GET"):
            allowed = "GET, HEAD" if route.method == "GET" else route.method
            raise ProblemError(405, f"this path answers {allowed}", headers={"allow": allowed})
        limit_s = limits.time_limit(headers, self._settings.request_timeout_s)
        try:
            async with asyncio.timeout(limit_s) as timeout:
                return await route.handler(headers, receive)
        except TimeoutError as error:
            if not timeout.expired():  # the model's own, not the clock's
                raise RuntimeError("the model timed out") from error
            # a body that came too slowly is still coming, so the connection cannot be used again
            raise ProblemError(408, f"not answered within {limit_s:g} s", headers={"connection": "close"}) from error

    async def _send(self, send: Send, code: int, body: bytes, request_id: str, further: Mapping[str, str]) -> None:
        headers = {
            "content-type": "application/json" if code < 400 else CONTENT_TYPE,
            "content-length": str(len(body)),
            MODEL_HEADER: self._identity.ref,
            **({limits.REQUEST_ID: request_id} if self._echo_request_id else {}),
            **further,
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": code, "headers": raw})
        await send({"type": "http.response.body", "body": body})

    def _went_in(self, predicts: bool) -> None:
        if predicts:
            self._inflight += 1
            self._meter.set("lepton_serving_inflight", self._inflight)

    def _went_out(self, predicts: bool, code: int, seconds: float) -> None:
        """Predictions are counted, and whatever was refused; probes that succeed are not."""
        if predicts:
            self._inflight -= 1
            self._meter.set("lepton_serving_inflight", self._inflight)
            self._meter.observe("lepton_serving_request_seconds", seconds)
        if predicts or code >= 400:
            self._meter.count("lepton_serving_requests_total", code=code)

    async def _health(self, headers: Headers, receive: Receive) -> bytes:
        try:
            self.check_health()
        except RuntimeError as error:
            _log.warning("endpoint %s is not healthy: %s", self._identity.endpoint, error)
            raise ProblemError(503, "the replica is not healthy", headers={"retry-after": "1"}) from error
        return b'{"status":"ok"}'

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self._predictions.batcher.close()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return


def _constant(document: Mapping[str, Any]) -> Handler:
    body = json.dumps(document).encode()

    async def respond(_: Headers, __: Receive) -> bytes:
        return body

    return respond
