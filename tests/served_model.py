"""A tiny published model and its endpoint's application, for the tests of serving."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from safetensors.torch import save

from lepton_ray.registry import ModelVersion, Registry
from lepton_ray.serving.app import EndpointApp, Identity
from lepton_ray.settings import ServingSettings
from lepton_ray.storage import Store
from lepton_ray.tasks import Predictor, find_task

TRANSFORMS = {"height": 28, "width": 28, "channels": 1, "classes": 10, "mean": 33.3, "deviation": 78.6}
OPTIONS = {"width": 4}
IDENTITY = Identity("digits", "digits", 3, "ab" * 32)


def publish(store: Store, seed: int = 0) -> ModelVersion:
    """A new version of `digits`: the small CNN with random weights."""
    torch.manual_seed(seed)
    task = find_task("image_classification", OPTIONS)
    weights = save(task.build(TRANSFORMS).state_dict())
    card = {"task": {"name": "image_classification", "options": OPTIONS}, "metrics": {"accuracy": 0.125}}
    return Registry(store).publish("digits", weights=weights, card=card, transforms=TRANSFORMS)


def predictor(seed: int = 0) -> Predictor:
    """The same model in memory."""
    torch.manual_seed(seed)
    task = find_task("image_classification", OPTIONS)
    return Predictor(task, TRANSFORMS, task.build(TRANSFORMS))


def image(seed: int) -> list[int]:
    """784 pixel values that differ from seed to seed."""
    return [(seed * 37 + position * 11) % 256 for position in range(784)]


@dataclass
class Notes:
    """A meter that remembers what it was told."""

    counted: dict[tuple[str, str], float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    observed: dict[str, list[float]] = field(default_factory=dict)

    def count(self, metric: str, /, amount: float = 1.0, **labels: object) -> None:
        key = (metric, str(labels.get("code", "")))
        self.counted[key] = self.counted.get(key, 0.0) + amount

    def set(self, metric: str, /, value: float, **labels: object) -> None:
        self.gauges[metric] = value

    def observe(self, metric: str, /, value: float, **labels: object) -> None:
        self.observed.setdefault(metric, []).append(value)


class Gate:
    """Holds a model's calls until a test opens it; tells when one has come."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        if not self.open.wait(20):
            raise TimeoutError("the test never opened the gate")


class Served:
    """An application driven in-process, all requests in one event loop."""

    def __init__(self, app: EndpointApp, notes: Notes, runner: asyncio.Runner) -> None:
        self.app, self.notes, self.runner = app, notes, runner
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app),  # type: ignore[arg-type]
            base_url="http://endpoint",
        )

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request."""
        return self.runner.run(self.client.request(method, path, **options))

    def post(self, path: str = "/predict", **options: Any) -> httpx.Response:
        """One POST."""
        return self.ask("POST", path, **options)

    def post_raw(self, body: bytes, path: str = "/predict", **headers: str) -> httpx.Response:
        """One POST of these bytes as JSON."""
        named = {"content-type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
        return self.ask("POST", path, content=body, headers=named)


@contextmanager
def served(model: Predictor | None = None, **settings: Any) -> Iterator[Served]:
    """The application of `model` under these serving settings."""
    notes = Notes()
    app = EndpointApp(IDENTITY, model or predictor(), ServingSettings(**settings), notes, metrics={"accuracy": 0.125})
    with asyncio.Runner() as runner:
        found = Served(app, notes, runner)
        try:
            yield found
        finally:
            runner.run(found.client.aclose())
            runner.run(_shut_down(app))


async def _shut_down(app: EndpointApp) -> None:
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(_: Any) -> None:
        return None

    await app({"type": "lifespan"}, receive, send)


def problem(answer: Any, status: int) -> dict[str, Any]:
    """The problem document of a refusal; its form is checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-lepton-model"] == "digits:3"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["type"] == "about:blank"
    assert document["title"]
    assert document["request_id"] == answer.headers["x-request-id"]
    assert 0 < len(document["detail"]) < 400
    return document
