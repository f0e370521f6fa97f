"""The kernel's count of processes that it ended for their memory, in both versions of the cgroup interface."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lepton_ray.training.memory_evidence import MemoryWitness, memory_group

MIB = 2**20


def machine(folder: Path, version: int, path: str = "/pods/a") -> tuple[Path, Path, Path]:
    """Folders like /sys/fs/cgroup and /proc with process 7 in a group, and the group's own folder."""
    mount, proc = folder / "cgroup", folder / "proc"
    group = (mount / "memory" if version == 1 else mount) / path.lstrip("/")
    group.mkdir(parents=True)
    (proc / "7").mkdir(parents=True)
    lines = f"3:cpu,cpuacct:/x\n2:memory:{path}\n" if version == 1 else f"0::{path}\n"
    (proc / "7" / "cgroup").write_text(lines)
    return mount, proc, group


def write(group: Path, version: int, kills: int, limit: str = str(512 * MIB)) -> None:
    if version == 1:
        (group / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")
        (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (group / "memory.max_usage_in_bytes").write_text(f"{500 * MIB}\n")
    else:
        (group / "memory.events").write_text(f"low 0\nhigh 0\nmax 9\noom 2\noom_kill {kills}\n")
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.peak").write_text(f"{500 * MIB}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_kill_is_told_with_limit_and_peak(tmp_path: Path, version: int) -> None:
    """Only one that came after the rank was named counts."""
    mount, proc, group = machine(tmp_path, version)
    write(group, version, kills=4)
    witness = MemoryWitness(mount, proc)
    witness.watch({1: 7})
    assert witness.killed() == {}
    write(group, version, kills=5)
    assert witness.killed() == {1: "ended by the kernel at the memory limit of 512 MiB, peak 500 MiB"}
    witness.watch({1: 7})
    assert witness.killed() == {}


@pytest.mark.parametrize(("version", "limit"), [(1, str(2**63 - 4096)), (2, "max")])
def test_no_limit_is_no_figure(tmp_path: Path, version: int, limit: str) -> None:
    mount, proc, group = machine(tmp_path, version)
    write(group, version, kills=0, limit=limit)
    found = memory_group(7, mount, proc)
    assert found is not None
    assert found.figures() == "ended by the kernel, peak 500 MiB"


@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_the_mounted_group_is_taken(tmp_path: Path, version: int) -> None:
    """The path is the host's there, and what is mounted is the container's group itself."""
    mount, proc, _ = machine(tmp_path, version, path="/")
    (proc / "7" / "cgroup").write_text("2:memory:/kubepods/pod1\n" if version == 1 else "0::/../../kubepods/pod1\n")
    write(mount / "memory" if version == 1 else mount, version, kills=3)
    found = memory_group(7, mount, proc)
    assert found is not None
    assert found.kills() == 3


def test_where_nothing_is_known_nobody_is_accused(tmp_path: Path) -> None:
    """No such process, no cgroup mounted, files that hold something else."""
    mount, proc, group = machine(tmp_path, 2)
    assert memory_group(7, mount, proc) is None
    (group / "memory.events").write_text("oom_kill many\n")
    found = memory_group(7, mount, proc)
    assert found is not None
    assert found.kills() == 0
    witness = MemoryWitness(mount, proc)
    witness.watch({0: 7, 1: 8, 2: os.getpid()})
    assert witness.killed() == {}
