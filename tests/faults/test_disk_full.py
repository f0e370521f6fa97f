"""A full disk costs the checkpoints that do not fit, not the run and not what is stored (F42)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from chain import Chain
from damage import committed, look
from player import RUN, Quiet
from results import Table

from lepton_ray.storage import Store, durable, local, open_store
from lepton_ray.training.checkpoint_writer import CheckpointWriter
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.lease import RunLease

SIZE_KB = 512


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Callable[[bool], None]]]:
    """A folder of half a megabyte, and what fills it or makes room; without the right to mount, the error alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_KB}k", "lepton-faults", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    full = [False]

    def fill(wanted: bool) -> None:
        full[0] = wanted
        ballast = folder / "ballast"
        if not mounted:
            return
        if not wanted:
            ballast.unlink()
            return
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # until nothing fits
            while True:
                file.write(bytes(4096))

    def temporary_file(path: Path, data: bytes) -> object:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return durable.temporary_file(path, data)

    if not mounted:
        monkeypatch.setattr(local, "temporary_file", temporary_file)
    yield folder, fill
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_what_does_not_fit(
    small_disk: tuple[Path, Callable[[bool], None]], caplog: pytest.LogCaptureFixture, table: Table
) -> None:
    """Training goes on, the log names disk and place, nothing half is left, and with room again it is saved."""
    folder, fill = small_disk
    store: Store = open_store((folder / "store").as_uri())
    lease = RunLease.acquire(store, RUN, ttl_s=600)
    alone = SimpleNamespace(rank=0, world_size=1, all_write=False)
    writer = CheckpointWriter(CheckpointStore(store, RUN, lease.attempt), 3, Quiet(), alone)  # type: ignore[arg-type]  # what it uses
    chain, full = Chain(64, 4, 0), 0
    for step in range(1, 41):
        if step in (11, 21):
            fill(step == 11)
        chain.advance()
        with caplog.at_level(logging.WARNING):
            writer.submit(step, chain.copy(), chain.state(1))
            writer.settle()
        if 11 <= step <= 20:
            full += 1
            assert committed(store, RUN)[-1] == 10
        else:
            assert committed(store, RUN)[-1] == step
    writer.finish()
    lease.release()
    assert "the disk is full" in caplog.text
    assert str(folder) in caplog.text
    assert all(found["whole"] for found in look(store, RUN)["steps"].values())
    assert not list(folder.rglob(".lepton-tmp-*"))
    table.add(
        "F42", "disk full", f"tmpfs of {SIZE_KB} kB", full, "0 runs and 0 checkpoints lost, disk and path in the log"
    )
