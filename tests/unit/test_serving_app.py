"""The endpoint's application, driven in-process: what it answers and what it refuses."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from served_model import Served, image, predictor, problem, served

GOOD = json.dumps({"image": image(1)}).encode()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Served]:
    """One application with default limits, batches of 8."""
    with served(max_batch=8) as found:
        yield found


def test_predictions_equal_the_offline_ones(endpoint: Served) -> None:
    """One at a time and as a batch, in order."""
    model = predictor()
    images = [image(seed) for seed in range(8)]
    offline = [answer.model_dump() for answer in model.predict([model.task.Request(image=each) for each in images])]
    single = [endpoint.post(json={"image": each}) for each in images]
    batch = endpoint.post("/predict/batch", json={"items": [{"image": each} for each in images]})
    for found in ([answer.json() for answer in single], batch.json()["answers"]):
        assert [each["label"] for each in found] == [each["label"] for each in offline]
        for served_answer, expected in zip(found, offline, strict=True):
            assert served_answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
            assert served_answer["probability"] == pytest.approx(expected["probability"], abs=1e-5)
    assert all(answer.headers["x-lepton-model"] == "digits:3" for answer in [*single, batch])


def test_metadata_says_what_is_served(endpoint: Served) -> None:
    found = endpoint.ask("GET", "/metadata").json()
    assert found["endpoint"] == "digits"
    assert (found["model"], found["version"], found["digest"]) == ("digits", 3, "ab" * 32)
    assert found["task"]["name"] == "image_classification"
    assert found["metrics"] == {"accuracy": 0.125}


@pytest.mark.parametrize("path", ["/health", "/ready", "/metadata", "/openapi.json"])
def test_service_paths_answer_json(endpoint: Served, path: str) -> None:
    answer = endpoint.ask("GET", path)
    assert answer.status_code == 200
    assert answer.json()
    assert endpoint.ask("HEAD", path).status_code == 200


def test_openapi_describes_the_task(endpoint: Served) -> None:
    """Every reference of the document leads somewhere, and the schemas are the task's."""
    document = endpoint.ask("GET", "/openapi.json").json()
    schemas = document["components"]["schemas"]
    references = {part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert references <= schemas.keys()
    assert schemas["ImageRequest"]["properties"]["image"]["items"] == {"maximum": 255, "minimum": 0, "type": "integer"}
    items = document["paths"]["/predict/batch"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert items["properties"]["items"]["maxItems"] == 8


UNFIT = [
    ({}, "/image"),
    ({"image": image(0), "url": "http://169.254.169.254/latest"}, "/url"),
    ({"image": "http://169.254.169.254/latest/meta-data"}, "/image"),
    ({"image": "AAAA"}, "/image"),
    ({"image": []}, "/image"),
    ({"image": [1.5] * 784}, "/image/0"),
    ({"image": [True] * 784}, "/image/0"),
    ({"image": ["1"] * 784}, "/image/0"),
    ({"image": [0] * 783 + [256]}, "/image/783"),
    ({"image": [0] * 783 + [-1]}, "/image/783"),
    ({"image": [0] * 783 + [10**30]}, "/image/783"),
    ({"image": [None] * 784}, "/image/0"),
    ({"image": [[0] * 28] * 28}, "/image/0"),
    ({"image": [0] * 783}, ""),
    ({"image": [0] * 785}, ""),
    ([], ""),
    (None, ""),
    ("image", ""),
    ({"a/b~c": 1, "image": image(0)}, "/a~1b~0c"),
]


@pytest.mark.parametrize(("body", "place"), UNFIT, ids=[str(body)[:40] for body, _ in UNFIT])
def test_a_body_that_does_not_fit_is_told_where(endpoint: Served, body: Any, place: str) -> None:
    """422 with an RFC 6901 pointer, also for an image of another size; B62 and B73. No address is ever fetched."""
    document = problem(endpoint.post_raw(json.dumps(body).encode()), 422)
    assert document["errors"][0]["pointer"] == place
    assert document["errors"][0]["detail"]


@pytest.mark.parametrize(
    ("body", "status", "place"),
    [
        ({"items": []}, 422, "/items"),
        ({"items": {}}, 422, "/items"),
        ({}, 422, "/items"),
        ({"items": [{"image": image(0)}], "more": 1}, 422, "/more"),
        ({"items": [{"image": image(0)}, {"image": image(1)[:5]}]}, 422, "/items/1"),
        ({"items": [{"image": image(0)}, {"picture": 1}]}, 422, "/items/1/image"),
        ([{"image": image(0)}], 422, ""),
        ({"items": [{"image": image(0)}] * 9}, 413, None),
        ({"items": [0] * 100_000}, 413, None),
    ],
)
def test_a_batch_that_does_not_fit_is_told_where(endpoint: Served, body: Any, status: int, place: str | None) -> None:
    """Too many items are 413, before any of them is looked at."""
    document = problem(endpoint.post("/predict/batch", json=body), status)
    assert (document["errors"][0]["pointer"] if "errors" in document else None) == place


def test_hardly_any_faults_are_listed(endpoint: Served) -> None:
    """A body of thousands of faults is refused in no time and with a short document."""
    document = problem(endpoint.post("/predict/batch", json={"items": [{"image": [[]] * 9000}] * 8}), 422)
    assert 1 <= len(document["errors"]) <= 20
    assert len(json.dumps(document)) < 4000


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json, text/plain"}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "identity, br"}, 415),
        ({"content-encoding": "nonsense"}, 415),
        ({"content-length": "-5"}, 400),
        ({"content-length": "1e3"}, 400),
        ({"content-length": "99999999999"}, 413),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": "Application/JSON"}, 200),
        ({"content-encoding": "identity"}, 200),
    ],
)
def test_headers_decide_before_the_body(endpoint: Served, headers: dict[str, str], status: int) -> None:
    """B63, B64 and B65 of the bad inputs."""
    answer = endpoint.ask("POST", "/predict", content=GOOD, headers={"content-type": "application/json"} | headers)
    if status == 200:
        assert answer.status_code == 200
    else:
        problem(answer, status)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{} {}", b"\xef\xbb\xbf" + GOOD, b'{"image": [NaN]}', b'{"image": 1, "image": 2}', b"[" * 99999],
)
def test_a_body_that_is_not_json_is_400(endpoint: Served, body: bytes) -> None:
    problem(endpoint.post_raw(body), 400)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/predict/", 404),
        ("POST", "/v1/models/other:predict", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/predict/../metadata/x", 404),
        ("GET", "/predict", 405),
        ("PUT", "/predict", 405),
        ("DELETE", "/metadata", 405),
        ("POST", "/health", 405),
        ("TRACE", "/metadata", 405),
        ("PATCH", "/predict/batch", 405),
    ],
)
def test_unknown_paths_and_methods_are_refused(endpoint: Served, method: str, path: str, status: int) -> None:
    """B66 and B72; a 405 says what is allowed."""
    answer = endpoint.ask(method, path)
    problem(answer, status)
    assert ("allow" in answer.headers) == (status == 405)


def test_the_body_limit_holds_without_a_length() -> None:
    """A chunked body is refused as soon as it is too long, without reading on."""
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while read < 1000:
            read += 1
            yield b" " * 1024

    with served(max_body_bytes=8192) as found:
        answer = found.ask("POST", "/predict", content=endless(), headers={"content-type": "application/json"})
        problem(answer, 413)
        assert answer.headers["connection"] == "close"
        problem(found.post_raw(b" " * 8193), 413)
        problem(found.post_raw(b" " * 8192), 400)
    assert read <= 10


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-DEF_123", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("x" * 10_000, False),
        ("a b", False),
        ("", False),
        ("<script>", False),
        ("a\x1b[31m", False),
    ],
)
def test_only_harmless_request_ids_are_echoed(endpoint: Served, given: str, kept: bool) -> None:
    """B71: anything else is replaced by a new one, in header and document alike."""
    answer = endpoint.ask("POST", "/nowhere", headers={"x-request-id": given})
    assert (problem(answer, 404)["request_id"] == given) is kept
    assert answer.headers.get_list("x-request-id", split_commas=False) == [answer.json()["request_id"]]
