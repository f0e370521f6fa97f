"""Fixtures that several rooms share: a real S3 server, stores of both kinds, and the proof that no process is left."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from seaweed import SeaweedS3

from lepton_ray.storage import Store, open_store

GRACE_S = 10.0
"""How long processes that tests started may take to end after the last test."""
MARK = f"LEPTON_TEST_SESSION_{os.getpid()}"
"""Set in the environment of the session: a descendant that lost its parents is still known by it."""
OTHER_SOURCES = ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SHARED_CREDENTIALS_FILE")


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail the session, naming them, if processes that the tests started outlive it by ten seconds."""
    os.environ[MARK] = uuid.uuid4().hex
    yield
    deadline = time.monotonic() + GRACE_S
    left = started_processes()
    while left and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.2)
        left = started_processes()
    os.environ.pop(MARK)
    names = [describe(process) for process in left]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    if names:
        pytest.fail("processes that tests started are left: " + "; ".join(names), pytrace=False)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the tests of a file; its processes find the tests' modules."""
    from lepton_ray.cluster import connect

    tests = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests / "integration"), *sys.path]))
        with connect():
            yield


def started_processes() -> list[psutil.Process]:
    """Living processes that this session started: its descendants, and orphans that carry its mark."""
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == os.environ[MARK]:
                found[process.pid] = process
    return [process for process in found.values() if is_alive(process)]


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not, and multiprocessing's tracker lives as long as its interpreter."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return not any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def describe(process: psutil.Process) -> str:
    """Number and command line of a process."""
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return str(process.pid)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    """A real S3 server for the session; tests that use it carry `@pytest.mark.s3`."""
    with SeaweedS3(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def s3_environment(s3: SeaweedS3, monkeypatch: pytest.MonkeyPatch) -> SeaweedS3:
    """The server, with the AWS variables of this process (and of those it starts) leading to it."""
    for name in OTHER_SOURCES:
        monkeypatch.delenv(name, raising=False)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def file_store(tmp_path: Path) -> Store:
    """An empty store in a fresh folder."""
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def s3_store(s3_environment: SeaweedS3) -> Store:
    """An empty store under a fresh prefix of the S3 server."""
    return open_store(s3_environment.uri(f"test-{uuid.uuid4().hex[:12]}"))


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store, once of each kind."""
    made: Store = request.getfixturevalue(f"{request.param}_store")
    return made
