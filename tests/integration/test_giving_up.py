"""Runs that end because what failed repeats itself: at the same step, or for the same lack of memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lepton_ray
from lepton_ray.errors import LeptonError
from lepton_ray.monitoring.incidents import incidents
from lepton_ray.storage import Store, open_store

pytestmark = pytest.mark.ray
LIMIT = 4 * 2**30
DOOMED_STEP = 5


def doomed(options: dict[str, Any]) -> None:
    """A loop of which rank 1 is killed at the same step each time."""
    session = lepton_ray.training.session()
    model, optimizer = torch.nn.Linear(1, 1), None
    model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    points = torch.utils.data.TensorDataset(torch.ones(96, 1))
    for (x,) in session.batches(points, 12, epochs=2):
        if session.step == DOOMED_STEP and session.rank == 1:
            wait_for_ledger(open_store(options["store"]))
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()


def wait_for_ledger(store: Store) -> None:
    """Until rank 0 has noted the step before, as it does once a second: then the failure is at a known step."""
    deadline = time.monotonic() + 30
    while json.loads(store.get("runs/doomed/ledger/g1-rank0.json"))["last_step"] != DOOMED_STEP:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("ray_cluster")
def test_a_crash_at_the_same_step_ends_the_run_at_its_third_time(file_store: Store) -> None:
    """However many failures are allowed; with the sentence, and an incident for each."""
    settings = {
        "run": "doomed",
        "training": {"workers": 2, "max_failures": 50, "options": {"store": file_store.uri}},
    }
    said = rf"no progress since step {DOOMED_STEP}: rank 1 failed: its process was killed or crashed \(.*\) \(3 tries\)"
    with pytest.raises(LeptonError, match=said):
        lepton_ray.run_distributed(doomed, settings, store=file_store)
    groups = [name for name in file_store.list_names("runs/doomed/ledger") if name.endswith("-rank0.json")]
    assert len(groups) == 3
    found = incidents(file_store, "doomed")
    assert sorted(each.kind for each in found) == ["no_progress", *["worker_lost"] * 3]
    assert {(each.rank, each.step) for each in found} == {(1, DOOMED_STEP)}
    record = json.loads(file_store.get("runs/doomed/record.json"))
    assert record["state"] == "failed"
    assert re.search(said, record["error"])


HUNGRY = """
import os, sys
folder, store = sys.argv[1:]
if folder:
    with open(os.path.join(folder, "cgroup.procs"), "w") as file:
        file.write(str(os.getpid()))
import lepton_ray

def hungry(options):
    import torch
    session = lepton_ray.training.session()
    model = session.prepare(torch.nn.Linear(1, 1))
    points = torch.utils.data.TensorDataset(torch.ones(96, 1))
    held = []
    for (x,) in session.batches(points, 12, epochs=1):
        while session.rank == 1 and session.step == 2:
            if not options["limited"]:
                raise MemoryError
            held.append(bytearray(os.urandom(1)) * 2**27)
        model(x).sum().backward()

settings = {"run": "hungry", "training": {"workers": 2, "options": {"limited": bool(folder)}}}
try:
    lepton_ray.run_distributed(hungry, settings, store=lepton_ray.storage.open_store(store))
except lepton_ray.errors.LeptonError as error:
    print(error)
"""


@contextlib.contextmanager
def limited_memory() -> Iterator[Path | None]:
    """A cgroup with 4 GiB of memory, as a pod has one; None where this machine lets nobody make one."""
    mount = Path("/sys/fs/cgroup")
    old = (mount / "memory").is_dir()
    folder = (mount / "memory" if old else mount) / f"lepton-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(LIMIT))
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        yield None
        return
    try:
        yield folder
    finally:
        deadline = time.monotonic() + 60
        while (folder / "cgroup.procs").read_text():  # it is removed only once it is empty
            assert time.monotonic() < deadline, "processes are left in the cgroup"
            time.sleep(0.1)
        folder.rmdir()


@pytest.mark.timeout(400)
def test_lack_of_memory_is_tried_once_more_and_then_told_with_advice(file_store: Store) -> None:
    """The kernel kills the rank at the limit of its cgroup, twice; it is not taken for a crash."""
    with limited_memory() as folder:
        command = [sys.executable, "-c", HUNGRY, str(folder or ""), file_store.uri]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    why = "ended by the kernel at the memory limit of 4096 MiB" if folder else "MemoryError"
    assert f"rank 1 failed: out of memory: {why}" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "lower training.global_batch, or give the ranks more memory" in done.stdout
    assert [each.kind for each in incidents(file_store, "hungry")].count("out_of_memory") == 2
