"""From the body of a request to the body of its answer: parsed, validated, made into rows, batched, predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from lepton_ray.errors import UsageError
from lepton_ray.serving.batching import Batcher, Meter
from lepton_ray.serving.limits import Headers, Receive, check_headers, read_body
from lepton_ray.serving.problems import ProblemError, wrong_schema
from lepton_ray.serving.strict_json import parse_json
from lepton_ray.settings import ServingSettings
from lepton_ray.tasks import Predictor


class Predictions:
    """What `POST /predict` and `POST /predict/batch` do.

    Args:
        predictor: the loaded model.
        settings: limits and batching.
        meter: where the batcher records.
    """

    def __init__(self, predictor: Predictor, settings: ServingSettings, meter: Meter) -> None:
        self._settings = settings
        self._task = predictor.task
        self._transforms = predictor.transforms
        request, answer = self._task.Request, self._task.Answer
        batch = create_model("Batch", __config__=ConfigDict(extra="forbid"), items=(list[request], ...))  # type: ignore[valid-type]
        self._request = TypeAdapter[Any](request)
        self._batch = TypeAdapter[Any](batch)
        self._answers = TypeAdapter[Any](dict[str, list[answer]])  # type: ignore[valid-type]
        self._arriving = 0
        self.batcher = Batcher(
            lambda rows: predictor.answer_rows(rows, settings.max_batch),
            meter,
            max_batch=settings.max_batch,
            wait_s=settings.batch_wait_s,
            alone=lambda: self._arriving == 0,
        )

    async def one(self, headers: Headers, receive: Receive) -> bytes:
        """Answer one request of the task's schema. Raises ProblemError for everything that does not fit."""
        self._arriving += 1
        try:
            body = await self._body(headers, receive)
            parse_json(body)
            rows = self._rows([_validated(self._request, body)], "")
        finally:
            self._arriving -= 1
        answers = await self.batcher.submit(rows)
        return answers[0].model_dump_json().encode()

    async def many(self, headers: Headers, receive: Receive) -> bytes:
        """Answer `{"items": [...]}` with `{"answers": [...]}` in the same order. Raises ProblemError."""
        self._arriving += 1
        try:
            body = await self._body(headers, receive)
            self._check_count(parse_json(body))
            rows = self._rows(_validated(self._batch, body).items, "/items/{}")
        finally:
            self._arriving -= 1
        return self._answers.dump_json({"answers": await self.batcher.submit(rows)})

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        check_headers(headers, self._settings.max_body_bytes)
        return await read_body(receive, headers, self._settings.max_body_bytes)

    def _check_count(self, tree: Any) -> None:
        """Refuse a batch by its number of items, before each of them is validated."""
        items = tree.get("items") if isinstance(tree, dict) else None
        if not isinstance(items, list):
            return  # the schema says what is wrong
        if not items:
            raise ProblemError(
                422, "items is empty; send at least one", errors=[{"pointer": "/items", "detail": "is empty"}]
            )
        if len(items) > self._settings.max_batch:
            raise ProblemError(413, f"items holds {len(items)}; one request takes at most {self._settings.max_batch}")

    def _rows(self, requests: Sequence[BaseModel], place: str) -> pa.Table:
        """Validated requests as rows; 422 where one does not fit the model, with a pointer to it."""
        try:
            return self._task.rows_of(requests, self._transforms)
        except UsageError as error:
            fault = {"pointer": place.format(self._first_wrong(requests)), "detail": str(error)}
            raise ProblemError(422, str(error), errors=[fault]) from error

    def _first_wrong(self, requests: Sequence[BaseModel]) -> int:
        for position, request in enumerate(requests):
            try:
                self._task.rows_of([request], self._transforms)
            except UsageError:
                return position
        return 0


def _validated(adapter: TypeAdapter[Any], body: bytes) -> Any:
    """The body as the schema's type. From the bytes, not the parsed tree: JSON has fewer types than Python."""
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        raise wrong_schema(error) from error
