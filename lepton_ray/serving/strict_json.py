"""Strict JSON: exactly what RFC 8259 allows and nothing that two parsers could read in two ways."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from lepton_ray.errors import shown
from lepton_ray.serving.problems import ProblemError

MAX_DEPTH = 32
"""Deepest nesting of objects and arrays."""

_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))


def parse_json(body: bytes) -> Any:
    """The value of a JSON document in UTF-8.

    Raises ProblemError 400 for an empty body, another encoding or a byte order mark, a syntax error, anything after
    the document, NaN and Infinity (also as 1e999), a key that stands twice, integers of thousands of digits, and
    nesting deeper than `MAX_DEPTH`.
    """
    if not body.strip():
        raise ProblemError(400, "the body is empty; expected a JSON document")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProblemError(400, f"the body is not UTF-8 at byte {error.start}; send JSON as UTF-8") from error
    if text.startswith("\ufeff"):
        raise ProblemError(400, "the body begins with a byte order mark; send JSON as UTF-8 without one")
    _check_depth(body)
    try:
        return _DECODER.decode(text)
    except ValueError as error:
        raise ProblemError(400, f"the body is not JSON: {shown(str(error), 200)[1:-1]}") from error
    except RecursionError as error:  # cannot be reached while MAX_DEPTH is checked first; kept for a larger one
        raise ProblemError(400, "the body is nested too deeply") from error


def _check_depth(body: bytes) -> None:
    """Refuse deep nesting before the recursive parser sees it; a look at the brackets alone."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    # without escapes a string ends at the next quote, so everything but brackets and quotes can go first
    structure = body if b"\\" in body else body.translate(None, _NOT_STRUCTURE)
    depth = 0
    for token in _BRACKETS.finditer(structure):
        found = token.group()
        if found in (b"[", b"{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise ProblemError(400, f"the body is nested deeper than {MAX_DEPTH} levels")
        elif found in (b"]", b"}"):
            depth -= 1


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError where a key stands twice (parsers differ in which one wins)."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice, 60)} stands twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {shown(text, 40)} is too large")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite, parse_constant=_no_constant)
