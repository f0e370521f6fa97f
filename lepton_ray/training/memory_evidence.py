"""Evidence that the kernel ended a process for its memory: the counters of its control group, read before and after.

A process that is killed for its memory leaves no word, and Ray reports it like any crash. Its cgroup counts such kills,
with the limit and the peak beside; in a container they are those of the container. Ray's own memory monitor, which
usually comes first, tells by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60
"""cgroup v1 writes about 2**63 where there is no limit."""


@dataclass(frozen=True)
class MemoryGroup:
    """The cgroup of a process, in version 1 or 2 of the interface."""

    folder: Path
    version: int

    def kills(self) -> int:
        """Processes that the kernel ended in it for their memory; 0 where it does not say."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        with contextlib.suppress(OSError, ValueError):
            for line in (self.folder / name).read_text(encoding="ascii").splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        return 0

    def figures(self) -> str:
        """Limit and peak in words."""
        names = ("memory.max", "memory.peak") if self.version == 2 else (
            "memory.limit_in_bytes", "memory.max_usage_in_bytes",
        )  # fmt: skip
        limit, peak = (self._bytes(name) for name in names)
        said = "ended by the kernel" + (f" at the memory limit of {limit / 2**20:.0f} MiB" if limit else "")
        return said + (f", peak {peak / 2**20:.0f} MiB" if peak else "")

    def _bytes(self, name: str) -> int | None:
        with contextlib.suppress(OSError, ValueError):  # `max`: no limit
            value = int((self.folder / name).read_text(encoding="ascii"))
            return value if value < _UNLIMITED else None
        return None


def memory_group(pid: int, mount: Path = MOUNT, proc: Path = Path("/proc")) -> MemoryGroup | None:
    """The cgroup that counts the memory of a process of this node; None where that is not known."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    entries = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    for controllers, path in ((entry[1], entry[2]) for entry in entries):
        if "memory" in controllers.split(","):
            return _found(mount / "memory", path, 1, "memory.oom_control")
    for controllers, path in ((entry[1], entry[2]) for entry in entries):
        if not controllers:
            return _found(mount, path, 2, "memory.events")
    return None


def _found(mount: Path, path: str, version: int, file: str) -> MemoryGroup | None:
    # in a container the path may be the host's, while what is mounted is the container's own group
    for folder in (mount / path.lstrip("/"), mount):
        if (folder / file).is_file():
            return MemoryGroup(folder, version)
    return None


class MemoryWitness:
    """Tells which ranks of this node sat in a cgroup in which the kernel has ended a process since they were named."""

    def __init__(self, mount: Path = MOUNT, proc: Path = Path("/proc")) -> None:
        self._mount, self._proc = mount, proc
        self._seen: dict[int, tuple[MemoryGroup, int]] = {}

    def watch(self, pids: Mapping[int, int]) -> None:
        """From now on watch these ranks (rank to process id on this node), and no others."""
        groups = {rank: memory_group(pid, self._mount, self._proc) for rank, pid in pids.items()}
        self._seen = {rank: (group, group.kills()) for rank, group in groups.items() if group is not None}

    def killed(self) -> dict[int, str]:
        """Ranks that may have been ended for their memory, with the figures."""
        return {rank: group.figures() for rank, (group, before) in self._seen.items() if group.kills() > before}
