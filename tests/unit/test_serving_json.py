"""Strict JSON: what two parsers could read in two ways is refused."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json

from lepton_ray.serving.problems import ProblemError
from lepton_ray.serving.strict_json import MAX_DEPTH, parse_json

REFUSED = [
    (b"", "empty"),
    (b" \r\n\t", "empty"),
    (b"{", "not JSON"),
    (b"{}{}", "Extra data"),
    (b'{"a": 1} x', "Extra data"),
    (b"[1,]", "not JSON"),
    (b"{'a': 1}", "not JSON"),
    (b"// note\n1", "not JSON"),
    (b"\xef\xbb\xbf{}", "byte order mark"),
    ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
    ('{"a": 1}'.encode("utf-32"), "UTF-8"),
    (b'{"a": "\xff"}', "UTF-8 at byte 7"),
    (b"NaN", "NaN"),
    (b"[Infinity]", "Infinity"),
    (b"[-Infinity]", "Infinity"),
    (b"[1e999]", "too large"),
    (b"[-1e999]", "too large"),
    (b"[" + b"9" * 5000 + b"]", "not JSON"),
    (b'{"a": 1, "a": 1}', "'a' stands twice"),
    (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' stands twice"),
    (b'{"a": 1, "\\u0061": 2}', "'a' stands twice"),
    (b"[" * 200_000, "deeper than 32"),
    (b'{"a":' * 200_000, "deeper than 32"),
    (b"[" * 33 + b"]" * 33, "deeper than 32"),
    (b'["\\"",' + b"[" * 40 + b"]" * 40 + b"]", "deeper than 32"),
    (b'{"a": "\n"}', "control character"),
]


@pytest.mark.parametrize(("body", "told"), REFUSED, ids=[str(body[:20]) for body, _ in REFUSED])
def test_a_body_that_is_not_strict_json_is_refused(body: bytes, told: str) -> None:
    """Each with status 400 and a sentence that names the fault; B58, B60 and B61 of the bad inputs."""
    began = time.perf_counter()
    with pytest.raises(ProblemError, match=told) as caught:
        parse_json(body)
    assert caught.value.status == 400
    assert len(caught.value.detail) < 300
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"0", 0),
        (b" [1, -2.5e3, true, null] ", [1, -2500.0, True, None]),
        ('{"grün": "\\ud83d\\ude00"}'.encode(), {"grün": "\U0001f600"}),
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, None),
        (b"[" + b'"[{[{", ' * 50 + b"0]", ["[{[{"] * 50 + [0]),
        (b"[" + b'"\\"[", ' * 50 + b"0]", ['"['] * 50 + [0]),
        (b"[" + b"[],{}," * 100 + b"0]", [[], {}] * 100 + [0]),
    ],
    ids=["number", "mixed", "unicode", "deepest", "brackets in strings", "after an escaped quote", "wide, not deep"],
)
def test_sound_json_is_read(body: bytes, value: Any) -> None:
    found = parse_json(body)
    if value is not None:
        assert found == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec="utf-8")),
        lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
        max_leaves=60,
    )
)  # fmt: skip
def test_every_sound_value_survives_the_way(value: Any) -> None:
    """Also such with quotes, backslashes and brackets within texts, which the check of depth must not count."""
    assert parse_json(to_json(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with contextlib.suppress(ProblemError):
        parse_json(body)
