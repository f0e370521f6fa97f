"""Checkpoints on a real S3 server behind a proxy that throttles, resets, refuses and goes away (F32-35, F40, F41)."""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from chain import Chain, digest_of_entries
from damage import look
from fault_proxy import Deed, FaultProxy, Request
from history import History
from player import RUN, Quiet, play
from results import Table, repeats
from scenario import Scenario
from seaweed import SeaweedS3

from lepton_ray.errors import LeptonError
from lepton_ray.storage import Store, open_store
from lepton_ray.storage import s3 as s3_module
from lepton_ray.storage.s3 import S3Store
from lepton_ray.storage.s3_client import Patience
from lepton_ray.training.checkpoint_writer import CheckpointWriter
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.lease import RunLease

pytestmark = pytest.mark.s3
QUICK = Patience(connect_s=2.0, call_s=8.0, total_s=30.0, first_wait_s=0.02, longest_wait_s=0.2)
"""Long enough for the seconds that the server makes writers of one key wait."""
SMALLEST_PART = 5 * 2**20


@pytest.fixture
def proxy(s3_store: Store, s3_environment: SeaweedS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server; the environment leads to it, `s3_store` goes on to reach the server directly."""
    s3_store.list("")  # connects while the environment still names the server
    with FaultProxy(s3_environment.port) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        yield made


def through(store: Store, patience: Patience = QUICK) -> S3Store:
    """The same place as `store`, seen through the proxy that the environment names."""
    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, patience)


def sometimes(seed: int, shares: dict[Deed, float]) -> Callable[[Request], Deed]:
    """A rule that does each deed to its share of the requests."""
    draw, lock = random.Random(seed), threading.Lock()  # noqa: S311 - not a secret

    def rule(_request: Request) -> Deed:
        with lock:
            at = draw.random()
        for deed, share in shares.items():
            at -= share
            if at < 0:
                return deed
        return "pass"

    return rule


class Training:
    """A chain that is trained and saved, as a rank does it, without waiting for its checkpoints."""

    def __init__(self, store: Store, total: int = 1000) -> None:
        self.lease = RunLease.acquire(store, RUN, ttl_s=600)
        self.checkpoints = CheckpointStore(store, RUN, self.lease.attempt)
        alone = SimpleNamespace(rank=0, world_size=1, all_write=False)
        self.writer = CheckpointWriter(self.checkpoints, 3, Quiet(), alone)  # type: ignore[arg-type]  # what it uses
        self.chain = Chain(64, 4, 0)

    def save(self, *, settle: bool = True) -> int:
        """A step, and its checkpoint; returns the step."""
        self.chain.advance()
        self.writer.submit(self.chain.step, self.chain.copy(), self.chain.state(self.lease.attempt))
        if settle:
            self.writer.settle()
        return self.chain.step


def newest(store: Store) -> int:
    """The newest step that verifies; 0 where there is none."""
    found = CheckpointStore(store, RUN, 0).newest()
    return 0 if found is None else found.step


def test_scenarios_on_s3_with_a_bad_network(
    proxy: FaultProxy, s3_environment: SeaweedS3, s3_store: Store, tmp_path: Path, table: Table
) -> None:
    """Everything that is done to a local store, with throttling, resets and lost answers below it."""
    count, requests = repeats(1, 40), 0
    for seed in range(count):
        bucket, _, prefix = s3_store.uri.removeprefix("s3://").partition("/")
        place = f"{prefix}/{seed}"
        proxy.rule = sometimes(seed, {"slow_down": 0.1, "reset_early": 0.03, "reset_late": 0.03, "lose": 0.04})
        history = History(tmp_path / f"history-{seed}.jsonl")
        direct = open_store(s3_environment.uri(place))
        direct._client = s3_store._client  # type: ignore[attr-defined]  # the way past the proxy
        found = play(Scenario.draw(seed), direct, history, via=S3Store(bucket, place, QUICK))
        assert found == [], f"{Scenario.draw(seed).describe()}: {found}"
    requests = len(proxy.seen)
    table.add(
        "F15-F41",
        "mixed faults of 1 to 4 attempts",
        "S3, 20 % of requests fail",
        count,
        f"0 violations, {requests} requests",
    )


def test_throttling_costs_no_checkpoint(proxy: FaultProxy, s3_store: Store, table: Table) -> None:
    """503 SlowDown on 30 % of all calls: every checkpoint is committed, for less than twice the requests."""
    store, count = through(s3_store), repeats(5, 200)
    training = Training(store)
    for _ in range(3):
        training.save()
    proxy.seen.clear()
    for _ in range(count):
        training.save()
    calm = len(proxy.seen)
    proxy.seen.clear()
    proxy.rule = sometimes(1, {"slow_down": 0.3})
    for _ in range(count):
        step = training.save()
    assert [found for found in training.checkpoints.steps() if found > step - 3] == [step - 2, step - 1, step]
    assert newest(s3_store) == step
    more = len(proxy.seen) / calm
    training.writer.finish()
    training.lease.release()
    assert more < 2.0
    assert calm / count < 20, "old checkpoints are not looked at again and again"
    table.add(
        "F32", "503 SlowDown on 30 % of calls", "fault proxy", count, f"0 checkpoints lost, {more:.2f} x requests"
    )


def test_storage_that_goes_away_holds_nothing_up(
    s3_environment: SeaweedS3, s3_store: Store, monkeypatch: pytest.MonkeyPatch, table: Table
) -> None:
    """Nobody listens at the server's port: steps go on, and after its return the newest state is committed."""
    s3_store.list("")
    patience = Patience(connect_s=1.0, call_s=5.0, total_s=60.0, first_wait_s=0.05, longest_wait_s=0.5)
    with FaultProxy(s3_environment.port) as first:
        monkeypatch.setenv("AWS_ENDPOINT_URL", first.endpoint)
        training = Training(through(s3_store, patience))
        before = [training.save() for _ in range(3)][-1]
        assert newest(s3_store) == before
    for _ in range(20):  # each would wait for the one before, a minute long, if saving held training up
        last = training.save(settle=False)
    assert newest(s3_store) == before, "the server was really away"
    with FaultProxy(s3_environment.port, port=first.port):
        returned = time.monotonic()
        training.writer.finish()  # nothing new is saved: what waits is what gets committed
        took = time.monotonic() - returned
        assert newest(s3_store) == last
        training.lease.release()
    assert took < 30.0
    table.add(
        "F33",
        "storage away during training",
        "nobody listens",
        1,
        f"20 checkpoints asked for, no wait; newest committed {took:.1f} s after return",
    )


def test_what_fails_for_good_costs_a_checkpoint_and_not_the_run(
    proxy: FaultProxy, s3_store: Store, s3_environment: SeaweedS3, caplog: pytest.LogCaptureFixture, table: Table
) -> None:
    """403 from some time on: training goes on, the log says why and holds no secret; with rights again it is saved."""
    training = Training(through(s3_store))
    before = training.save()
    proxy.rule = lambda _: "deny"
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            training.save()
    assert newest(s3_store) == before
    assert "access denied" in caplog.text
    assert s3_environment.secret_key not in caplog.text
    proxy.rule = lambda _: "pass"
    assert newest(s3_store) == before
    last = training.save()
    training.writer.finish()
    training.lease.release()
    assert newest(s3_store) == last
    table.add(
        "F40", "403 in the middle of a run", "fault proxy", 3, "0 runs lost, 0 secrets in the log, next one saved"
    )


@pytest.mark.parametrize("deed", ["slow", "hang"])
def test_slow_and_hanging_storage_leaves_nothing_stuck(
    proxy: FaultProxy, s3_store: Store, deed: Deed, table: Table
) -> None:
    """A slow checkpoint is committed; one that hangs is given up at its deadline, and no thread stays behind."""
    patience = Patience(connect_s=1.0, call_s=1.0, total_s=2.0, first_wait_s=0.05, longest_wait_s=0.1)
    training = Training(through(s3_store, patience))
    step = training.save()
    threads = {thread.ident for thread in threading.enumerate()}
    proxy.bytes_per_s, proxy.rule = 20_000.0, lambda request: deed if request.method == "PUT" else "pass"
    started = time.monotonic()
    later = training.save()
    took = time.monotonic() - started
    proxy.rule = lambda _: "pass"
    assert newest(s3_store) == (later if deed == "slow" else step)
    assert training.save() == newest(s3_store)
    own = [t for t in threading.enumerate() if t.ident not in threads and "process_request" not in t.name]
    assert own == []
    training.writer.finish()
    training.lease.release()
    table.add("F34", f"{deed} storage", "fault proxy, deadline 2 s", 1, f"over after {took:.1f} s, 0 threads stuck")


def test_cut_connections_show_no_torn_object(
    proxy: FaultProxy, s3_store: Store, s3: SeaweedS3, monkeypatch: pytest.MonkeyPatch, table: Table
) -> None:
    """Reset in the middle of a body, of an answer, between parts: a reader sees the whole object or none."""
    monkeypatch.setattr(s3_module, "PART_BYTES", SMALLEST_PART)
    hasty = Patience(connect_s=1.0, call_s=4.0, total_s=1.0, first_wait_s=0.02, longest_wait_s=0.1)
    count, torn, told = repeats(12, 500), 0, 0
    for number in range(count):
        draw = random.Random(number)  # noqa: S311 - not a secret
        size = SMALLEST_PART + 1000 if number % 12 == 11 else draw.choice((10, 5_000, 200_000))
        data = draw.randbytes(size)
        proxy.rule = sometimes(number, {"reset_early": 0.4, "reset_late": 0.2, "lose": 0.1, "drop": 0.2})
        key = f"object-{uuid.uuid4().hex}"
        try:
            through(s3_store, hasty).put_if_absent(key, data)
            acknowledged = True
        except LeptonError:
            acknowledged = False
        there = s3_store.exists(key)
        torn += there and s3_store.get(key) != data
        told += acknowledged
        assert there or not acknowledged
    assert torn == 0
    listed = s3.client().list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])
    for upload in listed:  # begun, and the answer to the beginning was lost: nobody knows their number
        s3.client().abort_multipart_upload(Bucket=s3.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    table.add(
        "F35", "connection reset in mid-upload", "fault proxy", count, f"0 torn objects, {told} acknowledged and whole"
    )


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_eight_writers_of_one_step_agree(kind: str, request: pytest.FixtureRequest, table: Table) -> None:
    """Whoever is first, all eight are told the same content, and that is what is stored."""
    store: Store = request.getfixturevalue(f"{kind}_store")
    lease = RunLease.acquire(store, RUN, ttl_s=600)
    rounds = repeats(20, 200) if kind == "file" else repeats(1, 40)
    for step in range(1, rounds + 1):
        told = race(store, lease.attempt, step)
        stored = look(store, RUN)["steps"][str(step)]
        assert stored["whole"]
        assert told == [stored["digest"]] * 8
    lease.release()
    table.add("F41", "8 writers race for one step", kind, rounds, "1 content each time, told to all 8")


def race(store: Store, attempt: int, step: int) -> list[str]:
    """What each of eight writers, each with its own content, is told to stand."""
    told: list[str] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        checkpoints = CheckpointStore(store, RUN, attempt)
        entries = checkpoints.write(step, {"model.safetensors": b"%d of %d" % (number, step)})
        barrier.wait(60)
        told.append(digest_of_entries(checkpoints.commit(step, entries, {})))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return told
