"""The S3 store on a real server: what only an object store can do or refuse."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from seaweed import SeaweedS3, free_ports

from lepton_ray.errors import LeptonError, UnavailableError, UsageError
from lepton_ray.storage import Store, open_store
from lepton_ray.storage import s3 as s3_module
from lepton_ray.storage.s3 import S3Store
from lepton_ray.storage.s3_client import Patience

pytestmark = pytest.mark.s3
HASTY = Patience(connect_s=0.3, call_s=0.3, total_s=1.0, first_wait_s=0.05, longest_wait_s=0.1)
"""For servers that are away."""


def test_nobody_listening_is_told(s3_store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(UnavailableError, match="no connection") as caught:
        S3Store("bucket", "", Patience(connect_s=2.0, total_s=2.0)).put("a", b"x")
    assert "127.0.0.1" in str(caught.value)


def test_more_objects_than_a_page_holds(s3_store: Store, monkeypatch: pytest.MonkeyPatch):
    """Listings and deletions go on where the server's limit of one call ends."""
    monkeypatch.setattr(s3_module, "KEYS_AT_ONCE", 3)
    keys = [f"many/{number}" for number in range(7)]
    for key in [*keys, "many/deep/1", "many/deeper/2"]:
        s3_store.put(key, b"x")
    assert [entry.key for entry in s3_store.list("many")] == [*keys, "many/deep/1", "many/deeper/2"]
    assert s3_store.list_names("many") == [*"0123456", "deep", "deeper"]
    assert s3_store.delete_prefix("many") == len(keys) + 2
    assert s3_store.list("") == []


def test_listing_is_never_stale(s3_store: Store):
    """What another process wrote or deleted is seen at once: nothing is cached."""
    other = open_store(s3_store.uri)
    for number in range(3):
        other.put(f"a/{number}", b"x")
        assert len(s3_store.list("a")) == number + 1
    other.delete("a/0")
    assert [entry.key for entry in s3_store.list("a")] == ["a/1", "a/2"]


def test_missing_bucket_is_named(s3_environment: SeaweedS3):
    store = open_store("s3://no-such-bucket/x")
    for call in (store.check_writable, lambda: store.put("a", b"x"), lambda: store.list(""), lambda: store.get("a")):
        with pytest.raises(UsageError, match="s3://no-such-bucket/x: the bucket does not exist"):
            call()


@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_bad_credentials_are_told_without_showing_them(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
):
    """One line that names the store, exit code 2, and neither key in it or in the log of our libraries."""
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    if fault == "missing":
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    caplog.set_level(logging.DEBUG, "s3fs")
    caplog.set_level(logging.DEBUG, "lepton_ray")
    store = open_store(s3_store.uri)
    with pytest.raises(UsageError, match="AWS_") as caught:
        store.check_writable()
    text = str(caught.value) + repr(store) + str(store.__reduce__()) + caplog.text
    assert store.uri in str(caught.value)
    assert "hunter2" not in text


@pytest.mark.parametrize("endpoint", ["nonsense", "http://user:hunter2@127.0.0.1:1", "https://127.0.0.1:{port}"])
def test_bad_endpoint_is_told(s3: SeaweedS3, s3_store: Store, monkeypatch: pytest.MonkeyPatch, endpoint: str):
    """No URL, one with a password, TLS to a server without: one line, and the password not in it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.format(port=s3.port))
    with pytest.raises(LeptonError, match=r"s3://bucket: ") as caught:
        S3Store("bucket", "", HASTY).get("a")
    assert isinstance(caught.value, UsageError | UnavailableError)
    assert "hunter2" not in str(caught.value)


def test_region_is_not_needed(s3_store: Store, monkeypatch: pytest.MonkeyPatch):
    """Servers of one's own have none."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    store = open_store(s3_store.uri)
    store.put("a", b"x")
    assert store.get("a") == b"x"


def test_store_works_from_many_threads_at_once(s3_store: Store):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: s3_store.put(f"t/{n}", b"%d" % n), range(100)))
        assert list(pool.map(lambda n: s3_store.get(f"t/{n}"), range(100))) == [b"%d" % n for n in range(100)]


def test_process_that_used_the_store_ends_quietly(s3_store: Store):
    """No hanging thread and no "unclosed session" on stderr."""
    script = (
        "import sys; from lepton_ray.storage import open_store; s = open_store(sys.argv[1]); s.put('a', b'x')\n"
        "print(s.get('a').decode())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, s3_store.uri], capture_output=True, text=True, timeout=60, check=True
    )
    assert (ran.stdout, ran.stderr) == ("x\n", "")
