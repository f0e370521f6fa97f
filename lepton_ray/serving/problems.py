"""Refusals as RFC 9457 problem documents: every answer that is not a success has this one form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

from lepton_ray.errors import shown

CONTENT_TYPE = "application/problem+json"
MAX_ERRORS = 20
"""Faults listed in one document; a batch of images can hold thousands."""
MAX_COUNTED = 1_000
"""Faults beyond which none is listed: describing each one costs more time than the request is worth."""


class ProblemError(Exception):
    """A request that is not answered with a prediction.

    Args:
        status: HTTP status, 4xx or 5xx.
        detail: one sentence for the client: what was seen, what is expected. Never a path, a version or a traceback.
        errors: faults of the body, each `{"pointer": "/items/3/image", "detail": ...}` (RFC 6901 pointers).
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})

    def document(self, request_id: str) -> bytes:
        """The problem document: type, title, status, detail, request_id and, where there are any, errors."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        if self.errors:
            body["errors"] = self.errors
        return json.dumps(body).encode()


def pointer(path: Sequence[str | int]) -> str:
    """An RFC 6901 JSON pointer; names are cut, as a client may send any."""
    parts = (part if len(part) <= 80 else part[:77] + "..." for part in map(str, path))
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)


def wrong_schema(error: ValidationError) -> ProblemError:
    """What pydantic found in a body, as a 422 with a pointer to each fault (the first `MAX_ERRORS`)."""
    count = error.error_count()
    if count > MAX_COUNTED:
        return ProblemError(422, f"the body does not fit the schema in {count} places; see /openapi.json")
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    if faults[0]["type"] == "json_invalid":  # taken by the strict parser, not by pydantic's: e.g. lone surrogates
        return ProblemError(400, f"the body is not JSON: {shown(faults[0]['msg'], 200)}")
    errors = [
        {"pointer": pointer(fault["loc"]), "detail": fault["msg"].removeprefix("Value error, ")}
        for fault in faults[:MAX_ERRORS]
    ]
    first = f"{errors[0]['pointer'] or 'the body'}: {errors[0]['detail']}"
    more = f" and {count - 1} more" if count > 1 else ""
    return ProblemError(422, f"the body does not fit the schema: {shown(first, 300)[1:-1]}{more}", errors=errors)
