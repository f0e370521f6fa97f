"""The endpoint's application when something goes wrong within it or a client leaves; and what it records."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pyarrow as pa
import pytest
from pydantic import BaseModel
from served_model import Gate, image, predictor, problem, served

from lepton_ray.serving.app import EndpointApp
from lepton_ray.tasks import Predictor

GOOD = json.dumps({"image": image(1)}).encode()


class Gated(Predictor):
    """A model whose calls wait at a gate, or fail."""

    gate: Gate | None = None
    failure: Exception | None = None

    def answer_rows(self, rows: pa.Table, batch: int = 256) -> list[BaseModel]:
        if self.gate is not None:
            self.gate()
        if self.failure is not None:
            raise self.failure
        return super().answer_rows(rows, batch)


def gated() -> Gated:
    model = predictor()
    return Gated(model.task, model.transforms, model.model)


@pytest.mark.parametrize("header", ["x-request-timeout-seconds", "x-lepton-timeout-seconds"])
def test_a_request_out_of_time_is_408(header: str) -> None:
    """The client may shorten the limit; meanwhile the replica still answers others, as the model has its own thread."""
    model = gated()
    model.gate = Gate()
    with served(model, request_timeout_s=20.0) as found:
        problem(found.post_raw(GOOD, **{header: "0.05"}), 408)
        assert model.gate.entered.wait(20)
        assert found.ask("GET", "/health").status_code == 200
        model.gate.open.set()
        assert found.post_raw(GOOD).status_code == 200


@pytest.mark.parametrize("wish", ["3600", "0", "-1", "inf", "nan", "soon", "1e400"])
def test_a_client_cannot_lift_the_time_limit(wish: str) -> None:
    """Serve takes any positive value, and none for 0 and less; here the endpoint's own limit stays."""
    model = gated()
    model.gate = Gate()
    with served(model, request_timeout_s=0.05) as found:
        problem(found.post_raw(GOOD, x_request_timeout_seconds=wish), 408)
        model.gate.open.set()


def test_an_error_within_is_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    """The log has them under the request id; the next request is answered."""
    model = gated()
    model.failure = ZeroDivisionError("/secret/path of digits:3")
    with served(model) as found, caplog.at_level(logging.ERROR):
        answer = found.post_raw(GOOD, x_request_id="findme")
        problem(answer, 500)
        assert not {"secret", "ZeroDivision", "Traceback"} & set(answer.text.replace("/", " ").split())
        assert "findme" in caplog.text
        assert "/secret/path" in caplog.text
        model.failure = TimeoutError("the model's own")
        problem(found.post_raw(GOOD), 500)
        model.failure = None
        assert found.post_raw(GOOD).status_code == 200


def test_requests_are_recorded_by_their_code() -> None:
    """Probes that succeed are not; everything refused is, under its status alone."""
    with served() as found:
        for _ in range(3):
            found.post_raw(GOOD)
        found.post_raw(b"{")
        found.ask("GET", "/health")
        found.ask("GET", "/nowhere")
        notes = found.notes
    name = "lepton_serving_requests_total"
    assert notes.counted == {(name, "200"): 3, (name, "400"): 1, (name, "404"): 1}
    assert len(notes.observed["lepton_serving_request_seconds"]) == 4
    assert sum(notes.observed["lepton_serving_batch_rows"]) == 3
    assert len(notes.observed["lepton_serving_model_seconds"]) == 3
    assert len(notes.observed["lepton_serving_queue_seconds"]) == 3
    assert notes.gauges["lepton_serving_inflight"] == 0


def raw_scope(path: str = "/predict", **headers: str) -> dict[str, Any]:
    named = {"content-type": "application/json"} | headers
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "root_path": "",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()],
    }


def ask_raw(app: EndpointApp, scope: dict[str, Any], *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What the application sends to these messages of the server."""
    coming, sent = iter(messages), []

    async def receive() -> dict[str, Any]:
        return next(coming)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def test_a_client_that_leaves_gets_no_answer() -> None:
    with served() as found:
        begun = {"type": "http.request", "body": b"{", "more_body": True}
        assert ask_raw(found.app, raw_scope(), begun, {"type": "http.disconnect"}) == []
        assert found.notes.counted == {("lepton_serving_requests_total", "499"): 1}
        assert found.notes.gauges["lepton_serving_inflight"] == 0


def test_a_length_that_lies_is_400() -> None:
    with served() as found:
        sent = ask_raw(found.app, raw_scope(content_length="7"), {"type": "http.request", "body": b"[]"})
        assert sent[0]["status"] == 400


def test_a_route_prefix_is_left_out_of_the_path() -> None:
    with served() as found:
        scope = {**raw_scope("/digits/health"), "method": "GET", "root_path": "/digits"}
        assert ask_raw(found.app, scope)[0]["status"] == 200


def test_a_websocket_is_closed() -> None:
    with served() as found:
        sent = ask_raw(found.app, {**raw_scope(), "type": "websocket"}, {"type": "websocket.connect"})
        assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_hanging_model_makes_the_replica_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve then replaces it; /health says so too."""
    monkeypatch.setattr("lepton_ray.serving.app.STUCK_S", 0.0)
    model = gated()
    model.gate = Gate()
    with served(model, request_timeout_s=0.05) as found:
        found.app.check_health()
        problem(found.post_raw(GOOD), 408)
        assert model.gate.entered.wait(20)
        time.sleep(0.06)  # the call has now taken longer than a request may
        with pytest.raises(RuntimeError, match="hangs"):
            found.app.check_health()
        problem(found.ask("GET", "/ready"), 503)
        model.gate.open.set()
