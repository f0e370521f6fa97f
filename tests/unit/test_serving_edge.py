"""What stands in front of Serve's proxy: bounded headers, harmless request ids, no steering."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from typing import Any

import pytest

from lepton_ray.serving import edge


def through(*headers: tuple[bytes, bytes], kind: str = "http") -> tuple[dict[bytes, bytes] | None, list[Any]]:
    """The headers that the proxy behind sees (None where it is not asked), and what the edge itself answers."""
    seen: list[dict[bytes, bytes]] = []
    sent: list[Any] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        assert len(scope["headers"]) == len({name for name, _ in scope["headers"]})
        seen.append(dict(scope["headers"]))

    async def receive() -> Any:
        raise AssertionError("the edge reads no body")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(edge.Edge(proxy)({"type": kind, "headers": list(headers)}, receive, send))
    return (seen[0] if seen else None), sent


@pytest.mark.parametrize("given", [b"abc_DEF-1", b"x" * 64])
def test_harmless_request_ids_go_through(given: bytes) -> None:
    seen, _ = through((b"x-request-id", given), (b"host", b"x"))
    assert seen == {b"x-request-id": given, b"host": b"x"}


@pytest.mark.parametrize("given", [b"x" * 65, b"x" * 9000, b"a b", b"\xff\xfe", b"a\tb", b"", b"<b>"])
def test_other_request_ids_are_replaced(given: bytes) -> None:
    """Serve echoes whatever it finds there, and decodes it as UTF-8."""
    seen, _ = through((b"x-request-id", given))
    assert seen is not None
    assert re.fullmatch(rb"[0-9a-f]{32}", seen[b"x-request-id"])


def test_steering_headers_are_dropped() -> None:
    """The client's wish for a time limit reaches the endpoint under a name that Serve does not know."""
    steering = [(name, b"1") for name in edge.STEERING]
    seen, _ = through(*steering, (b"x-request-timeout-seconds", b"0"), (b"x-lepton-timeout-seconds", b"9"))
    assert seen is not None
    assert seen.keys() == {b"x-request-id", b"x-lepton-timeout-seconds"}
    assert seen[b"x-lepton-timeout-seconds"] == b"0"


@pytest.mark.parametrize(
    "headers", [[(b"a%d" % index, b"") for index in range(101)], [(b"a", b"x" * 65_536)]], ids=["many", "long"]
)
def test_too_many_or_too_long_headers_are_431(headers: list[tuple[bytes, bytes]]) -> None:
    """B67 of the bad inputs: Serve's proxy takes 64 KB and more."""
    seen, sent = through(*headers)
    assert seen is None
    assert sent[0]["status"] == 431
    assert (b"connection", b"close") in sent[0]["headers"]
    document = json.loads(sent[1]["body"])
    assert document["status"] == 431
    assert (b"content-length", str(len(sent[1]["body"])).encode()) in sent[0]["headers"]


def test_a_websocket_passes_untouched() -> None:
    seen, _ = through((b"x-session-id", b"1"), kind="websocket")
    assert seen == {b"x-session-id": b"1"}


def test_the_edge_loads_without_heavy_libraries() -> None:
    """It is imported by every proxy of the cluster."""
    code = f"""import sys
import {edge.IMPORT_PATH.partition(":")[0]} as edge
assert edge.{edge.IMPORT_PATH.partition(":")[2]}()
print(*({{"torch", "ray", "pyarrow", "deltalake"}} & sys.modules.keys()))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
