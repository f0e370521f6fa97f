"""A process that is killed while it writes a checkpoint leaves the one before, and files that are collected (F19)."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from damage import look
from fault_proxy import Deed, FaultProxy, Request
from history import OK, History
from results import Table, repeats
from seaweed import SeaweedS3

from lepton_ray.storage import Store
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.lease import RunLease

pytestmark = pytest.mark.s3
RUN = "killed"
SCRIPT = """
import sys
from lepton_ray.storage import open_store
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.lease import RunLease
store = open_store(sys.argv[1])
lease = RunLease.acquire(store, "killed", ttl_s=600)
checkpoints = CheckpointStore(store, "killed", lease.attempt)
for step in (10, 20, 30):
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    files = {name: f"{name} {step} {lease.attempt}".encode() * 50 for name in names}
    checkpoints.save(step, files, {})
    print(step, flush=True)
"""
POINTS = [(number, deed) for number in range(4) for deed in ("hang", "lose")]
"""The n-th write of the checkpoint of step 20, not done or done, when the writer is killed; 3 is the manifest's."""


def kill_at(proxy: FaultProxy, uri: str, number: int, deed: Deed) -> None:
    """Run the writer until the n-th write of step 20 is under way (or done, and the answer lost), and kill it."""
    arrived, seen = threading.Event(), []

    def rule(request: Request) -> Deed:
        if request.method == "PUT" and "step-000000000020" in request.path:
            seen.append(request)
            if len(seen) > number:
                arrived.set()
                return deed if len(seen) == number + 1 else "hang"
        return "pass"

    proxy.rule = rule
    with subprocess.Popen([sys.executable, "-c", SCRIPT, uri], stdout=subprocess.DEVNULL) as writer:
        try:
            assert arrived.wait(120), "the writer did not come so far"
            if deed == "lose":  # its next try says that the server has done it
                while len(seen) < number + 2 and writer.poll() is None:
                    threading.Event().wait(0.005)
        finally:
            writer.kill()
            writer.wait(10)
    proxy.rule = lambda _: "pass"


def test_a_writer_killed_in_mid_upload_costs_its_checkpoint_only(
    s3_store: Store, s3_environment: SeaweedS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: Table
) -> None:
    """Before the manifest is stored the one before is used, after it the new one; never a part of one."""
    s3_store.list("")
    count, wrong, left = repeats(3, 40), 0, 0
    points = [POINTS[(3 * number) % len(POINTS)] for number in range(count)]
    with FaultProxy(s3_environment.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for number, deed in points:
            s3_store.delete_prefix("runs") if s3_store.list("") else None
            history = History(tmp_path / f"{number}-{deed}.jsonl")
            call = history.begin("commit", "writer", step=20)
            kill_at(proxy, s3_store.uri, number, deed)
            lease = RunLease.acquire(s3_store, RUN)
            found = CheckpointStore(s3_store, RUN, lease.attempt).newest()
            committed = (number, deed) == (3, "lose")
            call.answer(OK, resumed=found.step if found else 0)
            assert found is not None
            wrong += found.step != (20 if committed else 10)
            wrong += any(data != f"{name} {found.step} 1".encode() * 50 for name, data in found.files.items())
            CheckpointStore(s3_store, RUN, lease.attempt).collect_orphans()
            left += look(s3_store, RUN)["strays"]
            lease.release()
            history.close()
    assert (wrong, left) == (0, 0)
    table.add("F19", "writer killed in mid-upload", "SIGKILL at each of 8 points", count, "0 wrong resumes, 0 orphans")
