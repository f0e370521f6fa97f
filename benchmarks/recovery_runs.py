"""Training runs that recovery.py disturbs, ours and stock Ray Train's: started, watched, struck, and ended by process.

A run is a process of its own. How far its ranks are is read from files that outlive them: the beats of ours, the marks
of stock_recovery.py. Each wait has an end; what does not come in time is a `MissedError` with the run's last words.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import yaml
from stock_recovery import Mark, read_marks

from lepton_ray.errors import LeptonError
from lepton_ray.monitoring.incidents import Incident, incidents
from lepton_ray.monitoring.ledger import RankEntry
from lepton_ray.monitoring.runs import read_entries
from lepton_ray.storage import open_store
from lepton_ray.training.beat import MAGIC, NOTED, PAGE_BYTES, SEQUENCE, SINCE, SLOTS_AT, STEP, beats_folder

HERE = Path(__file__).parent
T = TypeVar("T")
POLL_S, FILE_S = 0.005, 0.2
"""Seconds between two looks at the ranks' pages, and at files of the store: looking takes time from the ranks."""
STEP_S = 300.0
"""Seconds within which the next step that is waited for must come: a start, a recovery, and what training takes."""
PIECE = 65536
"""Bytes that a slow line carries of one connection before it is another's turn."""
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000
"""Period of a CPU quota: shorter than a step, so that every step is slower."""


class MissedError(Exception):
    """What was waited for did not come."""


@dataclass(frozen=True)
class Strike:
    """What a signal to some ranks cost."""

    ranks: list[int]
    step: int
    """Steps that were done when it was sent."""
    reached: int
    """Steps that any rank of the group did before it ended."""
    repeated: int
    """Steps that were done again."""
    seconds: float
    """From the signal to the end of the first step of the next worker group."""
    struck_at: float
    """Unix seconds."""
    generation: int
    """The worker group that was struck."""
    parts: dict[str, float] = field(default_factory=dict)
    """`seconds` in parts, where the run tells them."""


class Run:
    """A command of this Python in a process of its own; a context manager that ends it and all below it."""

    def __init__(self, folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.folder, self._command = folder, [sys.executable, *command]
        self._environment = {**os.environ, **(environment or {})}
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as errors:
            self.process = subprocess.Popen(self._command, env=self._environment, stdout=out, stderr=errors)
        return self

    def __exit__(self, *_: object) -> None:
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(self.process.pid).children(recursive=True)
        for one in below:
            with contextlib.suppress(psutil.Error):
                if one.status() == psutil.STATUS_STOPPED:
                    one.resume()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=30)
        _, left = psutil.wait_procs(below, timeout=20)
        for one in left:  # by process, not by number: a number may be another's by now
            with contextlib.suppress(psutil.Error):
                one.kill()
        self.process.kill()
        self.process.wait(timeout=10)

    def marks(self) -> list[Mark]:
        """How far the ranks of the worker groups are that this machine knows of."""
        return []

    def newest(self) -> list[Mark]:
        """The ranks of the newest worker group, by rank; empty before there is one."""
        found = self.marks()
        group = max((mark.group for mark in found), default=0)
        return sorted((mark for mark in found if mark.group == group), key=lambda mark: mark.rank)

    def until(self, wanted: Callable[[], T | None], what: str, limit_s: float = STEP_S, every_s: float = POLL_S) -> T:
        """What `wanted` gives, once it gives anything. Raises MissedError where the run ends or time is over."""
        over = time.monotonic() + limit_s
        while True:
            ended = self.process.poll()
            found = wanted()
            if found:
                return found
            if ended is not None:
                raise MissedError(f"the run ended (exit code {ended}) before {what}: {self.last_words()}")
            if time.monotonic() > over:
                raise MissedError(f"no {what} within {limit_s:g} s: {self.last_words()}")
            time.sleep(every_s)

    def reach(self, step: int, limit_s: float = STEP_S) -> list[Mark]:
        """The newest group once any of its ranks has done `step` steps."""

        def there() -> list[Mark] | None:
            group = self.newest()
            return group if group and max(mark.step for mark in group) >= step else None

        return self.until(there, f"step {step}", limit_s)

    def strike(
        self, number: int, ranks: Sequence[int] | None = None, grace_s: float | None = None, limit_s: float = STEP_S
    ) -> Strike:
        """Send a signal to ranks of the newest group (None: all), SIGKILL after a grace; wait for the next group."""
        before = self.newest()
        group, most = before[0].group, max(mark.step for mark in before)
        hit = [mark for mark in before if ranks is None or mark.rank in ranks]
        struck, struck_at = time.monotonic(), time.time()
        for mark in hit:
            if grace_s is not None:
                later = threading.Timer(grace_s, _kill, [psutil.Process(mark.pid)])
                later.daemon = True
                later.start()
            os.kill(mark.pid, number)

        def begun() -> Mark | None:
            nonlocal most
            found = self.marks()
            most = max([most, *(mark.step for mark in found if mark.group == group)])
            new = [mark for mark in found if mark.group > group and mark.first]
            return min(new, key=lambda mark: mark.first_ns, default=None)

        first = self.until(begun, "first step after the fault", limit_s)
        return Strike(
            ranks=[mark.rank for mark in hit], step=max(mark.step for mark in before), reached=most,
            repeated=max(0, most - first.first + 1), seconds=first.first_ns / 1e9 - struck, struck_at=struck_at,
            generation=group,
        )  # fmt: skip

    def finish(self, limit_s: float = STEP_S) -> dict[str, Any]:
        """Wait for the end; the JSON object that it printed last, empty where it printed none."""
        over = time.monotonic() + limit_s
        while (code := self.process.poll()) is None:
            if time.monotonic() > over:
                raise MissedError(f"the run did not end within {limit_s:g} s: {self.last_words()}")
            self.marks()
            time.sleep(FILE_S)
        if code:
            raise MissedError(f"the run failed (exit code {code}): {self.last_words()}")
        text = (self.folder / "out").read_text(encoding="utf-8")
        found, at = {}, text.find("{")
        while at >= 0:
            found, end = json.JSONDecoder().raw_decode(text, at)
            at = text.find("{", end)
        return found

    def last_words(self) -> str:
        """The end of what it said on standard error."""
        lines = (self.folder / "err").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join([line for line in lines if '"event": "progress"' not in line][-5:])[-1500:]


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):  # gone, as it should be
        process.kill()


class StockRun(Run):
    """The loop of stock_recovery.py on a local Ray of its own."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._marks = folder / "marks"
        self._marks.mkdir(parents=True, exist_ok=True)
        given = folder / "config.json"
        given.write_text(
            json.dumps({**config, "marks": str(self._marks), "scratch": str(folder / "ray")}), encoding="utf-8"
        )
        variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        super().__init__(folder, [str(HERE / "stock_recovery.py"), str(given)], variables)

    def marks(self) -> list[Mark]:
        """As the ranks wrote them."""
        return read_marks(self._marks)


class OurRun(Run):
    """`lepton-ray train` on a local Ray of its own, or on that of RAY_ADDRESS."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], store: str, environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
        super().__init__(
            folder, ["-m", "lepton_ray.cli", "train", str(config), "--store", store, "--json"], environment
        )
        self.name, self.store = str(settings["run"]), open_store(store)
        self._folder: Path | None = None
        self._pages: dict[Path, tuple[dict[str, Any], mmap.mmap]] = {}
        self._seen: dict[Path, dict[int, float]] = {}
        """When each step count of a page was first seen, until its rank has done two steps."""
        self._firsts: dict[Path, tuple[int, float]] = {}

    def marks(self) -> list[Mark]:
        """From the beats of the two newest groups; those that were removed are remembered as they were last."""
        if self._folder is None:
            with contextlib.suppress(LeptonError):
                self._folder = beats_folder(self.store.uri, self.name, self.record()["created_at"])
        for path in self._folder.glob("*.beat") if self._folder else ():
            if path not in self._pages:
                with contextlib.suppress(OSError), path.open("rb") as file:
                    page = mmap.mmap(file.fileno(), PAGE_BYTES, prot=mmap.PROT_READ)
                    self._pages[path] = json.loads(page[len(MAGIC) : SLOTS_AT].partition(b"\n")[0]), page
        newest = max((header["generation"] for header, _ in self._pages.values()), default=0)
        return [
            self._mark(path, header, page)
            for path, (header, page) in self._pages.items()
            if header["generation"] >= newest - 1  # of the others nothing new can be seen
        ]

    def _mark(self, path: Path, header: Mapping[str, Any], page: mmap.mmap) -> Mark:
        """The page as a mark; it is read again while the rank changes it."""
        for _ in range(100):
            slots = struct.unpack_from("<8Q8d", page, SLOTS_AT)
            if slots[SEQUENCE] % 2 == 0 and struct.unpack_from("<Q", page, SLOTS_AT)[0] == slots[SEQUENCE]:
                break
        step, later = int(slots[STEP]), int(slots[NOTED])
        if path not in self._firsts:
            seen = self._seen.setdefault(path, {})
            seen.setdefault(step, time.monotonic())
            if later:  # the count says which was the first: what a page begins with may be what was restored
                self._firsts[path] = step - later, min(at for count, at in seen.items() if count >= step - later)
        first, first_at = self._firsts.get(path, (0, 0.0))
        return Mark(
            header["generation"], header["rank"], header["pid"], step, first, later + 1 if first else 0,
            int(first_at * 1e9), slots[SINCE],
        )  # fmt: skip

    def incidents(self, *kinds: str, since: float = 0.0) -> list[Incident]:
        """What was reported of these kinds, oldest first."""
        with contextlib.suppress(LeptonError):
            return [one for one in incidents(self.store, self.name) if one.kind in kinds and one.at >= since]
        return []

    def repeated(self) -> int:
        """Steps that were done more than once, over all groups."""
        spans: dict[int, tuple[int, int]] = {}
        for path, (header, page) in self._pages.items():
            mark = self._mark(path, header, page)
            if mark.first:
                first, last = spans.get(mark.group, (mark.first, mark.step))
                spans[mark.group] = min(first, mark.first), max(last, mark.step)
        groups = [span for _, span in sorted(spans.items())]
        return sum(max(0, before[1] - after[0] + 1) for before, after in itertools.pairwise(groups))

    def explained(self, strike: Strike) -> Strike:
        """The strike with its seconds in parts, as ledger and incidents tell them."""
        told = self.incidents("worker_lost", "error", "hang", "preempted", since=strike.struck_at)

        def noted() -> RankEntry | None:
            later = (entry for entry in self.entries() if entry.generation > strike.generation and entry.first_step)
            return next(later, None)

        try:
            entry = self.until(noted, "ledger entry", 5.0, FILE_S)
        except MissedError:  # it ended before a second was over
            return strike
        joined = entry.started_at - strike.struck_at
        restored = joined + entry.phases.get("starting", 0.0) + entry.phases.get("loading", 0.0)
        moments = {"restart": joined, "restore": restored, "first step": strike.seconds}
        if told:
            moments = {"detect": min(joined, told[0].at - strike.struck_at), **moments}
        parts = {
            name: at - before for (name, at), before in zip(moments.items(), [0.0, *moments.values()], strict=False)
        }
        return replace(strike, parts=parts)

    def entries(self) -> list[RankEntry]:
        """What rank 0 of each generation noted in the ledger."""
        found = [entry for entry in read_entries(self.store, self.name)[0] if entry.rank == 0]
        return sorted(found, key=lambda entry: entry.generation)

    def record(self) -> dict[str, Any]:
        """The run's record."""
        found: dict[str, Any] = json.loads(self.store.get(f"runs/{self.name}/record.json"))
        return found

    def manifests(self) -> dict[int, dict[str, Any]]:
        """The manifests of the checkpoints that are there, by step."""
        folder, found = f"runs/{self.name}/checkpoints", {}
        for name in self.store.list_names(folder):
            with contextlib.suppress(LeptonError, ValueError):
                manifest = json.loads(self.store.get(f"{folder}/{name}/manifest.json"))
                found[int(manifest["step"])] = manifest
        return found

    def weights(self) -> str:
        """SHA-256 of the weights in the last checkpoint."""
        files = max(self.manifests().items())[1]["files"]
        return str(files["model.safetensors"]["sha256"])


@contextlib.contextmanager
def slow_store(folder: Path, bytes_per_s: float) -> Iterator[tuple[str, dict[str, str]]]:
    """An S3 server behind a slow line: the URI of a store on it, and the variables that lead a run there.

    This process itself goes to the server directly.
    """
    sys.path.append(str(HERE.parent / "tests"))  # the S3 server and the faulty proxy of the tests
    from fault_proxy import FaultProxy
    from seaweed import SeaweedS3

    line = threading.Lock()

    class SlowProxy(FaultProxy):
        def serve(self, client: Any, deed: Any, body: bytes) -> None:
            for start in range(0, len(body), PIECE):
                with line:  # all connections share it, piece by piece
                    self._stopped.wait(min(PIECE, len(body) - start) / bytes_per_s)
            super().serve(client, deed, body)

    with SeaweedS3(folder) as server, SlowProxy(server.port) as proxy:
        before = {name: os.environ.get(name) for name in server.environment}
        os.environ.update(server.environment)
        try:
            yield server.uri("store"), {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def slowed(pid: int, share: float) -> Iterator[str]:
    """Give a process so much of one CPU for the length of the block; says how: by quota, or by stopping it in turns."""
    group = CPU_GROUPS / f"lepton-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(share * PERIOD_US)))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        with _stopped_in_turns(pid, share):
            yield "SIGSTOP in turns"
        return
    try:
        yield "CPU quota"
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (CPU_GROUPS / "cgroup.procs").write_text(left)
        with contextlib.suppress(OSError):
            group.rmdir()


@contextlib.contextmanager
def _stopped_in_turns(pid: int, share: float) -> Iterator[None]:
    process, over = psutil.Process(pid), threading.Event()

    def take_turns() -> None:
        with contextlib.suppress(psutil.Error):
            while not over.wait(share * PERIOD_US / 1e6):
                process.send_signal(signal.SIGSTOP)
                over.wait((1 - share) * PERIOD_US / 1e6)
                process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=take_turns, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)
