"""The S3 store behind a proxy that loses, cuts, delays and refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from fault_proxy import Deed, FaultProxy, Request
from seaweed import SeaweedS3

from lepton_ray.errors import ConflictError, NotFoundError, UnavailableError, UsageError
from lepton_ray.storage import Store
from lepton_ray.storage import s3 as s3_module
from lepton_ray.storage.s3 import S3Store
from lepton_ray.storage.s3_client import Patience

pytestmark = pytest.mark.s3
QUICK = Patience(connect_s=2.0, call_s=6.0, total_s=10.0, first_wait_s=0.05, longest_wait_s=0.2)
"""Long enough for a second or two that the server makes writers of one key wait."""
HASTY = Patience(connect_s=0.3, call_s=0.3, total_s=1.0, first_wait_s=0.05, longest_wait_s=0.1)
"""For servers that are away."""
SMALLEST_PART = 5 * 1024 * 1024
"""What S3 accepts as a part that is not the last."""


@pytest.fixture
def proxy(s3_store: Store, s3_environment: SeaweedS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server; the environment leads to it, `s3_store` goes on to reach the server directly."""
    s3_store.list("")  # connects while the environment still names the server
    with FaultProxy(s3_environment.port) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        yield made


@pytest.fixture
def store(proxy: FaultProxy, s3_store: Store) -> S3Store:
    """The same place as `s3_store`, seen through the proxy by somebody of little patience."""
    bucket, _, prefix = s3_store.uri.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, QUICK)


def first(count: int, deed: Deed, method: str = "PUT") -> Callable[[Request], Deed]:
    """Do the deed to the first `count` requests of a method, and pass on the others."""
    left = [count]

    def rule(request: Request) -> Deed:
        if request.method == method and left[0]:
            left[0] -= 1
            return deed
        return "pass"

    return rule


@pytest.mark.parametrize("deed", ["lose", "drop", "slow_down"])
def test_put_if_absent_survives_a_bad_answer(store: S3Store, proxy: FaultProxy, s3_store: Store, deed: Deed):
    """Whether the write was done and its answer lost, or not done at all: it is a success, once.

    On a connection that was used before, the HTTP library repeats a PUT without telling anybody.
    """
    store.list("")
    proxy.rule = first(1, deed)
    store.put_if_absent("claim", b"mine")
    assert proxy.count("PUT") == 2
    assert s3_store.get("claim") == b"mine"
    with pytest.raises(ConflictError):
        store.put_if_absent("claim", b"yours")


@pytest.mark.parametrize("deed", ["lose", "drop"])
def test_replace_survives_a_bad_answer(store: S3Store, proxy: FaultProxy, s3_store: Store, deed: Deed):
    etag = store.put("record", b"1")
    proxy.rule = first(1, deed)
    new = store.replace("record", b"2", etag)
    assert s3_store.fetch("record").etag == new
    assert s3_store.get("record") == b"2"


def test_lost_race_after_a_bad_answer_is_a_conflict(store: S3Store, proxy: FaultProxy, s3_store: Store):
    """Our request never arrives, somebody else claims the key before we try again: not ours, though it looks equal."""

    def rule(request: Request) -> Deed:
        if proxy.count("PUT") == 1:
            s3_store.put("claim", b"equal")
            return "drop"
        return "pass"

    proxy.rule = rule
    with pytest.raises(ConflictError, match="claim"):
        store.put_if_absent("claim", b"equal")


def test_slow_down_is_waited_out(store: S3Store, proxy: FaultProxy):
    proxy.rule = first(3, "slow_down")
    store.put("a", b"x")
    assert proxy.count("PUT") == 4
    proxy.rule = first(2, "slow_down", "GET")
    assert store.get("a") == b"x"


def test_cut_body_is_read_again(store: S3Store, proxy: FaultProxy):
    """Half an object is never returned."""
    store.put("a", b"0123456789" * 10_000)
    proxy.rule = first(1, "cut", "GET")
    assert store.get("a") == b"0123456789" * 10_000
    assert proxy.count("GET") == 2


@pytest.mark.parametrize("deed", ["hang", "drop", "slow_down"])
def test_store_away_is_told_within_the_deadline(proxy: FaultProxy, deed: Deed):
    """Also a server that takes the request and never answers; first connection included."""
    proxy.rule = lambda _: deed
    store = S3Store("bucket", "", HASTY)
    for call in (lambda: store.get("a"), lambda: store.put_if_absent("a", b"x"), lambda: store.list("")):
        started = time.monotonic()
        with pytest.raises(UnavailableError, match=store.uri):
            call()
        assert time.monotonic() - started < HASTY.total_s + 1.0


def test_dripping_body_does_not_hold_the_reader(proxy: FaultProxy, s3_store: Store):
    """A body that never stands still and never ends, which no limit on the wait for single bytes finds out."""
    s3_store.put("a", bytes(1000))
    proxy.rule = lambda _: "drip"
    bucket, _, prefix = s3_store.uri.removeprefix("s3://").partition("/")
    store = S3Store(bucket, prefix, HASTY)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="timed out"):
        store.get("a")
    assert time.monotonic() - started < HASTY.total_s + 1.0


def test_stalled_upload_does_not_hold_the_writer(proxy: FaultProxy):
    """A server that stops reading: 16 MiB fill all buffers on the way."""
    proxy.rule = lambda _: "stall"
    store = S3Store("bucket", "", dataclasses.replace(HASTY, slowest_bytes_per_s=1e9))
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="timed out"):
        store.put("a", bytes(16 << 20))
    assert time.monotonic() - started < HASTY.total_s + 1.0


def test_refusal_is_not_tried_again(store: S3Store, proxy: FaultProxy):
    proxy.rule = lambda _: "deny"
    with pytest.raises(UsageError, match="access denied"):
        store.put("a", b"x")
    assert proxy.count("PUT") == 1


def test_every_write_carries_a_checksum(store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    """CRC32 on objects and on parts: a byte changed on the way is refused by the server."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # must not switch them off
    monkeypatch.setattr(s3_module, "PART_BYTES", SMALLEST_PART)
    store.put("small", b"x")
    store.put("large", bytes(SMALLEST_PART + 1))
    puts = [request for request in proxy.seen if request.method == "PUT"]
    assert len(puts) == 3
    assert all(request.headers.get("x-amz-checksum-crc32") for request in puts)


def test_server_without_conditional_writes_is_found_out(store: S3Store, proxy: FaultProxy):
    """A server that says yes to every claim would let two drivers both win."""
    proxy.rule = lambda request: "claim" if request.method == "PUT" else "pass"
    with pytest.raises(UsageError, match="ignores If-None-Match"):
        store.check_writable()


def test_large_object_goes_up_in_parts(store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    """Three parts, whole at the other end, under the same conditions as small ones; a lost last answer is a success."""
    monkeypatch.setattr(s3_module, "PART_BYTES", SMALLEST_PART)
    data = b"0123456789abcdef" * (SMALLEST_PART // 8) + b"end"
    proxy.rule = lambda request: "lose" if "uploadId=" in request.path and is_first_end(request) else "pass"
    ends: list[Request] = []

    def is_first_end(request: Request) -> bool:
        if request.method == "POST":
            ends.append(request)
        return request.method == "POST" and len(ends) == 1

    etag = store.put_if_absent("large", data)
    assert len(ends) == 2
    assert store.get("large") == data
    with pytest.raises(ConflictError):
        store.put_if_absent("large", data + b"other")
    with pytest.raises(ConflictError):
        store.replace("large", data, '"stale"')
    store.replace("large", data + b"new", etag)
    assert store.get("large") == data + b"new"


def test_failed_upload_leaves_nothing(
    store: S3Store, proxy: FaultProxy, s3: SeaweedS3, monkeypatch: pytest.MonkeyPatch
):
    """A part is refused: no object, and no parts that somebody pays for."""
    monkeypatch.setattr(s3_module, "PART_BYTES", SMALLEST_PART)
    proxy.rule = lambda request: "deny" if "partNumber=2" in request.path else "pass"
    with pytest.raises(UsageError, match="access denied"):
        store.put("large", bytes(3 * SMALLEST_PART))
    assert store.list("") == []
    assert open_uploads(s3) == []


def test_killed_upload_leaves_nothing_visible(store: S3Store, proxy: FaultProxy, s3: SeaweedS3):
    """SIGKILL while parts are under way: no object under the key, and the next writer succeeds."""
    arrived, script = (
        threading.Event(),
        (
            "import sys; from lepton_ray.storage import open_store, s3; s3.PART_BYTES = 5 << 20\n"
            "open_store(sys.argv[1]).put_if_absent('large', bytes(16 << 20))"
        ),
    )

    def rule(request: Request) -> Deed:
        if "partNumber=3" in request.path:
            arrived.set()
            return "hang"
        return "pass"

    proxy.rule = rule
    writer = subprocess.Popen([sys.executable, "-c", script, store.uri])
    with writer:
        assert arrived.wait(timeout=30)
        writer.kill()
        writer.wait(timeout=10)
    assert store.list("") == []
    store.put_if_absent("large", b"whole")
    assert store.get("large") == b"whole"
    for upload in open_uploads(s3):
        s3.client().abort_multipart_upload(Bucket=s3.bucket, **upload)


def open_uploads(server: SeaweedS3) -> list[dict[str, str]]:
    """Uploads that were begun and neither finished nor dropped."""
    found = server.client().list_multipart_uploads(Bucket=server.bucket).get("Uploads", [])
    return [{"Key": upload["Key"], "UploadId": upload["UploadId"]} for upload in found]


def test_missing_object_is_not_tried_again(store: S3Store, proxy: FaultProxy):
    with pytest.raises(NotFoundError, match="nothing"):
        store.get("nothing")
    assert proxy.count("GET") == 1
