"""One driver per run: the lease that says who drives it, and the attempt number that fences everybody else.

`runs/<run>/lease.json` is changed by compare-and-swap only. A driver renews it; a lease that is not renewed for its
time to live, or whose driver was a process of this host that is gone, can be taken over. Every take-over raises the
attempt number, and writers of checkpoints check that theirs is still the newest.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from lepton_ray.errors import ConflictError, IntegrityError, LeptonError, NotFoundError, RefusedError, shown
from lepton_ray.storage import Store

TIME_TO_LIVE_S = 15.0
"""A lease unchanged for so long, as seen by the one who waits for it, is free (no clocks are compared)."""


def lease_key(run: str) -> str:
    """Where the lease of a run is stored."""
    return f"runs/{run}/lease.json"


def _me() -> dict[str, Any]:
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def _gone(holder: Mapping[str, Any]) -> bool:
    """Whether the holder was a process of this host that runs no longer."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(holder["pid"]))
        return abs(process.create_time() - float(holder["started"])) > 1.0 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _parsed(run: str, data: bytes) -> dict[str, Any]:
    """What a lease says. Raises IntegrityError for a damaged one."""
    try:
        held: dict[str, Any] = json.loads(data)
        held["attempt"], held["ttl_s"] = int(held["attempt"]), float(held["ttl_s"])
        held["released"] = bool(held["released"])
        held["driver"] = {name: held["driver"][name] for name in ("host", "pid", "started")}
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{lease_key(run)} is damaged ({shown(str(error))}); make sure that nothing drives the run, then delete it"
        ) from error
    return held


@dataclass(frozen=True)
class LeaseView:
    """A lease as somebody sees it who does not want it."""

    attempt: int
    """Of its newest holder."""
    ttl_s: float
    """Seconds after which it is free, if it stands still."""
    released: bool
    gone: bool
    """Whether its holder was a process of this host that runs no longer."""
    etag: str
    """Changes whenever it is renewed."""


def look_at(store: Store, run: str) -> LeaseView | None:
    """The lease of a run as it is now; None where there is none. Raises IntegrityError for a damaged one."""
    try:
        seen = store.fetch(lease_key(run))
    except NotFoundError:
        return None
    held = _parsed(run, seen.data)
    return LeaseView(held["attempt"], held["ttl_s"], held["released"], _gone(held["driver"]), seen.etag)


class RunLease:
    """The right to drive one run, renewed in the background until released."""

    def __init__(self, store: Store, run: str, attempt: int, etag: str, ttl_s: float) -> None:
        self.attempt = attempt
        self.lost = threading.Event()
        """Set when somebody else took the run over: stop at once."""
        self._store, self._run, self._etag, self._ttl_s = store, run, etag, ttl_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def acquire(cls, store: Store, run: str, ttl_s: float = TIME_TO_LIVE_S) -> RunLease:
        """Take the lease, waiting up to the time to live where its holder may be dead.

        Raises RefusedError naming the holder where it renews the lease or somebody else is faster.
        """
        key = lease_key(run)
        try:
            seen = store.fetch(key)
        except NotFoundError:
            body = cls._body(run, 1, ttl_s)
            try:
                return cls(store, run, 1, store.put_if_absent(key, body), ttl_s).start()
            except ConflictError as error:
                raise RefusedError(f"run {run}: another driver has just started it; follow that one") from error
        held = _parsed(run, seen.data)
        if not held["released"] and not _gone(held["driver"]):
            seen = cls._wait_for_expiry(store, run, seen.etag, held)
        attempt = int(held["attempt"]) + 1
        try:
            etag = store.replace(key, cls._body(run, attempt, ttl_s), seen.etag)
        except ConflictError as error:
            raise RefusedError(f"run {run}: another driver took it over first; follow that one") from error
        return cls(store, run, attempt, etag, ttl_s).start()

    @staticmethod
    def _wait_for_expiry(store: Store, run: str, etag: str, held: Mapping[str, Any]) -> Any:
        """The lease as it was, once it has stood still for its time to live."""
        deadline = time.monotonic() + float(held["ttl_s"])
        while time.monotonic() < deadline:
            time.sleep(0.5)  # a lease has no event to wait for: standing still is what is looked for
            now = store.fetch(lease_key(run))
            if now.etag != etag and not _parsed(run, now.data)["released"]:
                driver = held["driver"]
                raise RefusedError(
                    f"run {run}: driven by {driver['host']}:{driver['pid']} (attempt {held['attempt']}), which is "
                    "alive; wait for its end, stop it, or choose another run name"
                )
            if now.etag != etag:
                return now
        return store.fetch(lease_key(run))

    @staticmethod
    def _body(run: str, attempt: int, ttl_s: float, *, released: bool = False) -> bytes:
        lease = {
            "run": run,
            "attempt": attempt,
            "driver": _me(),
            "ttl_s": ttl_s,
            "released": released,
            # makes every renewal a new object, which is what a waiting driver watches; not compared with any clock
            "renewed_at": time.time(),
        }
        return json.dumps(lease).encode()

    def start(self) -> RunLease:
        """Begin to renew the lease in the background."""
        self._thread.start()
        return self

    def _renew(self) -> None:
        while not self._stop.wait(self._ttl_s / 3):
            try:
                self._swap(self._body(self._run, self.attempt, self._ttl_s))
            except (ConflictError, NotFoundError, IntegrityError):
                self.lost.set()
                return
            except LeptonError:
                continue  # storage is away: the lease may expire, and then the next renewal finds the conflict

    def _swap(self, body: bytes) -> None:
        """Put `body` in the place of this driver's lease. Raises ConflictError where it is somebody else's."""
        key = lease_key(self._run)
        try:
            self._etag = self._store.replace(key, body, self._etag)
        except ConflictError:
            # a renewal that was done although its answer was lost leaves another etag than the one we know
            now = self._store.fetch(key)
            held = _parsed(self._run, now.data)
            if held["released"] or (held["attempt"], held["driver"]) != (self.attempt, _me()):
                raise
            self._etag = self._store.replace(key, body, now.etag)

    def release(self) -> None:
        """Give the lease back, so that the next driver need not wait."""
        self._stop.set()
        self._thread.join(timeout=30)
        if self.lost.is_set():
            return
        body = self._body(self._run, self.attempt, self._ttl_s, released=True)
        try:
            self._swap(body)
        except LeptonError:
            self.lost.set()


class Fence:
    """Tells a writer whether its attempt is still the newest; cheap enough to ask before each commit."""

    def __init__(self, store: Store, run: str, attempt: int) -> None:
        self._store, self._run, self._attempt = store, run, attempt

    def check(self) -> None:
        """Raise RefusedError where another attempt has taken the run over."""
        newest = int(_parsed(self._run, self._store.get(lease_key(self._run)))["attempt"])
        if newest != self._attempt:
            raise RefusedError(
                f"run {self._run}: attempt {self._attempt} was taken over by attempt {newest}; this one must not write"
            )
