"""The OpenAPI 3.1 document of an endpoint, made from its task's schemas."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"
_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "detail"],
                "properties": {"pointer": {"type": "string"}, "detail": {"type": "string"}},
            },
        },
    },
}
_REFUSALS = {
    "400": "the body is not strict JSON",
    "408": "not answered within the time limit",
    "413": "body or batch over the limit",
    "415": "not application/json, or an encoded body",
    "422": "the body does not fit the schema or the model",
    "500": "an error of the endpoint",
    "503": "all queues are full; try again after Retry-After",
}
_SERVICE = {
    "/health": "The replica works (else 503).",
    "/ready": "The replica has its model and answers predictions (else 503).",
    "/metadata": "Endpoint, model, version, digest, task and metrics.",
    "/openapi.json": "This document.",
}


def openapi(
    title: str, version: str, request: type[BaseModel], answer: type[BaseModel], max_batch: int
) -> dict[str, Any]:
    """The document for one endpoint.

    Args:
        title: the endpoint's name.
        version: the model version it serves, e.g. `digits:3`.
        request: schema of one thing to predict.
        answer: schema of its prediction.
        max_batch: most items of one batch.
    """
    names, definitions = models_json_schema([(request, "validation"), (answer, "serialization")], ref_template=_REF)
    schemas = {**definitions["$defs"], "Problem": _PROBLEM}
    one, prediction = names[request, "validation"], names[answer, "serialization"]
    batch = _object("items", {"type": "array", "items": one, "minItems": 1, "maxItems": max_batch})
    answers = _object("answers", {"type": "array", "items": prediction})
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": {
            "/predict": {"post": _operation("Predict one item.", one, prediction)},
            "/predict/batch": {"post": _operation(f"Predict up to {max_batch} items.", batch, answers)},
            **{path: {"get": _service(summary)} for path, summary in _SERVICE.items()},
        },
        "components": {"schemas": schemas},
    }


def _object(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: schema}, "additionalProperties": False}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _operation(summary: str, body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": {"description": "answered", "content": _json(answer)},
            **{status: {"description": meaning, "content": problem} for status, meaning in _REFUSALS.items()},
        },
    }


def _service(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "yes", "content": _json({"type": "object"})}}}
