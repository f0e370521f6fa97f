"""Clients for the tests of endpoints: waiting, steady load, the document of a command that stays."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from served_model import image


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Poll until it holds; fail naming it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


@contextlib.contextmanager
def load(url: str, clients: int) -> Iterator[list[int]]:
    """Clients that ask without a pause during the block; afterwards the list holds every status, 0 for no answer."""
    codes: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=30, trust_env=False) as client:
            while not stop.is_set():
                try:
                    codes.append(client.post(f"{url}/predict", json={"image": image(len(codes))}).status_code)
                except httpx.TransportError:
                    codes.append(0)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield codes
    finally:
        stop.set()
        for thread in threads:
            thread.join(40)


def read_document(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON document that the command prints before it stays; what it said instead where it ends."""
    assert process.stdout is not None
    lines = []
    while not lines or lines[-1].rstrip() != "}":
        line = process.stdout.readline()
        assert line, process.communicate(timeout=10)
        lines.append(line)
    document: dict[str, Any] = json.loads("".join(lines))
    return document
